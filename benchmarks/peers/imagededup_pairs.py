"""Pairs of duplicates that imagededup finds in a folder, as JSON: METHOD FOLDER [WEIGHTS].

Run by an interpreter of an environment with imagededup, and with timm for WEIGHTS of tf_efficientnet_lite0.
"""

from __future__ import annotations

import json
import sys
from typing import Any


def hasher() -> Any:
    from imagededup.methods import PHash

    return PHash(verbose=False)


def network(weights: str) -> Any:
    import timm
    import torch
    from imagededup.methods import CNN
    from imagededup.utils import CustomModel

    settings: Any = timm.data
    model = timm.create_model("tf_efficientnet_lite0", num_classes=0)
    state = torch.load(weights, map_location="cpu", weights_only=True)
    kept = [value for name, value in state.items() if not name.startswith(("_fc", "classifier"))]
    model.load_state_dict(dict(zip(model.state_dict(), kept, strict=True)))
    transform = settings.create_transform(**settings.resolve_model_data_config(model), is_training=False)
    return CNN(verbose=False, model_config=CustomModel(name="lite0", model=model.eval(), transform=transform))


def main() -> None:
    method, folder, *weights = sys.argv[1:]
    finder = hasher() if method == "PHash" else network(*weights)
    found = finder.find_duplicates(image_dir=folder)
    print(json.dumps(sorted({tuple(sorted((name, other))) for name, others in found.items() for other in others})))


if __name__ == "__main__":
    main()
