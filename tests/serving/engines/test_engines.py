"""Every engine and precision against PyTorch's answers, and against each other."""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from robustfeat import FeatureExtractor
from robustfeat.errors import EngineError, ModelFolderError, NotFiniteError
from robustfeat.hub.catalog import resolve_model
from robustfeat.hub.float16 import convert_to_float16
from robustfeat.serving.engines.engine import open_engine
from robustfeat.serving.engines.options import RunOptions
from robustfeat.serving.verify import check_golden, cosine
from tests import built_in

WAYS = [
    ("onnxruntime", "fp32"),
    ("onnxruntime", "fp16"),
    ("onnxruntime", "int8"),
    ("openvino", "fp32"),
    ("openvino", "int8"),
]


def golden_cosine(extractor: FeatureExtractor) -> float:
    found = check_golden(extractor).cosine
    assert found is not None
    return found


def has_bf16() -> bool:
    flags = Path("/proc/cpuinfo").read_text()
    return "avx512_bf16" in flags or "amx_bf16" in flags


@pytest.mark.parametrize(("engine", "precision"), WAYS)
@pytest.mark.parametrize("streams", [1, 2])
def test_golden_images_give_pytorchs_features(engine: str, precision: str, streams: int) -> None:
    extractor = FeatureExtractor.from_pretrained(engine=engine, precision=precision, threads=2, streams=streams)
    assert (extractor.engine.name, extractor.engine.threads, extractor.engine.streams) == (engine, 2, streams)
    assert golden_cosine(extractor) >= (0.995 if precision == "int8" else 0.9999)


def test_bf16_runs_on_openvino_or_is_refused(example_files: list[Path]) -> None:
    with pytest.raises(EngineError, match="ONNX Runtime has no bf16"):
        FeatureExtractor.from_pretrained(engine="onnxruntime", precision="bf16")
    if not has_bf16():
        with pytest.raises(EngineError, match="no bf16 instructions"):
            FeatureExtractor.from_pretrained(precision="bf16")
        return
    extractor = FeatureExtractor.from_pretrained(precision="bf16")
    assert extractor.engine.name == "openvino"
    exact = FeatureExtractor.from_pretrained(engine="openvino").embed(example_files)
    rounded = extractor.embed(example_files)
    assert cosine(exact, rounded).min() >= 0.995
    assert not np.array_equal(exact, rounded)  # it is not fp32 under another name


@pytest.mark.parametrize(("engine", "precision"), WAYS)
def test_a_vector_is_the_same_alone_and_in_any_batch(engine: str, precision: str, example_files: list[Path]) -> None:
    extractor = FeatureExtractor.from_pretrained(engine=engine, precision=precision)
    together = extractor.embed(example_files)
    alone = np.concatenate([extractor.embed([file]) for file in example_files[::5]])
    assert cosine(together[::5], alone).min() >= 0.999999


def test_a_failed_row_keeps_its_slot(example_files: list[Path]) -> None:
    extractor = FeatureExtractor.from_pretrained()
    images: list[object] = [*example_files[:4], b"junk", *example_files[4:8]]
    mixed = extractor.embed(images, on_error="nan")
    good = [0, 1, 2, 3, 5, 6, 7, 8]
    assert np.isnan(mixed[4]).all()
    other = extractor.embed([*example_files[:4], example_files[20], *example_files[4:8]])
    np.testing.assert_array_equal(mixed[good], other[good])  # whatever lies in the slot


def enlarged(photo: Path, side: int) -> bytes:
    """The photograph with a shorter side of `side` pixels."""
    file = io.BytesIO()
    with Image.open(photo) as image:
        factor = side / min(image.size)
        image.resize((round(image.width * factor), round(image.height * factor))).save(file, "JPEG", quality=95)
    return file.getvalue()


def test_scaled_decoding_stays_near(example_files: list[Path]) -> None:
    """Photographs of five times the network's size and more are decoded at half that."""
    photos = [enlarged(file, 5 * built_in.SIDE) for file in example_files]
    exact = FeatureExtractor.from_pretrained().embed(photos)
    scaled = FeatureExtractor.from_pretrained(decoding="scaled").embed(photos)
    similarity = cosine(exact, scaled)
    assert similarity.min() >= 0.98
    assert np.median(similarity) >= 0.999
    assert similarity.max() < 1 - 1e-9  # it really decodes in another way


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "tflite"}, "engine=tflite: expected auto, onnxruntime, openvino or tensorrt"),
        ({"precision": "fp8"}, "precision=fp8: expected fp32, fp16, bf16 or int8"),
        ({"device": "tpu"}, "device=tpu: expected auto, cpu or cuda"),
        ({"decoding": "fast"}, "decoding=fast: expected exact or scaled"),
        ({"threads": 0}, "threads=0: expected 1 or more; leave `threads` out"),
        ({"engine": "openvino", "device": "cuda"}, "OpenVINO does not run on cuda"),
        ({"precision": "bf16", "device": "cuda"}, "bf16 runs on processors, not on cuda; pass `precision=fp16`"),
        ({"precision": "int8", "device": "cuda"}, "int8 runs on processors, not on cuda; pass `precision=fp16`"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises((EngineError, ModelFolderError), match=message):
        FeatureExtractor.from_pretrained(**options)


def test_openvino_refuses_what_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelFolderError, match="OpenVINO cannot load it"):
        open_engine(tmp_path, b"junk", RunOptions(engine="openvino"))


