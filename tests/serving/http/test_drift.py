"""Drift of the latest images in /metrics, with real servers and photographs."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from PIL import Image, ImageFilter

from tests.conftest import Run
from tests.serving.http.conftest import serving, wait_until

SHORT = {"robustfeat.serving.http.drift._LEAST_IMAGES": 20, "robustfeat.serving.http.drift._PAUSE_S": 0.2}


@pytest.fixture(scope="module")
def reference(robustfeat: Run, examples: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("reference") / "feats.npy"
    assert robustfeat("embed", examples, "--out", out, "--quiet").returncode == 0
    return out


def out_of_focus(photo: bytes) -> bytes:
    file = io.BytesIO()
    Image.open(io.BytesIO(photo)).filter(ImageFilter.GaussianBlur(12)).save(file, "JPEG")
    return file.getvalue()


def test_photographs_out_of_focus_are_a_shift(reference: Path, example_files: list[Path]) -> None:
    photos = [file.read_bytes() for file in example_files]
    with serving("--reference", reference, constants=SHORT) as server:
        assert server.metric("robustfeat_drift_window_images") == 0
        assert server.form("/embed", photos).status == 200
        wait_until(lambda: server.metric("robustfeat_drift_window_images") == 40)
        # The images of the reference themselves.
        assert server.metric("robustfeat_drift_distance") < 0.01
        assert server.metric("robustfeat_drift_shifted") == 0
        for _ in range(3):
            assert server.form("/embed", list(map(out_of_focus, photos))).status == 200
        wait_until(lambda: server.metric("robustfeat_drift_window_images") == 160)
        assert server.metric("robustfeat_drift_distance") > 0.02
        assert server.metric("robustfeat_drift_shifted") == 1
        assert server.metric("robustfeat_drift_atypical_share") > 0.05


def test_a_reference_of_another_model_is_refused(robustfeat: Run, reference: Path, small_model: Path) -> None:
    result = robustfeat("serve", "--model", small_model, "--reference", reference, "--port", "0")
    assert result.returncode == 1
    assert "the reference" in result.stderr
    assert "Traceback" not in result.stderr
