"""Writes a model archive and a config.properties for TorchServe.

The archive (.mar, a zip) contains the model folder, this package's code, the worker's settings, and a list of required
libraries. TorchServe's own archiver is not used, since it first empties a folder of the model's name in the system's
temporary folder.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import robustfeat
from robustfeat.errors import InputError
from robustfeat.files import FileLock, new_file
from robustfeat.hub.folder import CARD, CONFIG, ModelFolder
from robustfeat.serving.engines.options import BUILD_LIMIT_S
from robustfeat.serving.extractor import default_batch_size
from robustfeat.serving.torchserve.handler import MODEL_FOLDER, SETTINGS, Settings

__all__ = ["KEYS", "PROPERTIES", "Addresses", "check_name", "claim_store", "write_archive", "write_properties"]

PROPERTIES = "config.properties"
KEYS = "key_file.json"
"""File of TorchServe's tokens, in the folder that it is started in."""

_ENTRY = "robustfeat_handler.py"
_WORKER_CONFIG = "model-config.yaml"
_REQUIREMENTS = "requirements.txt"
_MARK = "# Written by robustfeat torchserve, which replaces it as long as it begins with this line."
_LEFT_OUT = ("cli/", "doctor.py", "hub/builtin/", "training/", "trial.py")
_SAMPLES = "hub/builtin/golden"
_NEEDED = ("numpy", "orjson", "pillow", "pydantic", "pyyaml")
_RETRY_S = 60
_SOCKETS = 1000
_GRACE_S = 10
_JSON_NUMBER = 16
_MIB = 2**20
_MOST = 2**31 - 1


@contextmanager
def claim_store(out: Path) -> Iterator[None]:
    """Creates the model store, and locks it until the block ends.

    Raises:
        InputError: the store cannot be created, another process writes to it or runs TorchServe on it, or another
            program wrote its config.properties.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = FileLock(out)
        taken = lock.take()
    except OSError as exc:
        raise InputError(f"{out}: cannot be created ({exc.strerror})", fix="choose another folder") from exc
    if not taken:
        raise InputError(
            f"{out}: another robustfeat torchserve uses it{lock.holder_note()}",
            fix="stop it, or choose another folder",
        )
    try:
        _require_ours(out / PROPERTIES)
        yield
    finally:
        lock.release()


def _require_ours(file: Path) -> None:
    try:
        foreign = file.exists() and not file.read_text("utf-8", "replace").startswith(_MARK)
    except OSError as exc:
        raise InputError(f"{file}: cannot be read ({exc.strerror})", fix="choose another folder") from exc
    if foreign:
        raise InputError(f"{file}: was not written by robustfeat torchserve", fix="move it, or choose another folder")


def check_name(name: str) -> str:
    """Checks a name for a served model.

    Raises:
        InputError: TorchServe cannot serve a model under this name.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,95}", name):
        raise InputError(
            "expected letters, digits, '.', '_' and '-', a letter or digit first", argument="name", value=name
        )
    return name


def write_archive(
    folder: ModelFolder, out: Path, name: str, settings: Settings, *, batch_size: int | None, delay_ms: int
) -> Path:
    """Writes `out`/`name`.mar, and replaces an existing one.

    Args:
        folder: the model. Its files are downloaded if needed, and verified.
        out: TorchServe's model store, an existing folder.
        name: name of the served model.
        settings: settings of its workers.
        batch_size: most requests per batch; None for a default by the model.
        delay_ms: longest wait of the first request for others.

    Raises:
        ModelFolderError: the model is damaged or lacks the precision.
        InputError: the file system refuses.
    """
    folder.verify()
    folder.read_onnx(settings.options.stored_precision)
    side = folder.config.preprocessing.image_size
    manifest = {
        "createdOn": datetime.now(UTC).strftime("%d/%m/%Y %H:%M:%S"),
        "runtime": "python",
        "model": {
            "modelName": name,
            "handler": f"{_ENTRY}:handle",
            "modelVersion": folder.version,
            "requirementsFile": _REQUIREMENTS,
            "configFile": _WORKER_CONFIG,
        },
        "archiverVersion": robustfeat.__version__,
    }
    config = {
        "minWorkers": settings.workers,
        "maxWorkers": settings.workers,
        "batchSize": batch_size or default_batch_size(side, "cuda" if settings.options.requires_gpu else "cpu"),
        "maxBatchDelay": delay_ms,
        # A worker reports a timeout itself. TorchServe replaces a worker that does not even do that.
        "responseTimeout": round(settings.timeout_s) + _GRACE_S,
        "maxRetryTimeoutInSec": _RETRY_S,
        # By default, TorchServe gives a worker two minutes.
        **({"startupTimeout": BUILD_LIMIT_S} if settings.options.engine == "tensorrt" else {}),
        "deviceType": "gpu" if settings.options.requires_gpu else "cpu",
        SETTINGS: dataclasses.asdict(settings),
    }
    archive = out / f"{name}.mar"
    # Store without compression: weights hardly shrink, and a worker starts only after unpacking.
    with new_file(archive) as partial, zipfile.ZipFile(partial, "w", strict_timestamps=False) as mar:
        mar.writestr("MAR-INF/MANIFEST.json", json.dumps(manifest, indent=2))
        mar.writestr(_WORKER_CONFIG, json.dumps(config, indent=2))  # JSON is valid YAML
        mar.writestr(_REQUIREMENTS, "".join(f"{line}\n" for line in requirements(settings)))
        mar.writestr(_ENTRY, "from robustfeat.serving.torchserve.handler import handle\n")
        for file, place in _package_files(folder):
            mar.write(file, place)
        mar.writestr(f"{MODEL_FOLDER}/{CONFIG}", folder.config_bytes)
        for entry in folder.config.files:
            mar.writestr(f"{MODEL_FOLDER}/{entry}", folder.read(entry))
        if (folder.path / CARD).is_file():
            mar.write(folder.path / CARD, f"{MODEL_FOLDER}/{CARD}")
    return archive


