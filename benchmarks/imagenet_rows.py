"""Cuts the classifier of ImageNet weights of timm to the classes of DATA, as a start for training.

    python benchmarks/imagenet_rows.py MODEL DATA --out start.safetensors
    robustfeat train DATA --init start.safetensors --network timm:NAME ...

MODEL is a folder from `robustfeat import` with 1,000 classes in ImageNet's order, and DATA has classes named by WordNet
ids. A classifier with random weights would send random gradients into the network, and spoil ImageNet's features before
it has learned (Kumar et al., ICLR 2022).
"""

from __future__ import annotations

import argparse
from pathlib import Path

from safetensors.torch import load_file, save_file
from timm.data.imagenet_info import ImageNetInfo

from robustfeat.hub.catalog import resolve_model
from robustfeat.hub.folder import WEIGHTS
from robustfeat.training.data.opening import open_training_data


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("data", metavar="DATA")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.safetensors")
    options = parser.parse_args()
    folder = resolve_model(options.model)
    state, names = load_file(folder.path / WEIGHTS), ImageNetInfo("imagenet-1k").label_names()
    classes = open_training_data(options.data)[0].classes
    others = [name for name in classes if name not in names]
    if others:
        parser.error(f"DATA={options.data}: {len(others)} classes are not ImageNet's, such as {others[0]}")
    classifier = f"{folder.config.classifier}."
    given = state.get(f"{classifier}weight")
    if folder.config.components_of or given is None or len(given) != len(names):
        parser.error(f"MODEL={options.model}: has no classifier of ImageNet's 1,000 classes")
    rows = [names.index(name) for name in classes]
    for name in [name for name in state if name.startswith(classifier)]:
        state[name] = state[name][rows].contiguous()
    save_file(state, options.out)
    print(f"{options.out}: {len(rows)} of {len(names)} classes")


if __name__ == "__main__":
    main()
