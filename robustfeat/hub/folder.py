"""The model folder: one layout for training to write, the Hub to move and serving to read.

    config.json  model.safetensors  onnx/model.onnx  onnx/model_int8.onnx
    golden/  preprocessor_config.json  training.json  README.md

`onnx/model_fp16.onnx` may lie there, too. Without it, fp16 is converted from fp32 when it is loaded.
In a compact folder (such as the built-in one) `model.onnx` lies beside `model.safetensors` and keeps its weights in it.
A folder without `model.safetensors` has its weights in `onnx/model.onnx` alone. Folders in the layout of Optimum and
transformers.js (`onnx_layout`) are read as they are.
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
TRAINING = "training.json"
PREPROCESSOR = "preprocessor_config.json"
ONNX = {"fp32": "onnx/model.onnx", "fp16": "onnx/model_fp16.onnx", "int8": "onnx/model_int8.onnx"}
COMPACT_ONNX = "model.onnx"
GOLDEN_FEATURES = "golden/features.npy"

_PICKLES = {".bin", ".ckpt", ".dill", ".h5", ".joblib", ".keras", ".mar", ".pickle", ".pkl", ".pt", ".pt2", ".pth"}
_PROGRAMS = {".bat", ".dll", ".dylib", ".exe", ".ipynb", ".jar", ".js", ".ps1", ".py", ".pyc", ".pyd", ".sh", ".so"}


def weights_sha256(files: Mapping[str, str]) -> str:
    """The hash that stands for a model's weights, from the hashes of its files.

    It is that of model.safetensors, or else of the fp32 ONNX file (or the first precision that is there); empty where
    there is neither. Weights in files beside an ONNX file count, too.
    """
    if WEIGHTS in files:
        return files[WEIGHTS]
    network = next((name for precision in ONNX if (name := find_network(files, precision))), None)
    if network is None:
        return ""
    beside = [files[name] for name in external_names(files, network)]
    return hashlib.sha256("".join([files[network], *beside]).encode()).hexdigest() if beside else files[network]


def holds_code(name: str) -> bool:
    """Whether a file's name is that of a pickle or of code: what a model folder never needs."""
    return any(suffix.lower() in _PICKLES | _PROGRAMS for suffix in PurePosixPath(name).suffixes)


