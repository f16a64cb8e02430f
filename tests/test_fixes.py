"""What to do about an error is data: `fix`, not a part of the problem's text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from robustfeat.errors import RobustFeatError
from robustfeat.hub.folder import refuse_code
from robustfeat.hub.preprocessing import _to_8_bits
from robustfeat.hub.remote import HubAccess
from robustfeat.serving.feature_cache import FeatureCache
from robustfeat.serving.heads.fitting.fit import require_two
from robustfeat.serving.heads.labels.labels import Labels, Unlabelled
from robustfeat.serving.heads.labels.matching import LabelledRows
from robustfeat.training.concepts import ConceptMap

MAKER: Any = SimpleNamespace(feature_size=2, fingerprint=("x",))


def one_class(targets: Any) -> LabelledRows:
    return LabelledRows(np.arange(2), targets, ("a",), 0, Unlabelled(Labels("", {})), ())


@pytest.mark.parametrize(
    ("fail", "fix"),
    [
        (lambda _: refuse_code(["a.pkl"], "place"), "remove the file, or do not use this model"),
        (lambda _: _to_8_bits(Image.new("F", (2, 2))), "save it with 8 or 16 bits per channel"),
        (lambda tmp: FeatureCache(tmp, MAKER), "delete it, or name another file"),
        (lambda _: require_two("rows", one_class(np.zeros(2, np.int64))), "label rows of at least two classes"),
        (
            lambda _: require_two("rows", one_class(np.ones((2, 1), bool))),
            "label some rows with it and some without",
        ),
        (
            lambda _: ConceptMap(("a", "b"), np.array([0, 1]), np.array([1, 1])).distribution({"a": 1}),
            "add one, 0 if that is meant",
        ),
        (lambda _: HubAccess(endpoint="hub")._check(), "pass one such as https://huggingface.co"),
        (lambda _: HubAccess(token="a b")._check(), "run hf auth login, or copy it again"),
    ],
)
def test_the_fix_stands_apart(tmp_path: Path, fail: Callable[[Path], object], fix: str) -> None:
    with pytest.raises(RobustFeatError) as info:
        fail(tmp_path)
    assert info.value.fix == fix
    assert fix not in info.value.what
