"""Other ways to turn a folder of photographs into features, with a model folder's network; for benchmarks/embed.py.

    python benchmarks/peers/loops.py WAY PHOTOS --model FOLDER --onnx FILE --work FOLDER --workers N --out FILE.npy

Needs nothing of robustfeat, so that it runs in an environment of its own. Row i is the i-th photograph by name. Prints
the versions as JSON in the last line. What a way needs beside the network is made in `--work` once, and kept there.

`torchvision`, `timm` and `onnxruntime` are the loops of their tutorials; `fastembed` and `lightly-train` are the
packages' own functions, with their own batch sizes. The others are `torchvision` with another resizing.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

BATCH = 32
Features = NDArray[np.float32]


@dataclass(frozen=True)
class Job:
    """What to embed, with what."""

    folder: Path
    model: Path
    onnx: Path
    work: Path
    workers: int

    @property
    def photos(self) -> list[Path]:
        """In the order of the names."""
        return sorted(self.folder.iterdir())

    @property
    def config(self) -> dict[str, Any]:
        """The preprocessing as timm describes it, with `side`, `short` and `filter` made from it."""
        config: dict[str, Any] = json.loads((self.model / "config.json").read_text())["pretrained_cfg"]
        side = config["input_size"][-1]
        pillow = getattr(Image.Resampling, config["interpolation"].upper())
        return {**config, "side": side, "short": int(side / config["crop_pct"]), "filter": pillow}

    def network(self) -> Any:
        """The weights as timm loads them."""
        import timm

        block = json.loads((self.model / "config.json").read_text())["robustfeat"]
        # The last layer is a projection, which makes the features, or a classifier.
        options: dict[str, Any] = {} if block.get("components_of") else {"num_classes": 0}
        return timm.create_model(f"local-dir:{self.model}", pretrained=True, **options).eval()


class _Photos:
    def __init__(self, files: list[Path], transform: Callable[[Image.Image], Any]) -> None:
        self._files, self._transform = files, transform

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, number: int) -> Any:
        return self._transform(Image.open(self._files[number]).convert("RGB"))


def torch_loop(job: Job, transform: Callable[[Image.Image], Any]) -> Features:
    import torch
    from torch.utils.data import DataLoader

    network = job.network()
    loader: Any = DataLoader(_Photos(job.photos, transform), BATCH, num_workers=job.workers)  # type: ignore[arg-type]
    with torch.no_grad():
        features: Features = torch.cat([network(batch) for batch in loader]).numpy()
    return features


def resized(config: dict[str, Any], image: Image.Image) -> tuple[int, int]:
    """Width and height with the shorter side as it must be."""
    short, (width, height) = config["short"], image.size
    return (short, int(short * height / width)) if width <= height else (int(short * width / height), short)


def finish(config: dict[str, Any], pixels: Any) -> Any:
    """(3, H, W) uint8 to the network's input."""
    from torchvision.transforms import functional as F

    return F.normalize(F.center_crop(pixels, [config["side"]]).float() / 255, config["mean"], config["std"])


def not_antialiased(config: dict[str, Any], image: Image.Image) -> Any:
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms import functional as F

    mode = InterpolationMode(config["interpolation"])
    return finish(config, F.resize(F.pil_to_tensor(image), [config["short"]], mode, antialias=False))


def opencv(config: dict[str, Any], image: Image.Image) -> Any:
    import torch

    cv2: Any = import_module("cv2")
    pixels = cv2.resize(np.asarray(image), resized(config, image), interpolation=cv2.INTER_LINEAR)
    return finish(config, torch.from_numpy(pixels).permute(2, 0, 1))


def squashed(config: dict[str, Any], image: Image.Image) -> Any:
    from torchvision.transforms import functional as F

    return finish(config, F.pil_to_tensor(image.resize((config["side"], config["side"]), config["filter"])))


def torchvision_way(job: Job) -> Features:
    from torchvision import transforms as T

    config = job.config
    resize = T.Resize(config["short"], T.InterpolationMode(config["interpolation"]))
    normalise = T.Normalize(config["mean"], config["std"])
    return torch_loop(job, T.Compose([resize, T.CenterCrop(config["side"]), T.ToTensor(), normalise]))


def timm_way(job: Job) -> Features:
    import torch

    data: Any = import_module("timm.data")
    network = job.network()
    loader = data.create_loader(
        data.create_dataset("", root=str(job.folder)),
        batch_size=BATCH,
        num_workers=job.workers,
        device=torch.device("cpu"),
        **data.resolve_model_data_config(network),
    )
    with torch.no_grad():
        features: Features = torch.cat([network(batch) for batch, _ in loader]).numpy()
    return features


