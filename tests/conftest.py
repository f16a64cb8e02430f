"""Real parts, made once a session: a small training set of photographs, a run, and model folders."""

from __future__ import annotations

import atexit
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

from tests.command_server import CommandServer, ForkedCommand
from tests.hub_server import FakeHub, serve_hub

if TYPE_CHECKING:
    from playwright.sync_api import Browser

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples" / "images"

# No test may reach for the Hub: what would download must fail at once.
os.environ["HF_HUB_OFFLINE"] = "1"
# Workers share the cores: PyTorch's idle OpenMP threads must sleep. Spinning, they took eight times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# What is measured once and kept is kept for this session.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="robustfeat-tests-")
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)

FEATURES_META = {
    "model": "digits-v1",
    "revision": None,
    "files": {"model.safetensors": "a" * 64},
    "preprocessing_hash": "b" * 64,
    "precision": "fp32",
    "engine": "onnxruntime",
    "decoding": "exact",
}

# The order of the tests. Long files come first, so that both workers end at the same time.
ORDER = (
    "tests/training/paper/",
    "tests/training/loop/",
    "tests/training/",
    "tests/",
    "tests/deployment/",
    "tests/serving/http/",
    "tests/serving/torchserve/",
    "tests/serving/",
)
# Their tests share a server, which starts once if one worker has them all. Of the others, a file goes to one worker.
SHARING = ("tests/deployment/", "tests/serving/http/", "tests/serving/torchserve/")

WriteFeatures = Callable[..., Path]

Completed = subprocess.CompletedProcess[str]
Run = Callable[..., Completed]
Start = Callable[..., ForkedCommand]


def place(nodeid: str) -> str:
    """The longest prefix in `ORDER` of a test's name."""
    return max(filter(nodeid.startswith, ORDER), key=len)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Orders the tests."""
    items.sort(key=lambda item: ORDER.index(place(item.nodeid)))


class Groups(LoadScopeScheduling):  # type: ignore[misc]  # xdist is not typed
    """Says which tests go to the same worker. Marks of xdist_group say it no more since pytest 9.2 (xdist's #1386)."""

    def _split_scope(self, nodeid: str) -> str:
        return place(nodeid) if place(nodeid) in SHARING else nodeid.partition("::")[0]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> Groups:
    """For `-n`."""
    return Groups(config, log)


Build = Callable[[Path], object]
Share = Callable[[str, Build], Path]


@pytest.fixture(scope="session")
def share(tmp_path_factory: pytest.TempPathFactory) -> Share:
    """`share(name, build)` gives a path that `build` fills, once for all workers of a run."""
    return partial(build_once, shared_folder(tmp_path_factory))


def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of all workers of a run."""
    root = tmp_path_factory.getbasetemp()
    return (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "shared"


def build_once(root: Path, name: str, build: Build) -> Path:
    """`root`/`name`, which exists from now on: `build` makes it, unless another process has done so."""
    target, done = root / name, root / f".{name}.done"
    root.mkdir(parents=True, exist_ok=True)
    with open(root / f".{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            shutil.rmtree(target, ignore_errors=True)
            build(target)
            done.touch()
    return target


@pytest.fixture(scope="session")
def examples() -> Path:
    return EXAMPLES


@pytest.fixture(scope="session")
def example_files() -> list[Path]:
    return sorted(EXAMPLES.rglob("*.jpg"))


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Chromium. Not for a session: while it is open, no other test of the process could run an event loop."""
    from tests.browser import find_browser, open_browser

    if find_browser() is None:
        pytest.skip("needs Chromium")
    with open_browser() as opened:
        yield opened


@pytest.fixture(scope="session")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CommandServer]:
    server = CommandServer(ROOT, shared_folder(tmp_path_factory) / "commands")
    yield server
    server.close()


