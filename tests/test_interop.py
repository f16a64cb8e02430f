"""docs/interop.md: its code, as it stands, gives the features of `embed` from a Hub and from a folder."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from robustfeat import FeatureExtractor
from robustfeat.hub.config import ModelConfig
from robustfeat.hub.preprocessing import Preprocessing
from robustfeat.serving.verify import cosine
from robustfeat.training.export.folder import Backbone, write_model_folder
from robustfeat.training.network import build_network, feature_network
from tests.conftest import EXAMPLES, ROOT, Run, files_of, hub_environment
from tests.hub_server import FakeHub, serve_hub

TEXT = (ROOT / "docs" / "interop.md").read_text("utf-8")
BLOCKS = re.findall(r"^## ([^\n]+)\n(.*?)(?=^## |\Z)", TEXT, re.DOTALL | re.MULTILINE)
CODE = [(title, code) for title, section in BLOCKS for code in re.findall(r"```python\n(.*?)```", section, re.DOTALL)]


@pytest.fixture(scope="module")
def one_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ResNet-18 of random weights, which torchvision has, too."""
    torch.manual_seed(0)
    network = build_network(200)
    state, contract = network.state_dict(), Preprocessing(64, 1.0)
    config = ModelConfig("resnet18-v1", "resnet18", 512, 200, contract)
    folder = tmp_path_factory.mktemp("interop") / "model"
    write_model_folder(Backbone(feature_network(network), state, config), folder, calibration=None)
    return folder


@pytest.fixture(scope="module")
def published(one_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeHub]:
    with serve_hub(tmp_path_factory.mktemp("hub")) as hub:
        hub.add("org/name", files_of(one_file))
        yield hub


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


def test_every_library_has_its_code() -> None:
    titles = [title for title, _ in CODE]
    assert titles == ["timm", "transformers", "transformers", "ONNX Runtime", "OpenVINO", "torchvision", "robustfeat"]


@pytest.mark.parametrize("place", ["Hub", "folder"])
@pytest.mark.parametrize(("title", "code"), CODE)
def test_the_code_gives_the_features_of_embed(
    published: FakeHub, one_file: Path, home: Path, tmp_path: Path, python: Run, title: str, code: str, place: str
) -> None:
    photo = EXAMPLES / "hat" / "hat-1.jpg"
    shutil.copy(photo, tmp_path / "photo.jpg")
    if place == "folder":
        (tmp_path / "model").symlink_to(one_file)
        replaced = re.sub(r'hf_hub_download\("org/name", "(.*?)"\)', r'"model/\1"', code)
        replaced = replaced.replace("hf-hub:org/name", "local-dir:model").replace('"org/name"', '"model"')
        assert replaced != code
        code = replaced
    environment = hub_environment(published, home)
    if place == "folder":
        environment["HF_ENDPOINT"] = "http://127.0.0.1:1"
    saving = "\nimport numpy\nnumpy.save('features.npy', numpy.asarray(features))"
    result = python(code + saving, env=environment, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    features = np.load(tmp_path / "features.npy").reshape(1, -1)
    assert features.shape == (1, 512)
    assert cosine(features, FeatureExtractor.from_pretrained(one_file).embed([photo])).min() >= 0.9999
    if title == "ONNX Runtime":
        assert len([line for line in code.splitlines() if line]) <= 10