def requirements(settings: Settings) -> list[str]:
    """The libraries that a worker needs, as in this package's requirements."""
    options = settings.options
    engines = ["onnxruntime-gpu"] if options.requires_gpu else [options.engine]
    if options.engine == "tensorrt":
        engines += ["tensorrt-cu13-libs", "huggingface_hub"]  # huggingface_hub locates the cache
    own: list[str] = []
    with suppress(importlib.metadata.PackageNotFoundError):  # the package may not be installed
        own = importlib.metadata.requires("robustfeat") or []
    lines = {re.match(r"[\w.-]+", line)[0].lower(): line.partition(";")[0].strip() for line in own}  # type: ignore[index]
    return [lines.get(name, name) for name in (*_NEEDED, *engines)]


def _package_files(folder: ModelFolder) -> Iterator[tuple[Path, str]]:
    """Files of this package that a worker may need, with their places in the archive.

    They are modules, and the images that check a model without golden images.
    """
    package = Path(robustfeat.__file__).parent
    images = () if folder.is_own else package.joinpath(_SAMPLES).iterdir()
    for file in sorted((*package.rglob("*.py"), *images)):
        place = file.relative_to(package).as_posix()
        if not place.startswith(_LEFT_OUT) or place.startswith(_SAMPLES):
            yield file, f"robustfeat/{place}"


@dataclass(frozen=True)
class Addresses:
    """The addresses on which TorchServe listens, on five consecutive ports.

    Attributes:
        host: host of inference and metrics, a name or an IPv4 address, since TorchServe supports no others. Management
            and gRPC only listen on this machine.
        port: port of inference, the first.

    Raises:
        InputError: the host is invalid.
    """

    host: str
    port: int

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.-]*", self.host):
            raise InputError(
                "expected a host name or an IPv4 address; TorchServe takes no other", argument="host", value=self.host
            )

    @property
    def url(self) -> str:
        """The URL of `host`, without a port."""
        return f"http://{self.host}"

    @property
    def management(self) -> int:
        """HTTP."""
        return self.port + 1

    @property
    def metrics(self) -> int:
        """HTTP."""
        return self.port + 2

    @property
    def grpc(self) -> tuple[int, int]:
        """The gRPC ports of inference and management."""
        return self.port + 3, self.port + 4

    @property
    def all(self) -> list[tuple[str, int]]:
        """All hosts and ports."""
        own = "127.0.0.1"
        return [
            (self.host, self.port),
            (own, self.management),
            (self.host, self.metrics),
            *((own, port) for port in self.grpc),
        ]


def write_properties(
    folder: ModelFolder, out: Path, name: str, settings: Settings, *, addresses: Addresses, token_minutes: int
) -> Path:
    """Writes `out`/config.properties.

    Args:
        folder: the model.
        out: TorchServe's model store, an existing folder.
        name: name of the archive to load.
        settings: settings of its workers.
        addresses: the addresses to listen on.
        token_minutes: lifetime of the tokens in key_file.json.

    Raises:
        InputError: the file system refuses.
    """
    file = out / PROPERTIES
    # A larger response would end the worker. JSON is the longest format.
    largest = settings.max_items * (folder.config.feature_size * _JSON_NUMBER + 1000)
    text = f"""{_MARK}
# This file names no path, so the folder may be moved. Start TorchServe in the folder:
#     torchserve --start --foreground --ncs --ts-config {PROPERTIES} --model-store .

load_models={name}.mar

# Clients send the token of key_file.json, which TorchServe writes where it is started, readable only for its user:
#     Authorization: Bearer KEY
# The tokens are valid for {token_minutes} minutes. The key named API gets new ones from the management address, at
# /token?type=inference and /token?type=management.
disable_token_authorization=false
token_expiration_min={token_minutes}

# TorchServe neither registers nor downloads models while it runs.
enable_model_api=false
allowed_urls=
install_py_dep_per_model=false

inference_address={addresses.url}:{addresses.port}
# Prometheus reads /metrics there, without a token.
metrics_address={addresses.url}:{addresses.metrics}
metrics_mode=prometheus
model_metrics_auto_detect=true
# Management and gRPC only answer this machine.
management_address=http://127.0.0.1:{addresses.management}
grpc_inference_address=127.0.0.1
grpc_inference_port={addresses.grpc[0]}
grpc_management_address=127.0.0.1
grpc_management_port={addresses.grpc[1]}

# /v2/models/{name}/infer, /v2/health/live and /v2/health/ready.
ts_open_inference_protocol=true
# The worker reads JSON itself, within limits.
decode_input_request=false
max_request_size={settings.max_body_bytes}
max_response_size={min(_MOST, max(largest, 32 * _MIB))}
job_queue_size=256

# Sockets of the workers. Two TorchServes with the same temporary folder need different numbers.
initial_worker_port={addresses.port + _SOCKETS}
"""
    with new_file(file) as partial:
        partial.write_text(text, "utf-8")
    return file