@pytest.fixture(scope="session")
def robustfeat(commands: CommandServer) -> Run:
    """Runs the command line in a process of its own, which cannot write more than `file_bytes` to a file.

    The process is a fork of one that has imported torch, where its environment allows that.
    """

    def run(*arguments: object, env: Mapping[str, str] | None = None, file_bytes: int | None = None) -> Completed:
        texts = list(map(str, arguments))
        if commands.serves(env):
            return commands.run(texts, env, file_bytes)
        assert file_bytes is None
        command = [sys.executable, "-m", "robustfeat", *texts]
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False, env=env)

    return run


@pytest.fixture(scope="session")
def python(commands: CommandServer) -> Run:
    """Runs `python -c CODE ARGUMENTS` as `robustfeat` runs the command line."""

    def run(code: str, *arguments: object, env: Mapping[str, str] | None = None, cwd: Path = ROOT) -> Completed:
        texts = list(map(str, arguments))
        if commands.serves(env):
            return commands.run(texts, env, code=code, cwd=cwd)
        command = [sys.executable, "-c", code, *texts]
        return subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False, env=env)

    return run


@pytest.fixture(scope="session")
def start(commands: CommandServer) -> Start:
    """Starts the command line as `robustfeat` runs it, in a session of its own."""
    return commands.start


@pytest.fixture(scope="session")
def dataset(share: Share) -> Path:
    """train/ (3 photographs a class) and val/ (1), 10 classes, 40 px, with concepts.csv beside them."""
    return share("dataset", write_dataset)


def write_dataset(root: Path) -> None:
    lines = ["class,concept"]
    for number, folder in enumerate(sorted(EXAMPLES.iterdir())):
        lines.append(f"{folder.name},{'upper' if number % 3 else 'other'}")
        for place, file in enumerate(sorted(folder.glob("*.jpg"))):
            target = root / ("val" if place == 3 else "train") / folder.name / f"{file.stem}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            with Image.open(file) as image:
                image.resize((40, 40)).save(target)
    (root / "concepts.csv").write_text("\n".join(lines) + "\n")


def train_arguments(dataset: Path, out: Path, **options: object) -> list[str]:
    """Arguments of a small, exact run: fp32, 5 steps of 6 images an epoch, a narrow network."""
    width = options.pop("width", 8)
    values: dict[str, object] = {
        "out": out,
        "concepts": dataset / "concepts.csv",
        "epochs": 2,
        "batch-size": 6,
        "image-size": 32,
        "lr": 0.02,
        "workers": 0,
        "threads": 1,
        "device": "cpu",
        **options,
    }
    return ["train", str(dataset), f"--set=width={width}", *(f"--{key}={value}" for key, value in values.items())]


@pytest.fixture(scope="session")
def finished_run(dataset: Path, share: Share, start: Start) -> Path:
    """A run as users have it, with its curves."""

    def build(out: Path) -> None:
        process = start(train_arguments(dataset, out, width=64), curves=True)
        _, stderr = process.communicate()
        assert process.returncode == 0, stderr

    return share("finished", build)


@pytest.fixture(scope="session")
def model(finished_run: Path, share: Share, robustfeat: Run) -> Path:
    """A freshly trained network, exported (fp32)."""

    def build(out: Path) -> None:
        result = robustfeat("export", finished_run, "--out", out, "--no-int8")
        assert result.returncode == 0, result.stderr

    return share("trained", build)


@pytest.fixture(scope="session")
def clothes(examples: Path, share: Share) -> Path:
    """A head for the built-in model."""
    return share("clothes", lambda out: fit_clothes(examples, out))


def fit_clothes(examples: Path, out: Path) -> None:
    from robustfeat import FeatureExtractor
    from robustfeat.serving.heads.features import embed_features
    from robustfeat.serving.heads.fitting.fit import fit_head
    from robustfeat.serving.heads.labels.matching import match_labels
    from robustfeat.serving.heads.labels.reading import read_labels
    from robustfeat.serving.inputs.listing import list_inputs

    with list_inputs([examples]) as inputs:
        features = embed_features(FeatureExtractor.from_pretrained(threads=1, streams=1), inputs, quiet=True)
    fit_head(features, match_labels(features, read_labels(["folder"])), cs=(0.1,), scalings=("none",))[0].save(out)