def onnxruntime_way(job: Job) -> Features:
    import onnxruntime

    config, photos = job.config, job.photos
    mean, std = np.float32(config["mean"]), np.float32(config["std"])
    session = onnxruntime.InferenceSession(str(job.onnx))

    def prepare(file: Path) -> Features:
        image = Image.open(file).convert("RGB")
        image = image.resize(resized(config, image), config["filter"])
        left, top = (image.width - config["side"]) // 2, (image.height - config["side"]) // 2
        square = image.crop((left, top, left + config["side"], top + config["side"]))
        return ((np.asarray(square, np.float32) / 255 - mean) / std).astype(np.float32).transpose(2, 0, 1)

    batches = [photos[first : first + BATCH] for first in range(0, len(photos), BATCH)]
    return np.concatenate([session.run(None, {"pixel_values": np.stack([*map(prepare, b)])})[0] for b in batches])


def fastembed_way(job: Job, parallel: int | None) -> Features:
    """`ImageEmbedding` on a folder of ours, under the name of a model that it knows: nothing is downloaded."""
    folder, config = job.work / "fastembed", job.config
    if not (folder / "preprocessor_config.json").exists():
        folder.mkdir()
        shutil.copy(job.onnx, folder / "model.onnx")
        if (weights := job.onnx.with_name("model.safetensors")).exists():  # the graph refers to them
            shutil.copy(weights, folder)
        described = {
            "do_resize": True,
            "size": {"shortest_edge": config["short"]},
            "resample": int(config["filter"]),
            "do_center_crop": True,
            "crop_size": config["side"],
            "do_normalize": True,
            "image_mean": config["mean"],
            "image_std": config["std"],
        }
        (folder / "preprocessor_config.json").write_text(json.dumps(described))
    fastembed: Any = import_module("fastembed")
    model = fastembed.ImageEmbedding("Qdrant/resnet50-onnx", specific_model_path=str(folder))
    return np.stack(list(model.embed([str(photo) for photo in job.photos], parallel=parallel))).astype(np.float32)


def lightly_way(job: Job) -> Features:
    """`lightly_train.embed` on a checkpoint with our weights, made by its own classes in place of its training."""
    import torch

    checkpoint, out = job.work / "lightly.ckpt", job.work / "lightly.pt"
    lightly_train: Any = import_module("lightly_train")
    if not checkpoint.exists():
        parts: Any = import_module("lightly_train._checkpoint")
        wrap: Any = import_module("lightly_train._models.package_helpers").get_wrapped_model
        wrapped = wrap(job.network(), num_input_channels=3)
        embedding_model = parts.EmbeddingModel(wrapped_model=wrapped)
        models = parts.CheckpointLightlyTrainModels(wrapped.get_model(), wrapped, embedding_model)
        norm = parts.NormalizeArgs(mean=tuple(job.config["mean"]), std=tuple(job.config["std"]))
        parts.Checkpoint({}, parts.CheckpointLightlyTrain.from_now(models, norm)).save(checkpoint)
    lightly_train.embed(
        out=out,
        data=job.folder,
        checkpoint=checkpoint,
        image_size=job.config["side"],
        num_workers=job.workers,
        accelerator="cpu",
        overwrite=True,
    )
    answer = torch.load(out, weights_only=True)
    row = {name: number for number, name in enumerate(answer["filenames"])}
    features: Features = answer["embeddings"][[row[photo.name] for photo in job.photos]].numpy()
    return features


WAYS: dict[str, Callable[[Job], Features]] = {
    "torchvision": torchvision_way,
    "timm": timm_way,
    "onnxruntime": onnxruntime_way,
    "fastembed": lambda job: fastembed_way(job, None),
    "fastembed, parallel": lambda job: fastembed_way(job, job.workers),
    "lightly-train": lightly_way,
    "not antialiased": lambda job: torch_loop(job, partial(not_antialiased, job.config)),
    "OpenCV": lambda job: torch_loop(job, partial(opencv, job.config)),
    "squashed": lambda job: torch_loop(job, partial(squashed, job.config)),
}

PACKAGES = ("torch", "timm", "onnxruntime", "fastembed", "lightly", "opencv", "pillow", "numpy")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("way", choices=WAYS)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--onnx", type=Path, required=True, help="the same network as an ONNX file")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--workers", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    job = Job(options.photos, options.model, options.onnx, options.work, options.workers)
    np.save(options.out, WAYS[options.way](job))
    installed = {found.metadata["Name"].lower(): found.version for found in metadata.distributions()}
    print(json.dumps({name: installed[name] for name in sorted(installed) if name.startswith(PACKAGES)}))


if __name__ == "__main__":
    main()