def test_a_missing_engine_is_named() -> None:
    code = (
        "import sys; sys.modules['{0}'] = None\n"
        "from robustfeat import FeatureExtractor\n"
        "try: FeatureExtractor.from_pretrained(engine='{0}')\n"
        "except Exception as exc: print(type(exc).__name__, exc)"
    )
    for engine, extra in (("openvino", "openvino"), ("onnxruntime", "cpu")):
        said = subprocess.run([sys.executable, "-c", code.format(engine)], capture_output=True, text=True, check=True)
        assert said.stdout.startswith("EngineError")
        assert f"robustfeat[{extra}]" in said.stdout


def test_openvino_serves_alone_where_onnx_runtime_is_missing() -> None:
    code = (
        "import sys; sys.modules['onnxruntime'] = None\n"
        "from robustfeat import FeatureExtractor\n"
        "print(FeatureExtractor.from_pretrained().engine.name)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout == "openvino\n"


def test_openvino_leaves_nothing_in_the_home_folder(tmp_path: Path) -> None:
    """Its telemetry would write there, and call home."""
    code = "from robustfeat import FeatureExtractor; FeatureExtractor.from_pretrained(engine='openvino')"
    subprocess.run([sys.executable, "-c", code], check=True, env={"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dropping", ["del first; del second", "in_a_thread(engines.clear)"])
def test_signals_are_handled_when_engines_of_openvino_are_gone(small_model: Path, dropping: str) -> None:
    """OpenVINO alone would leave the thread an unmapped stack for its handlers where plugins end as these do."""
    code = """
import os, signal, sys, threading
from robustfeat import FeatureExtractor

def load():
    return FeatureExtractor.from_pretrained(sys.argv[1], engine="openvino")

def in_a_thread(function):
    thread = threading.Thread(target=function)
    thread.start()
    thread.join()

signal.signal(signal.SIGTERM, lambda *_: print("handled"))
first, second = load(), load()
if "engines" in sys.argv[2]:
    engines = [first, second]
    del first, second
exec(sys.argv[2])
os.kill(os.getpid(), signal.SIGTERM)
"""
    command = [sys.executable, "-c", code, str(small_model), dropping]
    said = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (said.returncode, said.stdout) == (0, "handled\n"), said.stderr


def test_a_fork_runs_openvino_after_its_parent_has(small_model: Path) -> None:
    """A core that outlived its engines would wait in the fork for threads of the parent."""
    code = """
import os, signal, sys
import numpy as np
from robustfeat import FeatureExtractor

def features():
    extractor = FeatureExtractor.from_pretrained(sys.argv[1], engine="openvino", threads=2)
    return extractor.embed([np.zeros((32, 32, 3), np.uint8)])

expected = features()
if not os.fork():
    signal.alarm(60)
    os._exit(not np.array_equal(features(), expected))
print(os.waitstatus_to_exitcode(os.wait()[1]))
"""
    command = [sys.executable, "-c", code, str(small_model)]
    said = subprocess.run(command, capture_output=True, text=True, check=False)
    assert said.stdout == "0\n", said.stderr


def test_a_compact_folder_loads_in_openvino_from_anywhere(tmp_path: Path) -> None:
    copy = tmp_path / "model"
    shutil.copytree(resolve_model(None).path, copy)
    assert golden_cosine(FeatureExtractor.from_pretrained(copy, engine="openvino")) >= 0.9999


@pytest.mark.parametrize(
    ("precision", "fix"), [("fp16", "exceed the range of fp16: pass `precision=fp32`"), ("fp32", "may be damaged")]
)
def test_numbers_that_are_not_finite_are_explained(tmp_path: Path, precision: str, fix: str) -> None:
    """The weight stands for an overflow: on a processor ONNX Runtime computes fp16 networks in fp32."""
    from onnx import TensorProto, helper

    graph = helper.make_graph(
        [
            helper.make_node("Mul", ["pixel_values", "large"], ["scaled"]),
            helper.make_node("ReduceSum", ["scaled", "axes"], ["features"], keepdims=0),
        ],
        "network",
        [helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, ["n", 3, 8, 8])],
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["n", 3])],
        [
            helper.make_tensor("large", TensorProto.FLOAT, [], [np.inf]),
            helper.make_tensor("axes", TensorProto.INT64, [2], [2, 3]),
        ],
    )
    content = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10).SerializeToString()
    if precision == "fp16":
        content = convert_to_float16(content)
    with pytest.raises(NotFiniteError, match=f"for 2 of 2 images; .*{fix}"):
        open_engine(tmp_path, content, RunOptions(precision)).run(np.ones((2, 3, 8, 8), np.float32))