@pytest.fixture(scope="session")
def one_file(share: Share) -> Path:
    """The built-in model with its ONNX as one file, as it is pushed."""
    from robustfeat.hub.catalog import builtin_model
    from robustfeat.training.export.compact import expand_folder

    return share("one-file", lambda out: expand_folder(builtin_model(), out))


SMALL_MODEL = """
import sys, timm, torch
from robustfeat.training.export.backbones import import_backbone
out, weights = sys.argv[1:]
torch.manual_seed(0)
torch.save(timm.create_model("test_resnet").state_dict(), weights)
import_backbone("timm:test_resnet", out, weights=weights, image_size=32)
"""


@pytest.fixture(scope="session")
def small_model(share: Share, python: Run) -> Path:
    """A network of 0.5 million random weights: its files and engines cost little."""

    def build(out: Path) -> None:
        result = python(SMALL_MODEL, out, out.with_suffix(".pt"))
        assert result.returncode == 0, result.stderr

    return share("small", build)


@pytest.fixture(scope="session")
def small_fp32(share: Share, small_model: Path) -> Path:
    """The same network under another name, without int8."""
    from robustfeat.hub.folder import ONNX, ModelFolder, seal_folder

    def build(out: Path) -> None:
        shutil.copytree(small_model, out)
        config = ModelFolder(out).config
        (out / ONNX["int8"]).unlink()
        seal_folder(out, config.replace(name="small-fp32-v1"), (out / "README.md").read_text("utf-8"))

    return share("small-fp32", build)


Towers = Callable[[str], Path]


@pytest.fixture(scope="session")
def towers(share: Share) -> Towers:
    """The folder of a model for texts and images; see `write_two_towers`."""

    def write(kind: str) -> Path:
        from tests.transformers_models import write_two_towers

        return share(f"towers-{kind}", lambda out: write_two_towers(kind, out))

    return write


def files_of(folder: Path) -> dict[str, bytes]:
    """Contents by path."""
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeHub]:
    with serve_hub(tmp_path_factory.mktemp("hub")) as served:
        yield served


Repositories = Callable[[str], Path]


@pytest.fixture(scope="session")
def repositories(share: Share, example_files: list[Path]) -> Repositories:
    """The folder of a family of transformers, with weights for PyTorch and ONNX; see `write_repository`."""

    def write(name: str, out: Path) -> None:
        from tests.transformers_models import write_repository  # imports PyTorch

        write_repository(name, out, example_files[::5])

    return lambda name: share(f"transformers-{name}", partial(write, name))


def hub_environment(hub: FakeHub, home: Path, token: str | None = "hf_alice", **more: str) -> dict[str, str]:
    """For a process that speaks to `hub` with a cache of its own under `home`."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    return environment | ({"HF_TOKEN": token} if token else {}) | more


@pytest.fixture(scope="session")
def write_features() -> WriteFeatures:
    """Writes files of features by hand, as `embed` would; without `hashes`, as version 0.1 would."""

    def write(
        file: Path,
        values: NDArray[np.float32],
        paths: Sequence[str],
        errors: Mapping[int, str] | None = None,
        hashes: bool = True,
        **meta: Any,
    ) -> Path:
        np.save(file, values)
        records = [
            {"row": row, "path": path, "sha256": "0" * 64, "error": (errors or {}).get(row)}
            for row, path in enumerate(paths)
        ]
        index = file.with_suffix(".index.jsonl")
        index.write_text("".join(json.dumps(record) + "\n" for record in records))
        named = {
            f"{kind}_sha256": hashlib.sha256(place.read_bytes()).hexdigest()
            for kind, place in (("features", file), ("index", index))
            if hashes
        }
        about = FEATURES_META | {"feature_size": values.shape[1], "images": len(paths), "format": ".npy"}
        about |= named | meta
        file.with_suffix(".meta.json").write_text(json.dumps(about))
        return file

    return write
