"""Which model made some features: what is written of it, and what is compared."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from robustfeat import FeatureExtractor
from robustfeat.errors import InputError
from robustfeat.hub.folder import WEIGHTS
from robustfeat.serving.feature_cache import FeatureCache
from robustfeat.serving.identity import BYTE_KEYS, FEATURE_KEYS, MODEL_KEYS, ModelIdentity


@pytest.fixture(scope="module")
def extractor() -> FeatureExtractor:
    return FeatureExtractor.from_pretrained(threads=1)


def test_a_meta_file_holds_all_that_is_compared(extractor: FeatureExtractor) -> None:
    meta = json.loads(json.dumps(extractor.identity.to_meta(batch_size=32)))
    assert list(meta) == [
        *("model", "revision", "files", "precision", "engine", "device", "decoding", "preprocessing_hash"),
        *("feature_size", "source", "batch_size", "threads", "versions"),
    ]
    assert list(meta["versions"]) == ["robustfeat", "onnxruntime", "numpy", "pillow", "pillow-heif"]
    assert ModelIdentity.of_meta(meta) == extractor.identity


def test_machines_of_which_one_reads_heic_do_not_give_the_same_bytes(
    extractor: FeatureExtractor, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_heic = extractor.identity
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    without = extractor.identity
    assert with_heic.difference(without, BYTE_KEYS) == "versions"
    assert with_heic.difference(without, FEATURE_KEYS) is None


def test_a_head_keeps_what_tells_models_apart(extractor: FeatureExtractor) -> None:
    about = extractor.identity.to_head()
    assert about == {
        "name": extractor.config.name,
        "revision": None,
        "weights_sha256": extractor.config.files[WEIGHTS],
        "preprocessing_hash": extractor.config.preprocessing.hash,
        "feature_size": 512,
        "precision": "fp32",
        "engine": "onnxruntime",
        "decoding": "exact",
        "source": "builtin",
    }
    kept = ModelIdentity.of_head(about)
    assert kept.difference(extractor.identity, MODEL_KEYS) is None
    with pytest.raises(TypeError, match="feature_size is '512'"):
        ModelIdentity.of_head({**about, "feature_size": "512"})


@pytest.mark.parametrize(
    ("changes", "differing"),
    [
        ({"revision": "f" * 40}, []),
        ({"source": "org/name"}, []),
        ({"threads": 7}, [BYTE_KEYS]),
        ({"versions": {"numpy": "1"}}, [BYTE_KEYS]),
        ({"precision": "int8"}, [BYTE_KEYS, FEATURE_KEYS]),
        ({"device": "cuda"}, [BYTE_KEYS, FEATURE_KEYS]),
        ({"name": "other"}, [BYTE_KEYS, MODEL_KEYS]),
        ({"preprocessing_hash": "0" * 64}, [BYTE_KEYS, FEATURE_KEYS, MODEL_KEYS]),
    ],
)
def test_bytes_features_and_models_are_told_apart(
    extractor: FeatureExtractor, changes: dict[str, object], differing: list[tuple[str, ...]]
) -> None:
    other = dataclasses.replace(extractor.identity, **changes)  # type: ignore[arg-type]
    found = {keys: extractor.identity.difference(other, keys) for keys in (BYTE_KEYS, FEATURE_KEYS, MODEL_KEYS)}
    assert found == {keys: next(iter(changes)) if keys in differing else None for keys in found}
    assert extractor.identity.same_bytes(other) == (BYTE_KEYS not in differing)
    assert extractor.identity.same_features(other) == (MODEL_KEYS not in differing)


def test_another_model_is_refused_by_name(extractor: FeatureExtractor) -> None:
    other = dataclasses.replace(extractor.identity, weights_sha256="0" * 64)
    with pytest.raises(InputError, match=r"head: needs features of .* with weights sha256") as caught:
        extractor.identity.require(other, "head", "feats.npy")
    assert caught.value.fix == "use the same model for both"


def test_a_cache_of_earlier_releases_is_taken(extractor: FeatureExtractor, tmp_path: Path) -> None:
    """The key of a file is written out here: features that users keep must be found again."""
    config, version = extractor.config, importlib.metadata.version("onnxruntime")
    maker = [dict(config.files), config.preprocessing.hash, "fp32", "onnxruntime", version, "exact"]
    prefix = hashlib.sha256(json.dumps(maker, sort_keys=True).encode()).digest()
    expected = hashlib.sha256(prefix + b"file" + hashlib.sha256(b"image").digest()).digest()
    cache = FeatureCache(tmp_path / "features.sqlite", extractor)
    assert cache.key(b"image") == expected
    cache.put({expected: np.arange(512, dtype=np.float32)})
    assert cache.get([expected])[expected].tolist() == list(range(512))


def test_features_in_fp16_are_cached_by_device(extractor: FeatureExtractor) -> None:
    """A processor computes fp16 networks in fp32; a GPU rounds after each layer."""
    half = dataclasses.replace(extractor.identity, precision="fp16")
    assert half.fingerprint != dataclasses.replace(half, device="cuda").fingerprint
    assert extractor.fingerprint == dataclasses.replace(extractor.identity, device="cuda").fingerprint


def test_a_head_takes_features_in_fp16(extractor: FeatureExtractor) -> None:
    half = FeatureExtractor.from_pretrained(threads=1, precision="fp16").identity
    assert half.same_features(extractor.identity)
    assert half.difference(extractor.identity, FEATURE_KEYS) == "precision"  # so they do not stand in one file
