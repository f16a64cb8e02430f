"""What a worker does with its settings, without TorchServe around it."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import shutil
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from robustfeat.errors import EngineError
from robustfeat.hub.catalog import builtin_model
from robustfeat.hub.folder import GOLDEN_FEATURES, ModelFolder, file_sha256
from robustfeat.serving.engines.options import RunOptions
from robustfeat.serving.torchserve.handler import Handler, Settings, visible_gpu
from robustfeat.system import available_cpus
from tests import built_in
from tests.serving.http.conftest import children, slow_picture

pytest.importorskip("ts", reason="TorchServe has no version for this Python")

OPTIONS = RunOptions(engine="onnxruntime", device="cpu")
SETTINGS = Settings(
    options=OPTIONS,
    workers=available_cpus(),  # so that each has one decoder
    max_items=64,
    max_body_bytes=2**20,
    max_pixels=10_000_000,
    timeout_s=30,
    decode_timeout_s=10,
)


class Context:
    """As much of TorchServe's as a handler uses."""

    def __init__(self, count: int, content_types: Sequence[str] = ()) -> None:
        self.metrics = self
        self.counted: dict[str, int] = {}
        self.status, self.types = [200] * count, [""] * count
        self._content_types = content_types or ["image/jpeg"] * count

    def get_all_request_header(self, at: int) -> dict[str, Any]:
        return {"Content-Type": self._content_types[at], "url_path": ""}

    def set_response_status(self, code: int, phrase: str, at: int) -> None:
        self.status[at] = code

    def set_response_content_type(self, at: int, kind: str) -> None:
        self.types[at] = kind

    def set_response_header(self, at: int, name: str, text: str) -> None:
        pass

    def add_counter(self, name: str, number: int, dimensions: list[Any]) -> None:
        self.counted[dimensions[0].value] = number


def handler(**changes: Any) -> Handler:
    return Handler(builtin_model(), "m", dataclasses.replace(SETTINGS, **changes))


def png(side: int) -> bytes:
    file = io.BytesIO()
    Image.new("1", (side, side)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def photo(example_files: list[Path]) -> bytes:
    return example_files[0].read_bytes()


def test_the_workers_share_the_processors() -> None:
    processors = available_cpus()
    assert handler(workers=processors).model.extractor.engine.threads == 1
    assert handler(workers=1).model.extractor.engine.threads == processors
    assert (
        handler(workers=processors, options=dataclasses.replace(OPTIONS, threads=2)).model.extractor.engine.threads == 2
    )


def test_precision_decoding_and_revision_are_the_archive_s() -> None:
    options = dataclasses.replace(OPTIONS, precision="int8", decoding="scaled", revision="f" * 40)
    served = handler(options=options).model
    assert (served.extractor.precision, served.extractor.decoding, served.version) == ("int8", "scaled", "f" * 40)
    assert served.about == {"model": "m", "revision": "f" * 40, "precision": "int8"}


def test_a_worker_that_gives_other_features_does_not_start(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(builtin_model().path, tmp_path / "model"))
    golden = np.load(folder / GOLDEN_FEATURES)
    np.save(folder / GOLDEN_FEATURES, golden[::-1])
    config = json.loads((folder / "config.json").read_text())
    config["robustfeat"]["files"][GOLDEN_FEATURES] = file_sha256(folder / GOLDEN_FEATURES)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(EngineError, match="the cosine to a golden image's features must be"):
        Handler(ModelFolder(folder), "m", SETTINGS)


def test_each_request_has_its_own_answer_and_they_are_counted(photo: bytes) -> None:
    context = Context(3)
    good, bad, also = handler().answer([{"body": photo}, {"body": b"no image"}, {"body": bytearray(photo)}], context)
    assert context.status == [200, 422, 200]
    assert json.loads(good)["data"][0]["embedding"] == json.loads(also)["data"][0]["embedding"]
    assert json.loads(bad)["error"]["code"] == "unreadable_image"
    assert context.counted == {"good": 2, "failed": 1}


def test_the_limit_of_pixels_holds() -> None:
    context = Context(2)
    _, large = handler(max_pixels=1_000_000).answer([{"body": png(1000)}, {"body": png(1001)}], context)
    assert context.status == [200, 422]
    assert "over the limit of 1,000,000 pixels" in json.loads(large)["error"]["message"]


def stop_decoders(before: list[int]) -> None:
    for decoder in set(children(os.getpid())) - set(before):
        os.kill(decoder, signal.SIGSTOP)


def test_a_request_that_takes_too_long_fails_alone(photo: bytes) -> None:
    """A prepared tensor needs no decoder, and so it is answered while they stand still."""
    before = children(os.getpid())
    served = handler(decode_timeout_s=60)
    served._settings = dataclasses.replace(SETTINGS, timeout_s=1)  # which is long enough now that all has started
    stop_decoders(before)
    tensor = {"name": "pixel_values", "datatype": "FP32", "shape": built_in.SHAPE, "data": [0.5] * built_in.COUNT}
    context = Context(2, ["image/jpeg", "application/json"])
    late, good = served.answer([{"body": photo}, {"body": {"inputs": [tensor]}}], context)
    assert context.status == [503, 200]
    assert json.loads(late)["error"]["code"] == "timeout"
    assert json.loads(good)["outputs"][0]["shape"] == [1, 512]


def test_the_time_to_decode_an_image_is_limited() -> None:
    served = handler(decode_timeout_s=1)
    (answer,) = served.answer([{"body": slow_picture()}], Context(1))
    assert "longer than 1 s" in answer.decode()


@pytest.mark.parametrize(
    ("number", "visible", "expected"),
    [(0, None, "0"), (3, "", "3"), (1, "2,3", "3"), (0, "GPU-abc, GPU-def", "GPU-abc"), (2, "5,6", "5")],
)
def test_a_worker_takes_a_gpu_among_those_that_are_visible(number: int, visible: str | None, expected: str) -> None:
    assert visible_gpu(number, visible) == expected


@pytest.fixture(autouse=True)
def ends() -> Iterator[None]:
    """A handler lives as long as its process; here its decoders end with the test."""
    from robustfeat.serving.online.batching import Batcher

    made: list[Batcher] = []
    original = Batcher.__enter__

    def enter(self: Batcher) -> Batcher:
        made.append(self)
        return original(self)

    Batcher.__enter__ = enter  # type: ignore[method-assign]
    yield
    Batcher.__enter__ = original  # type: ignore[method-assign]
    for batcher in made:
        batcher.__exit__()
