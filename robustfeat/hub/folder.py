"""The model folder, which training writes, the Hub moves and serving reads.

    config.json  model.safetensors  onnx/model.onnx  onnx/model_int8.onnx
    golden/  preprocessor_config.json  training.json  README.md

`classifier.safetensors` holds the classifier of the features where these are principal components, since the last
layer of `model.safetensors` is then the projection. `onnx/model_fp16.onnx` is optional. Without it, fp16 is converted
from fp32 at load time. In a compact folder, such as the built-in model, `model.onnx` lies beside `model.safetensors`
and takes its weights from it. Without `model.safetensors`, only `onnx/model.onnx` has the weights. Folders in the
layout of Optimum and transformers.js (`onnx_layout`) are read as they are.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import posixpath
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robustfeat.errors import EngineError, ModelFolderError, first_line
from robustfeat.hub.config import CODE_ENTRIES, ModelConfig
from robustfeat.hub.external_data import inline_external_data
from robustfeat.hub.float16 import convert_to_float16, with_float32_ends
from robustfeat.hub.onnx_layout import (
    PROCESSORS,
    external_names,
    find_network,
    is_onnx_layout,
    read_onnx_layout,
    refuse_without_network,
    used_names,
)
from robustfeat.hub.remote import HubAccess

__all__ = ["ModelFolder", "file_sha256", "holds_code", "seal_folder", "weights_sha256"]

CONFIG = "config.json"
CARD = "README.md"
WEIGHTS = "model.safetensors"
CLASSIFIER = "classifier.safetensors"
TRAINING = "training.json"
PREPROCESSOR = "preprocessor_config.json"
ONNX = {"fp32": "onnx/model.onnx", "fp16": "onnx/model_fp16.onnx", "int8": "onnx/model_int8.onnx"}
COMPACT_ONNX = "model.onnx"
GOLDEN_FEATURES = "golden/features.npy"

_PICKLES = {".bin", ".ckpt", ".dill", ".h5", ".joblib", ".keras", ".mar", ".pickle", ".pkl", ".pt", ".pt2", ".pth"}
_PROGRAMS = {".bat", ".dll", ".dylib", ".exe", ".ipynb", ".jar", ".js", ".ps1", ".py", ".pyc", ".pyd", ".sh", ".so"}


def weights_sha256(files: Mapping[str, str]) -> str:
    """A hash that identifies a model's weights, from the hashes of its files.

    It is the hash of model.safetensors, else of the fp32 ONNX file, else of the first precision. It covers the external
    data of an ONNX file. Without any weights it is empty.
    """
    if WEIGHTS in files:
        return files[WEIGHTS]
    network = next((name for precision in ONNX if (name := find_network(files, precision))), None)
    if network is None:
        return ""
    beside = [files[name] for name in external_names(files, network)]
    return hashlib.sha256("".join([files[network], *beside]).encode()).hexdigest() if beside else files[network]


def holds_code(name: str) -> bool:
    """Whether a file is a pickle or code by its name. A model folder never needs one."""
    return any(suffix.lower() in _PICKLES | _PROGRAMS for suffix in PurePosixPath(name).suffixes)


class ModelFolder:
    """An open model folder, with a valid config, all its files, and no code.

    In the layout of Optimum and transformers.js, the hashes of used files are computed here. Other files there may be
    pickles or code, and are never opened.

    Args:
        path: the folder.
        config_hash: the expected `config_hash`, which pins all files.

    Attributes:
        path: the folder.
        config: the parsed config.json.
        config_bytes: the content of config.json.
        config_hash: the sha256 of config.json, which lists the hashes of all files. For a transformers model it is the
            sha256 of such a list (see `list_hash`).
        is_own: whether the folder has robustfeat's layout and golden images, or else the layout of transformers.
        source: the argument that names the model: `builtin`, a path, or ORG/NAME on the Hub.
        revision, access: the commit on the Hub, and the Hub with the credentials; None for local folders.

    Raises:
        ModelFolderError: the folder or a file is missing, config.json is of another kind or format version, or a folder
            in robustfeat's layout contains a pickle or code.
    """

    source: str
    revision: str | None = None
    access: HubAccess | None = None
    _remedy = "copy or export the model again"

    def __init__(self, path: str | Path, *, config_hash: str | None = None) -> None:
        self.path = Path(path)
        self.source = os.fspath(self.path.absolute())
        file = self.path / CONFIG
        if not file.is_file():
            reason = f"no {CONFIG}" if self.path.is_dir() else "a file" if self.path.exists() else "no such folder"
            raise ModelFolderError(
                f"{self.path}: not a model folder ({reason}); expected builtin, ORG/NAME on the Hub, or a folder from "
                "robustfeat export, robustfeat import or Optimum"
            )
        try:
            self.config_bytes = file.read_bytes()
            data = json.loads(self.config_bytes)
        except (OSError, ValueError, RecursionError) as exc:
            raise ModelFolderError(f"{file}: not valid JSON ({first_line(exc)})", fix=self._remedy) from exc
        if config_hash is not None and not re.fullmatch("(sha256:)?[0-9a-fA-F]{64}", config_hash):
            raise ModelFolderError(
                f"a config hash has 64 hex digits; got {config_hash!r}", fix="copy it from robustfeat info"
            )
        self._hashes: Mapping[str, str] = {}
        self.is_own = not is_onnx_layout(data)
        if self.is_own:
            self._open_own(data, config_hash)
        else:
            self._open_onnx_layout(data, config_hash)

    def _open_own(self, data: Any, config_hash: str | None) -> None:
        """Reads robustfeat's config.json and refuses an incomplete folder or one with code."""
        file = self.path / CONFIG
        self._pin(hashlib.sha256(self.config_bytes).hexdigest(), config_hash)
        self.config = ModelConfig.from_dict(data, str(file))
        self._hashes = self.config.files
        for name in self.config.files:
            path_parts = PurePosixPath(name).parts
            plain = path_parts and "/".join(path_parts) == name and not {"..", "/"} & set(path_parts)
            if not plain or "\\" in name or "\0" in name:
                raise ModelFolderError(
                    f"{file}: lists {name!r}, which is outside the folder", fix="do not use this model"
                )
            if name in {CONFIG, CARD}:
                raise ModelFolderError(f"{file}: lists {name!r}, which cannot have a hash there", fix=self._remedy)
        self._require_files()
        self._refuse_code()
        self._check_preprocessor()

    def _open_onnx_layout(self, data: Mapping[str, Any], config_hash: str | None) -> None:
        """Reads the config.json and the image processor of transformers, after hashing the files."""
        self._hashes = self._list_files(data)
        self._pin(list_hash(self.config_bytes, self._hashes), config_hash)
        file = next(name for name in PROCESSORS if name in self._hashes)
        try:
            processor = json.loads(self.read(file))
        except (ValueError, RecursionError) as exc:
            raise ModelFolderError(f"{self.path / file}: not valid JSON ({first_line(exc)})", fix=self._remedy) from exc
        if not isinstance(processor, dict):
            raise ModelFolderError(f"{self.path / file}: must be an object", fix=self._remedy)
        weights = weights_sha256(self._hashes)
        self.config = read_onnx_layout(data, processor, self._hashes, weights, str(self._place))

    def _list_files(self, data: Mapping[str, Any]) -> dict[str, str]:
        """Hashes of the used files of a transformers model, by name."""
        names = ModelFolder.names_beside(self)
        refuse_without_network(data, names, str(self.path), str(self.path))
        return {name: file_sha256(self.path / name) for name in used_names(names)}

    def _pin(self, found: str, wanted: str | None) -> None:
        self.config_hash = found
        if wanted is not None and found != wanted.lower().removeprefix("sha256:"):
            raise ModelFolderError(
                f"{self.path / CONFIG}: the sha256 must be {wanted[:12]}..., got {found[:12]}...: not the requested "
                "model",
                fix="check the name and the revision",
            )

    def _refuse_code(self) -> None:
        present = (entry.relative_to(self.path).as_posix() for entry in sorted(self.path.rglob("*")))
        # No library loads models from the folders of git and of the Hub's client.
        theirs = (".git/", ".cache/")
        refuse_code([*self.config.files, *(name for name in present if not name.startswith(theirs))], str(self.path))

    @property
    def _place(self) -> str | Path:
        """The model's name in messages."""
        return self.path

    @property
    def version(self) -> str:
        """The commit on the Hub, or else the start of the weights' hash."""
        return self.revision or weights_sha256(self.config.files)[:12]

    @property
    def precisions(self) -> list[str]:
        """Precisions with an ONNX file. fp16 can also be converted from fp32."""
        return [precision for precision in ONNX if self._find_onnx(precision)]

    @property
    def compact(self) -> bool:
        """Whether model.onnx keeps its weights in model.safetensors."""
        return COMPACT_ONNX in self.config.files

    @property
    def present(self) -> list[str]:
        """The listed files that exist. A model on the Hub downloads its files on demand; other folders have all."""
        return [name for name in self._hashes if (self.path / name).is_file()]

    @property
    def absent(self) -> list[str]:
        """The listed files that are not downloaded yet."""
        return [name for name in self._hashes if not (self.path / name).is_file()]

    def onnx(self, precision: str) -> Path:
        """The path of the ONNX file of a precision, for other programs, after verifying it and its external weights.

        Raises:
            ModelFolderError: the file is missing or was altered.
        """
        name = self._onnx_name(precision)
        self.verify([name, WEIGHTS] if name == COMPACT_ONNX else [name])
        return self.path / name

    def read_onnx(self, precision: str) -> bytes:
        """Reads and verifies the network of a precision as one ONNX file with all its weights.

        Engines get these bytes and open no file, so a file that is replaced later does not run. fp16 is converted from
        fp32 if the folder has no fp16 file. Inputs and outputs are always float32.

        Raises:
            ModelFolderError: the file is missing, was altered, or keeps weights in a file that config.json does not
                list.
            EngineError: the network cannot be converted to fp16.
        """
        if precision == "fp16" and self._find_onnx(precision) is None:
            content = self.read_onnx("fp32")
            try:
                return convert_to_float16(content)
            except ValueError as exc:
                raise EngineError(f"{self.path}: cannot run in fp16 ({exc})", fix="pass `precision=fp32`") from exc
        name = self._onnx_name(precision)
        try:
            content = inline_external_data(
                self.read(name),
                lambda place: self.read(posixpath.normpath(posixpath.join(posixpath.dirname(name), place))),
            )
            return with_float32_ends(content) if precision == "fp16" else content
        except ValueError as exc:
            raise ModelFolderError(f"{self.path / name}: cannot be used ({exc})", fix=self._remedy) from exc

    def golden(self) -> tuple[list[bytes], NDArray[np.float32]]:
        """The golden images' bytes, and their features, (n, D) float32, which this model must reproduce."""
        names = sorted(name for name in self.config.files if name.startswith("golden/") and name != GOLDEN_FEATURES)
        content = self.read(GOLDEN_FEATURES)
        try:
            features: NDArray[np.float32] = np.load(io.BytesIO(content), allow_pickle=False)
        except Exception as exc:  # NumPy parses the header as Python source, so errors have no common base
            raise ModelFolderError(f"{self.path / GOLDEN_FEATURES}: not an array ({first_line(exc)})") from exc
        shape = getattr(features, "shape", "an archive of arrays")
        if not names or shape != (len(names), self.config.feature_size):
            raise ModelFolderError(
                f"{self.path / GOLDEN_FEATURES}: must be {(len(names), self.config.feature_size)}; "
                f"got {shape}; export the model again"
            )
        return [self.read(name) for name in names], features

    def read(self, name: str) -> bytes:
        """Reads a listed file and verifies its sha256.

        All used files are read here, since a file may be replaced after `verify`.

        Raises:
            ModelFolderError: the file is not listed, cannot be read, or has another hash.
        """
        self._require_listed(name)
        self.fetch([name])
        try:
            content = (self.path / name).read_bytes()
        except OSError as exc:
            raise ModelFolderError(f"{self.path / name}: cannot be read ({exc.strerror})") from exc
        self._compare(name, hashlib.sha256(content).hexdigest())
        return content

    def names_beside(self) -> list[str]:
        """All files of a folder in the layout of transformers.js, including its text tower's."""
        return [entry.relative_to(self.path).as_posix() for entry in self.path.rglob("*") if entry.is_file()]

    def read_beside(self, name: str) -> bytes:
        """Reads one of `names_beside`, whose hash is not part of `config_hash`.

        Raises:
            ModelFolderError: the file cannot be read.
        """
        try:
            return (self.path / name).read_bytes()
        except OSError as exc:
            raise ModelFolderError(f"{self.path / name}: cannot be read ({exc.strerror})") from exc

    def verify(self, names: Iterable[str] | None = None) -> None:
        """Compares files' sha256 with config.json; by default all files.

        Raises:
            ModelFolderError: a file differs. The message names the first one.
        """
        chosen = list(self._hashes if names is None else names)
        for name in chosen:
            self._require_listed(name)
        self.fetch(chosen)
        for name in chosen:
            self._compare(name, file_sha256(self.path / name))
        if PREPROCESSOR in chosen and self.is_own:
            self._check_preprocessor()

    def _require_listed(self, name: str) -> None:
        if name == WEIGHTS and name not in self._hashes:
            raise ModelFolderError(
                f"{self.path}: has no weights for PyTorch ({WEIGHTS}), only the ONNX network",
                fix="use a model that has both",
            )
        if name not in self._hashes:
            if self.is_own:
                raise ModelFolderError(f"{self.path}: {name} is not listed in {CONFIG}", fix=self._remedy)
            raise ModelFolderError(
                f"{self.path}: {name} is not a file that robustfeat uses in this layout",
                fix="import the ONNX file with its weights (robustfeat import)",
            )

    def _compare(self, name: str, actual: str) -> None:
        expected = self._hashes[name]
        if actual != expected:
            raise ModelFolderError(
                f"{self.path / name}: altered or truncated (sha256 must be {expected[:12]}..., got {actual[:12]}...)",
                fix=self._remedy,
            )

    def fetch(self, names: Sequence[str]) -> None:
        """Downloads missing files. A local folder has all of them."""

    def size_bytes(self) -> int:
        """Size of the listed files that exist, in bytes."""
        return sum((self.path / name).stat().st_size for name in self.present)

    def _require_files(self) -> None:
        for name in self.absent:
            raise ModelFolderError(f"{self.path}: {name} is missing", fix=self._remedy)

    def _check_preprocessor(self) -> None:
        """Refuses an image processor that names code: other libraries read this file and would run the code."""
        file = self.path / PREPROCESSOR
        if not file.is_file():
            return
        try:
            data = json.loads(file.read_bytes())
        except (OSError, ValueError, RecursionError) as exc:
            raise ModelFolderError(f"{file}: not valid JSON ({first_line(exc)})", fix=self._remedy) from exc
        if found := sorted(CODE_ENTRIES & set(data if isinstance(data, dict) else ())):
            raise ModelFolderError(
                f"{file}: the entry {found[0]!r} names code to run", fix="do not use this model, or remove the entry"
            )

    def _onnx_name(self, precision: str) -> str:
        name = self._find_onnx(precision)
        if name is None:
            raise ModelFolderError(
                f"{self.path}: has no {precision} model; it has {', '.join(self.precisions) or 'no ONNX file at all'}"
            )
        return name

    def _find_onnx(self, precision: str) -> str | None:
        if precision not in ONNX:
            raise ModelFolderError(f"precision must be {' or '.join(ONNX)}; got {precision!r}")
        if not self.is_own:
            return find_network(self._hashes, precision)
        names = [ONNX[precision], *([COMPACT_ONNX] if precision == "fp32" else [])]
        return next((name for name in names if name in self.config.files), None)


