"""Texts and images in one space: a model's text tower, against transformers' own tokenizer and network."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from robustfeat import FeatureExtractor
from robustfeat.errors import InputError, ModelFolderError
from tests.conftest import Towers, files_of
from tests.hub_server import FakeHub
from tests.transformers_models import TEXT_MODELS, TEXTS, reference_texts

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture
def clip(towers: Towers, tmp_path: Path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(towers("clip"), tmp_path / "clip"))


@pytest.mark.parametrize("kind", TEXT_MODELS)
def test_vectors_of_texts_are_those_of_transformers(kind: str, towers: Towers) -> None:
    extractor = FeatureExtractor.from_pretrained(towers(kind))
    found, expected = extractor.embed_texts(TEXTS), reference_texts(kind, towers(kind), TEXTS)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert found.shape == (len(TEXTS), extractor.feature_size)
    assert np.linalg.matrix_rank(expected) == len(TEXTS)  # or any text would do
    # Neither neighbours nor their lengths matter.
    np.testing.assert_array_equal(extractor.embed_texts(TEXTS[:1]), found[:1])
    assert extractor.embed_texts([]).shape == (0, extractor.feature_size)


def test_the_text_tower_is_no_part_of_the_models_identity(clip: Path, towers: Towers) -> None:
    """Features of images stay usable when a text tower is added or taken away."""
    with_texts = FeatureExtractor.from_pretrained(towers("clip"))
    (clip / "onnx" / "text_model.onnx").unlink()
    without = FeatureExtractor.from_pretrained(clip)
    assert without.identity == with_texts.identity
    with pytest.raises(InputError, match=r"no text tower \(onnx/text_model.onnx is missing, or not downloaded\)"):
        without.embed_texts(["a red dress"])


def test_a_model_without_a_text_tower_says_so() -> None:
    with pytest.raises(InputError, match="builtin: the model has no text tower; use a model like CLIP or SigLIP"):
        FeatureExtractor.from_pretrained().embed_texts(["a red dress"])


def test_features_of_another_space_are_refused(towers: Towers) -> None:
    with pytest.raises(InputError, match=r"text search needs features of `pooling=pooler`; .*`pooling=mean`"):
        FeatureExtractor.from_pretrained(towers("siglip"), pooling="mean").embed_texts(["a red dress"])


@pytest.mark.parametrize("text", ["", " \n", "x" * 100_001])
def test_a_text_that_says_nothing_or_too_much_is_refused(text: str, towers: Towers) -> None:
    with pytest.raises(InputError, match="describe the image in a few words"):
        FeatureExtractor.from_pretrained(towers("clip")).embed_texts([text])


def test_damaged_files_are_one_line(clip: Path, towers: Towers) -> None:
    network, tokenizer = clip / "onnx" / "text_model.onnx", clip / "tokenizer.json"
    whole = network.read_bytes()
    for content in (b"", b"junk", whole[: len(whole) // 2], (clip / "onnx" / "vision_model.onnx").read_bytes()):
        network.write_bytes(content)
        with pytest.raises(ModelFolderError, match=r"text_model.onnx: "):
            FeatureExtractor.from_pretrained(clip).embed_texts(["a red dress"])
    network.write_bytes(whole)
    for text in ("", "{}", "[]", '{"model": {"type": "Other"}}'):
        tokenizer.write_text(text)
        with pytest.raises(ModelFolderError, match=r"tokenizer.json: not a tokenizer"):
            FeatureExtractor.from_pretrained(clip).embed_texts(["a red dress"])


def test_a_vocabulary_of_another_network_is_one_line(clip: Path) -> None:
    content = json.loads((clip / "tokenizer.json").read_text())
    content["model"]["vocab"]["a</w>"] = 10**6
    (clip / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(Exception, match="cannot embed a text"):
        FeatureExtractor.from_pretrained(clip).embed_texts(["a"])


def test_the_hub_is_asked_for_a_text_tower_only_when_there_are_texts(
    towers: Towers, hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("org/clip", files_of(towers("clip")))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)

    def load(*, offline: bool = False) -> FeatureExtractor:
        cache = tmp_path / "cache"
        return FeatureExtractor.from_pretrained("org/clip", endpoint=hub.url, cache_dir=cache, local_files_only=offline)

    extractor = load()
    texts = {"onnx/text_model.onnx", "tokenizer.json"}
    assert not texts & {path.relative_to(extractor.folder.path).as_posix() for path in extractor.folder.path.rglob("*")}
    with pytest.raises(InputError, match="missing, or not downloaded"):
        load(offline=True).embed_texts(["x"])
    found = extractor.embed_texts(TEXTS)
    np.testing.assert_allclose(found, reference_texts("clip", towers("clip"), TEXTS), atol=1e-5)
    np.testing.assert_array_equal(load(offline=True).embed_texts(TEXTS), found)


@pytest.mark.parametrize("name", ["onnx/text_model.onnx", "tokenizer.json"])
def test_a_text_tower_that_was_altered_in_the_cache_is_not_used(
    name: str, towers: Towers, hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    hub.add("org/clip", files_of(towers("clip")))

    def load(*, offline: bool = False) -> FeatureExtractor:
        cache = tmp_path / "cache"
        return FeatureExtractor.from_pretrained("org/clip", endpoint=hub.url, cache_dir=cache, local_files_only=offline)

    found = load().embed_texts(TEXTS)
    file = load().folder.path / name
    file.write_bytes(file.read_bytes().replace(b"a", b"b"))
    for _ in range(2):
        with pytest.raises(ModelFolderError, match=r"altered or truncated .*when the Hub can be reached"):
            load(offline=True).embed_texts(TEXTS)
    np.testing.assert_array_equal(load().embed_texts(TEXTS), found)  # it was downloaded once more
    np.testing.assert_array_equal(load(offline=True).embed_texts(TEXTS), found)
