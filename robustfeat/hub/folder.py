"""The model folder: one layout for training to write, the Hub to move and serving to read.

    config.json  model.safetensors  onnx/model.onnx  onnx/model_int8.onnx
    golden/  preprocessor_config.json  training.json  README.md

In a compact folder (such as the built-in one) `model.onnx` lies beside `model.safetensors` and keeps its weights in it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from importlib import resources
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from robustfeat.errors import ModelFolderError, first_line
from robustfeat.hub.config import ModelConfig

__all__ = ["BUILTIN", "ModelFolder", "resolve_model", "seal_folder"]

BUILTIN = "builtin"
"""The name of the model that the package carries; accepted wherever a model is."""

CONFIG = "config.json"
CARD = "README.md"
WEIGHTS = "model.safetensors"
ONNX = {"fp32": "onnx/model.onnx", "int8": "onnx/model_int8.onnx"}
COMPACT_ONNX = "model.onnx"
GOLDEN_FEATURES = "golden/features.npy"


class ModelFolder:
    """A model folder that was opened: its config is valid and its files are there.

    Attributes:
        path: the folder.
        config: what config.json says.

    Raises:
        ModelFolderError: the folder or a file is missing, or config.json is not ours or of a newer format.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        file = self.path / CONFIG
        if not file.is_file():
            raise ModelFolderError(
                f"{self.path}: not a model folder (no {CONFIG}); expected {BUILTIN} or what robustfeat export makes"
            )
        try:
            data = json.loads(file.read_text("utf-8"))
        except (OSError, ValueError) as exc:
            raise ModelFolderError(f"{file}: not valid JSON ({exc}); export the model again") from exc
        self.config = ModelConfig.from_dict(data, str(file))
        for name in self.config.files:
            if ".." in Path(name).parts or Path(name).is_absolute():
                raise ModelFolderError(f"{file}: lists {name!r}, which lies outside the folder; do not use this model")
            if not (self.path / name).is_file():
                raise ModelFolderError(f"{self.path}: {name} is missing; copy or export the model again")

    @property
    def precisions(self) -> list[str]:
        """What the folder holds ONNX files for: fp32, int8 or both."""
        return [precision for precision in ONNX if self._find_onnx(precision)]

    def onnx(self, precision: str) -> Path:
        """The ONNX file of that precision, its hash (and that of its external weights) verified.

        Raises:
            ModelFolderError: there is none, or it was altered.
        """
        name = self._find_onnx(precision)
        if name is None:
            raise ModelFolderError(
                f"{self.path}: has no {precision} model; it has {', '.join(self.precisions) or 'no ONNX file at all'}"
            )
        self.verify([name, WEIGHTS] if name == COMPACT_ONNX else [name])
        return self.path / name

    def golden(self) -> tuple[list[bytes], NDArray[np.float32]]:
        """The golden images' bytes and the (n, D) float32 features that this model must give for them."""
        names = sorted(name for name in self.config.files if name.startswith("golden/") and name != GOLDEN_FEATURES)
        self.verify([*names, GOLDEN_FEATURES])
        try:
            features: NDArray[np.float32] = np.load(self.path / GOLDEN_FEATURES, allow_pickle=False)
        except (OSError, ValueError, EOFError) as exc:
            raise ModelFolderError(f"{self.path / GOLDEN_FEATURES}: not an array ({first_line(exc)})") from exc
        if not names or features.shape != (len(names), self.config.feature_size):
            raise ModelFolderError(
                f"{self.path / GOLDEN_FEATURES}: must be {(len(names), self.config.feature_size)}; "
                f"got {features.shape}; export the model again"
            )
        return [(self.path / name).read_bytes() for name in names], features

    def verify(self, names: Iterable[str] | None = None) -> None:
        """Compares the files' sha256 with config.json; all of them by default.

        Raises:
            ModelFolderError: naming the first file that differs.
        """
        for name in self.config.files if names is None else names:
            expected = self.config.files.get(name)
            if expected is None:
                raise ModelFolderError(f"{self.path}: {name} is not listed in {CONFIG}; export the model again")
            actual = file_sha256(self.path / name)
            if actual != expected:
                raise ModelFolderError(
                    f"{self.path / name}: altered or truncated (sha256 must be {expected[:12]}..., "
                    f"got {actual[:12]}...); copy or export the model again"
                )

    def size_bytes(self) -> int:
        """Bytes of all files listed."""
        return sum((self.path / name).stat().st_size for name in self.config.files)

    def _find_onnx(self, precision: str) -> str | None:
        if precision not in ONNX:
            raise ModelFolderError(f"precision must be {' or '.join(ONNX)}; got {precision!r}")
        names = [ONNX[precision], *([COMPACT_ONNX] if precision == "fp32" else [])]
        return next((name for name in names if name in self.config.files), None)


def seal_folder(path: Path, config: ModelConfig, card: str) -> ModelFolder:
    """Writes the card and config.json with the sha256 of every other file in `path`, and opens the result."""
    files = {
        file.relative_to(path).as_posix(): file_sha256(file)
        for file in sorted(path.rglob("*"))
        if file.is_file() and file.relative_to(path).as_posix() not in {CONFIG, CARD}
    }
    (path / CARD).write_text(card, "utf-8")
    text = json.dumps(config.replace(files=files).to_dict(), indent=2, ensure_ascii=False)
    (path / CONFIG).write_text(text + "\n", "utf-8")
    return ModelFolder(path)


def resolve_model(name: str | os.PathLike[str] | None) -> ModelFolder:
    """The model that a user names: None or `builtin` for the built-in one, else a folder.

    Raises:
        ModelFolderError: there is no such model.
    """
    if name is None or os.fspath(name) == BUILTIN:
        return ModelFolder(Path(str(resources.files("robustfeat.hub").joinpath(BUILTIN))))
    return ModelFolder(Path(name))


def file_sha256(path: Path) -> str:
    """64 hex digits."""
    try:
        with open(path, "rb") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()
    except OSError as exc:
        raise ModelFolderError(f"{path}: cannot be read ({exc.strerror})") from exc