class ModelFolder:
    """A model folder that was opened: its config is valid, its files are there, and nothing in it is code.

    In the layout of Optimum and transformers.js, the files that are used get their hashes here. Other files, which may
    be pickles or code there, are never opened.

    Args:
        path: the folder.
        config_hash: the `config_hash` that it must have, which pins all files.

    Attributes:
        path: the folder.
        config: what config.json says.
        config_bytes: the content of config.json.
        config_hash: its sha256. config.json lists the hashes of all files; where it is of transformers, the sha256 of
            such a list stands here (see `list_hash`).
        is_own: whether it is a folder of ours, with golden images, rather than one of transformers.
        source: what a user types to get it: `builtin`, a path, or ORG/NAME on the Hub.
        revision, access: the commit on the Hub, and which Hub, as whom; None for other folders.

    Raises:
        ModelFolderError: the folder or a file is missing, config.json is of another kind or of a newer format, or a
            pickle or code lies in a folder of ours.
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
                f"{self.path}: not a model folder ({reason}); expected builtin, ORG/NAME on the Hub, or what "
                "robustfeat export, robustfeat import or Optimum makes"
            )
        try:
            self.config_bytes = file.read_bytes()
            data = json.loads(self.config_bytes)
        except (OSError, ValueError, RecursionError) as exc:
            raise ModelFolderError(f"{file}: not valid JSON ({first_line(exc)})", fix=self._remedy) from exc
        if config_hash is not None and not re.fullmatch("(sha256:)?[0-9a-fA-F]{64}", config_hash):
            raise ModelFolderError(
                f"{config_hash!r} is no config hash, which has 64 hex digits", fix="copy it from robustfeat info"
            )
        self._hashes: Mapping[str, str] = {}
        self.is_own = not is_onnx_layout(data)
        if self.is_own:
            self._open_own(data, config_hash)
        else:
            self._open_onnx_layout(data, config_hash)

    def _open_own(self, data: Any, config_hash: str | None) -> None:
        """Reads our own config.json, and refuses a folder that is incomplete or holds code."""
        file = self.path / CONFIG
        self._pin(hashlib.sha256(self.config_bytes).hexdigest(), config_hash)
        self.config = ModelConfig.from_dict(data, str(file))
        self._hashes = self.config.files
        for name in self.config.files:
            path_parts = PurePosixPath(name).parts
            plain = path_parts and "/".join(path_parts) == name and not {"..", "/"} & set(path_parts)
            if not plain or "\\" in name or "\0" in name:
                raise ModelFolderError(
                    f"{file}: lists {name!r}, which lies outside the folder", fix="do not use this model"
                )
            if name in {CONFIG, CARD}:
                raise ModelFolderError(f"{file}: lists {name!r} among the files that it vouches for", fix=self._remedy)
        self._require_files()
        self._refuse_code()
        self._check_preprocessor()

    def _open_onnx_layout(self, data: Mapping[str, Any], config_hash: str | None) -> None:
        """Reads a config.json of transformers and how it prepares images, once the hashes of its files are known."""
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
        """The hashes of the files that are used of a model of transformers, by their names."""
        names = ModelFolder.names_beside(self)
        refuse_without_network(data, names, str(self.path), str(self.path))
        return {name: file_sha256(self.path / name) for name in used_names(names)}

    def _pin(self, found: str, wanted: str | None) -> None:
        self.config_hash = found
        if wanted is not None and found != wanted.lower().removeprefix("sha256:"):
            raise ModelFolderError(
                f"{self.path / CONFIG}: the sha256 must be {wanted[:12]}..., got {found[:12]}...: not the model that "
                "was asked for",
                fix="check the name and the revision",
            )

    def _refuse_code(self) -> None:
        present = (entry.relative_to(self.path).as_posix() for entry in sorted(self.path.rglob("*")))
        # The folders of git and of the Hub's client, which no library loads models from, are their own affair.
        theirs = (".git/", ".cache/")
        refuse_code([*self.config.files, *(name for name in present if not name.startswith(theirs))], str(self.path))

    @property
    def _place(self) -> str | Path:
        """Names the model in messages."""
        return self.path

    @property
    def version(self) -> str:
        """Its commit on the Hub, or else the start of its weights' hash."""
        return self.revision or weights_sha256(self.config.files)[:12]

    @property
    def precisions(self) -> list[str]:
        """What the folder holds ONNX files for; fp16 is also made from fp32."""
        return [precision for precision in ONNX if self._find_onnx(precision)]

    @property
    def compact(self) -> bool:
        """Whether model.onnx keeps its weights in model.safetensors."""
        return COMPACT_ONNX in self.config.files

    @property
    def present(self) -> list[str]:
        """The listed files that are here: all of them, but for a model on the Hub, whose files come as needed."""
        return [name for name in self._hashes if (self.path / name).is_file()]

    @property
    def absent(self) -> list[str]:
        """Those that are not."""
        return [name for name in self._hashes if not (self.path / name).is_file()]

    def onnx(self, precision: str) -> Path:
        """The ONNX file of that precision, for other programs, its hash and that of its external weights verified.

        Raises:
            ModelFolderError: there is none, or it was altered.
        """
        name = self._onnx_name(precision)
        self.verify([name, WEIGHTS] if name == COMPACT_ONNX else [name])
        return self.path / name

    def read_onnx(self, precision: str) -> bytes:
        """The network of that precision as one ONNX file, all of it verified, weights that lie in other files included.

        Engines get these bytes and open no file, so that whatever is replaced meanwhile is not run. fp16 is converted
        from fp32 where the folder has no file for it; its inputs and outputs are float32 in both cases.

        Raises:
            ModelFolderError: there is none, it was altered, or it keeps weights in a file that config.json does not
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
        """The golden images' bytes and the (n, D) float32 features that this model must give for them."""
        names = sorted(name for name in self.config.files if name.startswith("golden/") and name != GOLDEN_FEATURES)
        content = self.read(GOLDEN_FEATURES)
        try:
            features: NDArray[np.float32] = np.load(io.BytesIO(content), allow_pickle=False)
        except Exception as exc:  # NumPy reads the header as Python's text: what is raised has no common base
            raise ModelFolderError(f"{self.path / GOLDEN_FEATURES}: not an array ({first_line(exc)})") from exc
        shape = getattr(features, "shape", "an archive of arrays")
        if not names or shape != (len(names), self.config.feature_size):
            raise ModelFolderError(
                f"{self.path / GOLDEN_FEATURES}: must be {(len(names), self.config.feature_size)}; "
                f"got {shape}; export the model again"
            )
        return [self.read(name) for name in names], features

    def read(self, name: str) -> bytes:
        """The content of a listed file, whose sha256 is that in config.json.

        What is used is read by this alone: a file may be replaced after it was verified.

        Raises:
            ModelFolderError: it is not listed, cannot be read, or differs.
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
        """All files of a folder in the layout of transformers.js, those of its text tower among them."""
        return [entry.relative_to(self.path).as_posix() for entry in self.path.rglob("*") if entry.is_file()]

    def read_beside(self, name: str) -> bytes:
        """The content of one of `names_beside`, whose hash is no part of `config_hash`.

        Raises:
            ModelFolderError: it cannot be read.
        """
        try:
            return (self.path / name).read_bytes()
        except OSError as exc:
            raise ModelFolderError(f"{self.path / name}: cannot be read ({exc.strerror})") from exc

    def verify(self, names: Iterable[str] | None = None) -> None:
        """Compares the files' sha256 with config.json; all of them by default.

        Raises:
            ModelFolderError: naming the first file that differs.
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
                f"{self.path}: {name} is not one of the files that are used of such a folder",
                fix="import the ONNX file, which takes its weights in (robustfeat import)",
            )

    def _compare(self, name: str, actual: str) -> None:
        expected = self._hashes[name]
        if actual != expected:
            raise ModelFolderError(
                f"{self.path / name}: altered or truncated (sha256 must be {expected[:12]}..., got {actual[:12]}...)",
                fix=self._remedy,
            )

    def fetch(self, names: Sequence[str]) -> None:
        """Sees to it that these files are here. They always are in a folder of one's own."""

    def size_bytes(self) -> int:
        """Bytes of the listed files that are here."""
        return sum((self.path / name).stat().st_size for name in self.present)

    def _require_files(self) -> None:
        for name in self.absent:
            raise ModelFolderError(f"{self.path}: {name} is missing", fix=self._remedy)

    def _check_preprocessor(self) -> None:
        """Other libraries read this file; what names code in it is theirs to run, and ours to refuse."""
        file = self.path / PREPROCESSOR
        if not file.is_file():
            return
        try:
            data = json.loads(file.read_bytes())
        except (OSError, ValueError, RecursionError) as exc:
            raise ModelFolderError(f"{file}: not valid JSON ({first_line(exc)})", fix=self._remedy) from exc
        if found := sorted(CODE_ENTRIES & set(data if isinstance(data, dict) else ())):
            raise ModelFolderError(
                f"{file}: the entry {found[0]!r} names code to run", fix="do not use this model, or remove it"
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
    """What pins a model of transformers: the sha256 of a list of its files' hashes, config.json included.

    The list is a JSON object from names to hashes in the order of the names, without spaces.
    """
    hashes = {**files, CONFIG: hashlib.sha256(config).hexdigest()}
    return hashlib.sha256(json.dumps(hashes, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def refuse_code(names: Iterable[str], place: str) -> None:
    """Refuses a folder of ours with a pickle or code in it, whoever put it there.

    Raises:
        ModelFolderError: naming the first such file.
    """
    for name in names:
        if holds_code(name):
            raise ModelFolderError(
                f"{place}: holds {name}, which may run code when it is loaded; a model folder has no pickle and no "
                "code",
                fix="remove the file, or do not use this model",
            )


def seal_folder(path: Path, config: ModelConfig, card: str) -> ModelFolder:
    """Writes the card and config.json with the sha256 of every other file in `path`, and opens the result."""
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
    """64 hex digits."""
    try:
        with open(path, "rb") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()
    except OSError as exc:
        raise ModelFolderError(f"{path}: cannot be read ({exc.strerror})") from exc