def list_hash(config: bytes, files: Mapping[str, str]) -> str:
    """The sha256 that pins a transformers model: of the list of its files' hashes, including config.json.

    The list is a JSON object from names to hashes, sorted by name, without spaces.
    """
    hashes = {**files, CONFIG: hashlib.sha256(config).hexdigest()}
    return hashlib.sha256(json.dumps(hashes, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def refuse_code(names: Iterable[str], place: str) -> None:
    """Refuses a folder in robustfeat's layout that contains a pickle or code.

    Raises:
        ModelFolderError: the folder contains one. The message names the first.
    """
    for name in names:
        if holds_code(name):
            raise ModelFolderError(
                f"{place}: contains {name}, which may run code when loaded; a model folder has no pickle and no code",
                fix="remove the file, or do not use this model",
            )


def seal_folder(path: Path, config: ModelConfig, card: str) -> ModelFolder:
    """Writes the card, and config.json with the sha256 of all other files in `path`. Opens the result."""
    files = {
        file.relative_to(path).as_posix(): file_sha256(file)
        for file in sorted(path.rglob("*"))
        if file.is_file() and file.relative_to(path).as_posix() not in {CONFIG, CARD}
    }
    (path / CARD).write_text(card, "utf-8")
    sealed = config.replace(files=files, card_sha256=hashlib.sha256(card.encode()).hexdigest())
    text = json.dumps(sealed.to_dict(), indent=2, ensure_ascii=False)
    (path / CONFIG).write_text(text + "\n", "utf-8")
    return ModelFolder(path)


def file_sha256(path: Path) -> str:
    """The sha256 of a file, 64 hex digits."""
    try:
        with open(path, "rb") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()
    except OSError as exc:
        raise ModelFolderError(f"{path}: cannot be read ({exc.strerror})") from exc
