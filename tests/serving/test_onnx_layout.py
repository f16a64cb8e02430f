"""Models in the layout of Optimum and transformers.js, from the Hub, where neither torch nor transformers exist."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from sklearn.linear_model import LogisticRegression

from robustfeat import FeatureExtractor, Head
from robustfeat.errors import EngineError, InputError, ModelFolderError
from robustfeat.hub.folder import ModelFolder
from robustfeat.hub.outputs import read_outputs
from robustfeat.hub.preprocessing import normalise
from robustfeat.hub.push import Target, push_model
from robustfeat.serving.engines.options import RunOptions
from robustfeat.serving.engines.pooling import choose_pooling
from robustfeat.serving.heads.features import open_features
from robustfeat.serving.identity import ModelIdentity
from robustfeat.serving.torchserve.archive import write_archive
from robustfeat.serving.torchserve.handler import MODEL_FOLDER, Settings
from robustfeat.serving.verify import check_ways, cosine, golden_answers, ways_to_run
from robustfeat.training.export.classifier import export_classifier
from tests.conftest import EXAMPLES, ROOT, Repositories, Run, files_of, hub_environment
from tests.hub_server import FakeHub
from tests.serving.http.conftest import Server
from tests.transformers_models import FAMILIES, reference_features

FAST = {"dinov2", "clip"}
README = (ROOT / "README.md").read_text("utf-8")

LOAD = """
import sys
import numpy as np
from robustfeat import FeatureExtractor
extractor = FeatureExtractor.from_pretrained(sys.argv[1])
np.save(sys.argv[2], extractor.embed(sys.argv[3:]))
print(extractor.options.pooling)
"""

Alone = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def copy(repositories: Repositories, tmp_path: Path) -> Path:
    """A DINOv2 to change."""
    return Path(shutil.copytree(repositories("dinov2"), tmp_path / "dinov2"))


@pytest.fixture
def alone(hub: FakeHub, tmp_path: Path) -> Alone:
    """Runs Python where torch, transformers and onnx cannot be imported, with an empty cache of the Hub."""
    blocked = tmp_path / "blocked"
    for name in ("torch", "torchvision", "transformers", "timm", "onnx", "optimum"):
        (blocked / name).mkdir(parents=True)
        (blocked / name / "__init__.py").write_text("raise ImportError(f'{__name__} is not installed')\n")
    path = os.pathsep.join(map(str, (blocked, ROOT)))

    def run(*arguments: object, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
        env = hub_environment(hub, tmp_path / "home", PYTHONPATH=path, **environment)
        env.pop("HF_HUB_OFFLINE", None)
        command = [sys.executable, *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=env | environment, check=False)

    return run


def published(hub: FakeHub, folder: Path, name: str) -> None:
    """With what robustfeat neither downloads nor opens."""
    hub.add(name, files_of(folder) | {"pytorch_model.bin": b"a pickle", "modeling.py": b"raise SystemExit"})


def cached(home: Path) -> set[str]:
    return {
        file.relative_to(snapshot).as_posix()
        for snapshot in home.glob("hub/models--*/snapshots/*")
        for file in snapshot.rglob("*")
        if file.is_file()
    }


# Features


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)
def test_features_are_those_of_transformers_without_torch(
    name: str, repositories: Repositories, hub: FakeHub, alone: Alone, example_files: list[Path], tmp_path: Path
) -> None:
    folder = repositories(name)
    published(hub, folder, f"org/{name}")
    loaded = alone("-c", LOAD, f"org/{name}", tmp_path / "features.npy", *example_files)
    assert loaded.returncode == 0, loaded.stderr
    features = np.load(tmp_path / "features.npy")
    for backend in ("pil", "torchvision"):
        expected = reference_features(name, folder, example_files, backend)
        assert features.shape == expected.shape
        assert cosine(features, expected).min() >= 0.9999
        # Features of other images are told apart.
        assert np.median(cosine(features, np.roll(expected, 1, axis=0))) < 0.999
    ways = {"image_embeds": "embeds", "pooler_output": "pooler", "cls": "cls"}
    usual = "cls" if name.startswith("dino") else ways[FAMILIES[name].features]
    assert loaded.stdout.strip() == usual
    assert cached(tmp_path / "home") == {
        "config.json",
        "preprocessor_config.json",
        f"onnx/{FAMILIES[name].stem}.onnx",
    }


def test_two_lines_of_the_readme_lead_to_features_without_torch(
    repositories: Repositories, hub: FakeHub, alone: Alone, tmp_path: Path
) -> None:
    """The command, in an environment as its line makes one; the repository is a small one of the same name."""
    (line,) = [line for line in README.splitlines() if "--model onnx-community/" in line]
    command = line.split()
    published(hub, repositories("dinov2"), command[command.index("--model") + 1])
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    result = alone("-m", "robustfeat", *command[1:], cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert np.load(tmp_path / command[command.index("--out") + 1]).shape == (40, 32)


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_every_pooling_is_that_of_the_outputs(
    engine: str, repositories: Repositories, example_files: list[Path]
) -> None:
    folder, photos = repositories("dinov2"), example_files[:4]
    way = RunOptions(engine=engine)
    session = FeatureExtractor.load(folder, way).engine
    import onnxruntime

    run = onnxruntime.InferenceSession(folder / "onnx" / "model.onnx").run
    for pooling in ("cls", "pooler", "mean"):
        extractor = FeatureExtractor.from_pretrained(folder, pooling=pooling, engine=engine)
        squares = np.stack([extractor.prepare(photo) for photo in photos])
        pixels = (squares / 255 - extractor.config.preprocessing.mean) / extractor.config.preprocessing.std
        tokens, pooled = run(None, {"pixel_values": pixels.transpose(0, 3, 1, 2).astype(np.float32)})
        expected = {"cls": tokens[:, 0], "pooler": pooled, "mean": tokens[:, 1:].mean(1)}[pooling]
        np.testing.assert_allclose(extractor.embed(photos), expected, atol=2e-5)
        assert extractor.identity.pooling == extractor.options.pooling == pooling
    assert session.pooling.name == "cls"


def test_maps_are_averaged_and_registers_left_out() -> None:
    rng = np.random.default_rng(0)
    tokens, area = rng.normal(size=(2, 11, 5)).astype("f4"), rng.normal(size=(2, 5, 3, 3)).astype("f4")
    outputs = read_outputs({"model_type": "dinov2_with_registers", "num_register_tokens": 4})
    way = choose_pooling("mean", outputs, {"last_hidden_state": [None, 11, 5]}, Path("x.onnx"))
    np.testing.assert_allclose(way(tokens), tokens[:, 5:].mean(1), rtol=1e-5)
    assert way.feature_shape(["batch", 11, 5]) == ["batch", 5]
    way = choose_pooling(
        "auto", read_outputs({"model_type": "poolformer"}), {"last_hidden_state": [1, 5, 3, 3]}, Path()
    )
    np.testing.assert_allclose(way(area), area.mean((2, 3)), rtol=1e-4, atol=1e-6)
    pooler = choose_pooling("auto", read_outputs({"model_type": "resnet"}), {"pooler_output": [1, 5, 1, 1]}, Path())
    assert pooler(area[:, :, :1, :1]).shape == (2, 5)


@pytest.mark.parametrize(
    ("asked", "kind", "given", "said"),
    [
        (
            "auto",
            "vit",
            {"logits": [None, 1000]},
            "the output with the features of a vit is unknown; it has logits (?, 1000)",
        ),
        ("auto", "new", {"last_hidden_state": [None, 9, 5]}, "it has last_hidden_state (?, 9, 5); pass `pooling=cls`"),
        ("mean", "new", {"last_hidden_state": [None, 9, 5]}, "the patch tokens of a new are unknown"),
        ("cls", "swin", {"last_hidden_state": [None, 9, 5]}, "a swin has no class token"),
        ("cls", "resnet", {"last_hidden_state": [None, 5, 3, 3]}, "a resnet has no class token"),
        ("embeds", "dinov2", {"last_hidden_state": [None, 9, 5]}, "the network has no output image_embeds"),
        ("pooler", "dinov2", {"pooler_output": [None, 9, 5]}, "pooler_output is not one vector per image"),
    ],
)
def test_outputs_that_are_no_features_are_named(
    asked: str, kind: str, given: dict[str, list[int | None]], said: str
) -> None:
    with pytest.raises(EngineError) as caught:
        choose_pooling(asked, read_outputs({"model_type": kind}), given, Path("model.onnx"))
    assert said in str(caught.value)


def test_the_class_token_of_an_unknown_type_is_taken_when_asked_for() -> None:
    way = choose_pooling("cls", read_outputs({"model_type": "new"}), {"last_hidden_state": [None, 9, 5]}, Path())
    tokens = np.arange(90.0).reshape(2, 9, 5)
    np.testing.assert_array_equal(way(tokens), tokens[:, 0])


def test_networks_of_ours_have_no_pooling() -> None:
    with pytest.raises(EngineError, match=r"pooling=mean: .*the network outputs features directly; leave it out"):
        FeatureExtractor.from_pretrained(pooling="mean")


def test_features_of_two_poolings_do_not_mix(
    repositories: Repositories, tmp_path: Path, example_files: list[Path], robustfeat: Run
) -> None:
    folder, out = repositories("dinov2"), tmp_path / "feats.npy"
    assert robustfeat("embed", *example_files[:3], "--out", out, "--model", folder, "--quiet").returncode == 0
    identity = open_features(str(out)).model
    assert identity is not None
    assert identity.pooling == "cls"
    assert ModelIdentity.of_head(identity.to_head()).pooling == "cls"
    mean = FeatureExtractor.from_pretrained(folder, pooling="mean")
    assert not mean.identity.same_features(identity)
    assert mean.fingerprint != FeatureExtractor.from_pretrained(folder).fingerprint
    more = ["--out", out, "--model", folder, "--pooling", "mean", "--append", "--quiet"]
    refused = robustfeat("embed", *example_files[:4], *more)
    assert refused.returncode == 1
    assert "pooling" in refused.stderr
    with pytest.raises(InputError, match=r"with pooling cls, b with mean; use the same model for both"):
        identity.require(mean.identity, "a", "b")


def test_means_over_other_tokens_do_not_mix(copy: Path) -> None:
    """config.json decides which tokens are of patches; the network stays the same."""
    before = FeatureExtractor.from_pretrained(copy, pooling="mean").identity
    config = json.loads((copy / "config.json").read_bytes())
    (copy / "config.json").write_text(json.dumps({**config, "num_register_tokens": 4}))
    after = FeatureExtractor.from_pretrained(copy, pooling="mean").identity
    assert (before.skipped_tokens, after.skipped_tokens) == (1, 5)
    with pytest.raises(InputError, match=r"with skipped tokens 1, b with 5; use the same model for both"):
        before.require(after, "a", "b")
    assert before.fingerprint != after.fingerprint
    for written, read in ((before.to_meta(8), ModelIdentity.of_meta), (before.to_head(), ModelIdentity.of_head)):
        assert read(written).skipped_tokens == 1
        # Earlier versions did not say it.
        old = read({key: value for key, value in written.items() if key != "skipped_tokens"})
        old.require(after, "a", "b")
        after.require(old, "a", "b")
    assert FeatureExtractor.from_pretrained(copy).identity.skipped_tokens is None


# Files


def with_variants(folder: Path) -> None:
    """What conversions put beside fp32: fp16 with half-precision ends, and dynamic int8 under its usual name."""
    from onnxruntime.quantization import quantize_dynamic
    from onnxruntime.transformers.float16 import convert_float_to_float16

    model = onnx.load(folder / "onnx" / "model.onnx")
    half = convert_float_to_float16(model, keep_io_types=False)
    onnx.save(half, folder / "onnx" / "model_fp16.onnx")
    quantize_dynamic(folder / "onnx" / "model.onnx", folder / "onnx" / "model_quantized.onnx")


def test_other_precisions_are_run_and_compared_with_fp32(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_variants(copy)
    folder = ModelFolder(copy)
    assert folder.precisions == ["fp32", "fp16", "int8"]
    checks = {
        (check.engine, check.precision): check
        for check in check_ways(lambda way: FeatureExtractor.open(folder, way), ways_to_run(folder, "fp16"))
    }
    first = checks.pop(("onnxruntime", "fp32"))
    assert first.is_reference
    assert "the reference" in str(first)
    assert all(check.cosine is not None or check.reason for check in checks.values())
    assert checks["onnxruntime", "fp16"].cosine > 0.999  # type: ignore[operator]
    assert 0.9 < checks["onnxruntime", "int8"].cosine < 0.99999  # type: ignore[operator]
    assert checks["openvino", "fp32"].cosine > 0.9999  # type: ignore[operator]
    images, expected = golden_answers(FeatureExtractor.open(folder))
    np.testing.assert_allclose(FeatureExtractor.open(folder).embed(images), expected, atol=1e-6)


def test_the_first_of_several_int8_files_is_taken(copy: Path) -> None:
    for suffix in ("uint8", "quantized", "int8"):
        (copy / "onnx" / f"model_{suffix}.onnx").write_bytes(suffix.encode())
        assert ModelFolder(copy).read("onnx/model_int8.onnx" if suffix == "int8" else f"onnx/model_{suffix}.onnx")
    assert "onnx/model_quantized.onnx" not in ModelFolder(copy).config.files


def test_weights_beside_the_file_are_verified_and_part_of_the_identity(copy: Path, example_files: list[Path]) -> None:
    plain = FeatureExtractor.from_pretrained(copy)
    network = copy / "onnx" / "model.onnx"
    onnx.save(onnx.load(network), network, save_as_external_data=True, location="model.onnx_data", size_threshold=0)
    beside = FeatureExtractor.from_pretrained(copy)
    assert "onnx/model.onnx_data" in beside.config.files
    np.testing.assert_array_equal(beside.embed(example_files[:2]), plain.embed(example_files[:2]))
    folder = ModelFolder(copy)
    data = bytearray((copy / "onnx" / "model.onnx_data").read_bytes())
    data[100] ^= 1
    (copy / "onnx" / "model.onnx_data").write_bytes(data)
    with pytest.raises(ModelFolderError, match=r"model.onnx_data: altered or truncated"):
        FeatureExtractor.open(folder)
    other = FeatureExtractor.from_pretrained(copy).identity
    assert other.weights_sha256 != beside.identity.weights_sha256
    assert other.name != beside.identity.name


def test_pull_takes_the_weights_beside_a_network(copy: Path, hub: FakeHub, alone: Alone, tmp_path: Path) -> None:
    file = copy / "onnx" / "model.onnx"
    onnx.save(onnx.load(file), file, save_as_external_data=True, location="model.onnx_data", size_threshold=0)
    published(hub, copy, "org/dinov2")
    assert alone("-m", "robustfeat", "pull", "org/dinov2", "--precision", "fp32", "--quiet").returncode == 0
    assert {"onnx/model.onnx", "onnx/model.onnx_data"} <= cached(tmp_path / "home")


def test_optimums_own_folder_is_read(repositories: Repositories, tmp_path: Path, example_files: list[Path]) -> None:
    """All files lie side by side, and transformers 5 describes the processors of texts and images in one file."""
    source = repositories("dinov2")
    (tmp_path / "flat").mkdir()
    shutil.copy(source / "config.json", tmp_path / "flat")
    shutil.copy(source / "onnx" / "model.onnx", tmp_path / "flat")
    about = {"processor_class": "X", "image_processor": json.loads((source / "preprocessor_config.json").read_bytes())}
    (tmp_path / "flat" / "processor_config.json").write_text(json.dumps(about))
    ours, flat = (FeatureExtractor.from_pretrained(folder) for folder in (source, tmp_path / "flat"))
    np.testing.assert_array_equal(flat.embed(example_files[:2]), ours.embed(example_files[:2]))
    assert flat.config.name == ours.config.name
    assert flat.identity.same_features(ours.identity)


# Trust


def test_a_hash_pins_a_repository_its_copy_and_the_cache(
    repositories: Repositories, hub: FakeHub, alone: Alone, tmp_path: Path
) -> None:
    source = repositories("dinov2")
    published(hub, source, "org/dinov2")
    local = ModelFolder(source).config_hash
    pulled = alone("-m", "robustfeat", "pull", "org/dinov2", "--out", tmp_path / "own", "--json", "--quiet")
    assert pulled.returncode == 0, pulled.stderr
    assert json.loads(pulled.stdout)["config_hash"] == local
    assert sorted(files_of(tmp_path / "own")) == ["config.json", "onnx/model.onnx", "preprocessor_config.json"]
    assert ModelFolder(tmp_path / "own", config_hash=local).config.name == json.loads(pulled.stdout)["name"]
    pinned = ("-m", "robustfeat", "info", "org/dinov2", "--json", "--config-hash")
    assert json.loads(alone(*pinned, local).stdout)["config_hash"] == local
    asked = len(hub.requests)
    offline = alone(*pinned, local, HF_HUB_OFFLINE="1")
    assert offline.returncode == 0, offline.stderr
    assert len(hub.requests) == asked
    wrong = alone(*pinned, "0" * 64)
    assert wrong.returncode == 1
    assert "the sha256 must be 000000000000..." in wrong.stderr
    # Without the list that was kept, or with a part of it, the cache's files are hashed.
    (kept,) = (tmp_path / "home").glob("hub/models--org--dinov2/.robustfeat/*.json")
    told = json.loads(kept.read_bytes())
    kept.unlink()
    assert json.loads(alone(*pinned, local, HF_HUB_OFFLINE="1").stdout)["config_hash"] == local
    for name in told:
        kept.write_text(json.dumps({name: told[name]}))
        again = alone(*pinned, local, HF_HUB_OFFLINE="1")
        assert again.returncode == 0, again.stderr
        assert json.loads(again.stdout)["config_hash"] == local


def test_an_altered_download_is_refused_by_the_hash_that_the_hub_told(
    repositories: Repositories, hub: FakeHub, alone: Alone, tmp_path: Path
) -> None:
    published(hub, repositories("dinov2"), "org/dinov2")
    assert alone("-m", "robustfeat", "pull", "org/dinov2", "--quiet").returncode == 0
    (network,) = (tmp_path / "home").glob("hub/models--org--dinov2/snapshots/*/onnx/model.onnx")
    blob = network.resolve()
    blob.write_bytes(blob.read_bytes()[:-1] + b"\0")
    result = alone("-m", "robustfeat", "embed", EXAMPLES, "--out", tmp_path / "f.npy", "--model", "org/dinov2")
    assert result.returncode == 1
    assert "onnx/model.onnx: altered or truncated" in result.stderr
    assert "pull org/dinov2 --force" in result.stderr


def test_what_else_lies_in_a_folder_is_not_opened(copy: Path, example_files: list[Path]) -> None:
    before = ModelFolder(copy).config_hash
    (copy / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n")
    (copy / "modeling_dinov2.py").write_text("raise SystemExit")
    config = json.loads((copy / "config.json").read_bytes()) | {"auto_map": {"AutoModel": "modeling_dinov2.Model"}}
    (copy / "config.json").write_text(json.dumps(config))
    extractor = FeatureExtractor.from_pretrained(copy)
    assert extractor.embed(example_files[:1]).shape == (1, 32)
    assert extractor.folder.config_hash != before
    assert not any(name.endswith((".bin", ".py")) for name in extractor.config.files)


# What is refused


def rewrite(folder: Path, **values: Any) -> None:
    data = json.loads((folder / "config.json").read_bytes())
    (folder / "config.json").write_text(json.dumps(data | values))


def test_a_repository_with_pytorch_weights_alone_says_how_it_is_imported(
    repositories: Repositories, hub: FakeHub, alone: Alone
) -> None:
    files = {name: data for name, data in files_of(repositories("dinov2")).items() if not name.startswith("onnx/")}
    hub.add("org/weights", files)
    result = alone("-m", "robustfeat", "info", "org/weights")
    assert result.stderr == (
        "robustfeat: org/weights: has no ONNX file of the whole network (model type 'dinov2'); it has "
        "model.safetensors; make a model folder of it with robustfeat import hf:org/weights\n"
    )


def test_a_model_for_texts_is_named(hub: FakeHub, alone: Alone) -> None:
    hub.add("org/text", {"config.json": b'{"model_type": "bert"}', "onnx/model.onnx": b"x"})
    result = alone("-m", "robustfeat", "info", "org/text")
    assert "org/text: has no preprocessor_config.json, so it takes no images" in result.stderr
    assert "(model type 'bert')" in result.stderr
    assert result.returncode == 1


def test_damaged_descriptions_are_one_line(copy: Path) -> None:
    for content, said in ((b"[]", "must be an object"), (b"{", "not valid JSON")):
        (copy / "preprocessor_config.json").write_bytes(content)
        with pytest.raises(ModelFolderError, match=said):
            ModelFolder(copy)
    (copy / "preprocessor_config.json").unlink()
    with pytest.raises(ModelFolderError, match=r"has no preprocessor_config.json"):
        ModelFolder(copy)
    shutil.rmtree(copy / "onnx")
    with pytest.raises(ModelFolderError, match=r"make a model folder of it with robustfeat import"):
        ModelFolder(copy)


def network_of(inputs: dict[str, list[Any]], outputs: dict[str, list[Any]]) -> bytes:
    """An ONNX file that only has ends."""
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    nodes = [helper.make_node("GlobalAveragePool", [next(iter(inputs))], ["pooled"])]
    nodes += [
        helper.make_node("Flatten" if len(shape) == 2 else "Identity", ["pooled"], [name])
        for name, shape in outputs.items()
    ]
    taken, given = (
        [helper.make_tensor_value_info(name, kind, shape) for name, shape in end.items()] for end in (inputs, outputs)
    )
    graph = helper.make_graph(nodes, "network", taken, given)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    content: bytes = model.SerializeToString()
    return content


@pytest.mark.parametrize(
    ("inputs", "outputs", "said"),
    [
        (
            {"pixel_values": [None, 3, 64, 64]},
            {"pooler_output": [None, 3]},
            r"makes \[3, 56, 56\], but the ONNX file takes \[3, 64, 64\]",
        ),
        ({"pixel_values": [1, 3, 56, 56]}, {"pooler_output": [1, 3]}, "takes batches of exactly 1"),
        (
            {"pixel_values": [None, 3, 56, 56], "input_ids": [None, 7]},
            {"pooler_output": [None, 3]},
            "must have pixel_values as its only input; it has pixel_values, input_ids",
        ),
        (
            {"images": [None, 3, 56, 56]},
            {"pooler_output": [None, 3]},
            "must have pixel_values as its only input; it has images",
        ),
        ({"pixel_values": [None, 3, 56, 56]}, {"logits": [None, 3]}, r"it has logits \(.*, 3\)"),
    ],
)
def test_networks_that_do_not_fit_are_refused_by_name(
    inputs: dict[str, list[Any]], outputs: dict[str, list[Any]], said: str, copy: Path
) -> None:
    (copy / "onnx" / "model.onnx").write_bytes(network_of(inputs, outputs))
    # OpenVINO leaves out an input that nothing uses, as that of this network.
    for engine in ("onnxruntime",) if len(inputs) > 1 else ("onnxruntime", "openvino"):
        with pytest.raises((ModelFolderError, EngineError), match=said):
            FeatureExtractor.from_pretrained(copy, engine=engine)


def test_vectors_that_would_fill_the_memory_are_refused(copy: Path) -> None:
    model = onnx.load_model_from_string(
        network_of({"pixel_values": [None, 3, 56, 56]}, {"pooler_output": [None, None]})
    )
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([1, 10**9, 1, 1]), "times"))
    model.graph.node.insert(1, onnx.helper.make_node("Tile", ["pooled", "times"], ["wide"]))
    model.graph.node[2].input[0] = "wide"
    (copy / "onnx" / "model.onnx").write_bytes(model.SerializeToString())
    for engine in ("onnxruntime", "openvino"):
        with pytest.raises(ModelFolderError, match="features must have at most 1,048,576 numbers; got 3,000,000,000"):
            FeatureExtractor.from_pretrained(copy, engine=engine)


def test_a_mean_of_no_patches_is_refused() -> None:
    outputs = read_outputs({"model_type": "dinov2_with_registers", "num_register_tokens": 400})
    way = choose_pooling("mean", outputs, {"last_hidden_state": [None, None, 5]}, Path())
    with pytest.raises(ValueError, match="it has 9 tokens, of which the first 401 are not patches"):
        way(np.zeros((2, 9, 5), np.float32))


def test_weights_in_a_file_of_another_name_are_not_opened(copy: Path) -> None:
    file = copy / "onnx" / "model.onnx"
    onnx.save(onnx.load(file), file, save_as_external_data=True, location="weights.bin", size_threshold=0)
    said = r"onnx/weights\.bin is not a file that robustfeat uses in this layout; import the ONNX file"
    with pytest.raises(ModelFolderError, match=said):
        FeatureExtractor.from_pretrained(copy)


def test_free_sizes_take_the_contracts_and_the_vectors_length_is_found(copy: Path, example_files: list[Path]) -> None:
    free = network_of({"pixel_values": ["n", "c", "h", "w"]}, {"pooler_output": ["n", "d"]})
    (copy / "onnx" / "model.onnx").write_bytes(free)
    for engine in ("onnxruntime", "openvino"):
        extractor = FeatureExtractor.from_pretrained(copy, pooling="pooler", engine=engine)
        assert (extractor.feature_size, extractor.config.feature_size) == (3, 3)
        assert extractor.embed(example_files[:2]).shape == (2, 3)


# Commands


def test_info_verify_and_models_say_what_it_is(
    repositories: Repositories, hub: FakeHub, alone: Alone, tmp_path: Path
) -> None:
    published(hub, repositories("dinov2"), "org/dinov2")
    info = alone("-m", "robustfeat", "info", "org/dinov2").stdout
    assert "network:       dinov2, 32 features\npooling:       cls, else pooler\n" in info
    assert "input:         56 px, bicubic, crop 0.875\n" in info
    assert "precisions:    fp32 (onnx/model.onnx)\n" in info
    assert cached(tmp_path / "home") == {"config.json", "preprocessor_config.json"}
    verified = alone("-m", "robustfeat", "verify", "org/dinov2")
    assert verified.returncode == 0, verified.stdout + verified.stderr
    assert "onnxruntime fp32  the reference" in verified.stdout
    assert "no golden images" in verified.stderr
    assert "pytorch" not in verified.stdout
    listed = alone("-m", "robustfeat", "models", "--json").stdout.splitlines()
    (found,) = [json.loads(line) for line in listed if "org/dinov2" in line]
    assert found["name"] == ModelFolder(repositories("dinov2")).config.name
    assert found["problem"] is None


def test_a_server_and_its_heads_take_it(repositories: Repositories, tmp_path: Path, example_files: list[Path]) -> None:
    folder, head = repositories("dinov2"), tmp_path / "head"
    fit = ["svm", "fit", EXAMPLES, "--labels", "folder", "--model", folder, "--out", head, "--quiet"]
    subprocess.run([sys.executable, "-m", "robustfeat", *map(str, fit)], check=True, cwd=ROOT)
    extractor = FeatureExtractor.from_pretrained(folder)
    server = Server("--model", folder, "--head", head)
    try:
        photo = example_files[0].read_bytes()
        answer = server.post("/embed", photo, accept="application/json").json
        np.testing.assert_allclose(answer["data"][0]["embedding"], extractor.embed([photo])[0], rtol=1e-4, atol=1e-5)
        assert server.post("/predict/head", photo).json["head"] == "head"
        (served,) = server.get("/info").json["models"]
        assert (served["pooling"], served["config_hash"]) == ("cls", extractor.folder.config_hash)
    finally:
        assert server.stop() == 0


@pytest.mark.parametrize(
    ("name", "pooling"), [("dinov2", "cls"), ("dinov2", "mean"), ("clip", "embeds"), ("resnet", "pooler")]
)
def test_a_head_and_its_network_become_one_file(
    repositories: Repositories, tmp_path: Path, example_files: list[Path], name: str, pooling: str
) -> None:
    options = RunOptions(engine="onnxruntime", device="cpu", threads=1, pooling=pooling)
    extractor = FeatureExtractor.load(str(repositories(name)), options)
    squares = np.stack([extractor.prepare(file) for file in example_files[:12]])
    features = extractor.embed_prepared(squares)
    regression = LogisticRegression().fit(features, np.arange(12) % 3)
    head = Head.from_sklearn(regression, model=extractor.identity)
    plain = {"calibration.scale": np.ones(3), "calibration.offset": np.zeros(3)}
    out = tmp_path / "classifier.onnx"
    export_classifier(dataclasses.replace(head, arrays={**head.arrays, **plain}), extractor, out)
    session = onnxruntime.InferenceSession(out)
    assert [value.name for value in session.get_outputs()] == ["probabilities", "scores"]
    for count in (1, 5, 12):
        pixels = normalise(squares[:count], extractor.config.preprocessing)
        (got,) = session.run(["probabilities"], {"pixel_values": pixels})
        np.testing.assert_allclose(got, regression.predict_proba(features[:count]), rtol=0, atol=2e-5)


def test_it_is_not_pushed_as_one_of_ours(repositories: Repositories) -> None:
    with pytest.raises(ModelFolderError, match=r"another library's layout.*robustfeat import"):
        push_model(ModelFolder(repositories("dinov2")), Target("org/new"))


def test_torchserve_gets_the_files_that_are_used(repositories: Repositories, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(repositories("dinov2"), tmp_path / "model"))
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    settings = Settings(RunOptions(engine="onnxruntime"), 1, 8, 2**20, 10**6, 10.0, 5.0)
    archive = write_archive(ModelFolder(folder), tmp_path, "dinov2", settings, batch_size=None, delay_ms=1)
    with zipfile.ZipFile(archive) as mar:
        mar.extractall(tmp_path / "unpacked")
    unpacked = tmp_path / "unpacked" / MODEL_FOLDER
    assert sorted(files_of(unpacked)) == ["config.json", "onnx/model.onnx", "preprocessor_config.json"]
    assert ModelFolder(unpacked).config_hash == ModelFolder(folder).config_hash
    # A worker starts with what the archive holds.
    start = (
        "import sys, numpy as np; from pathlib import Path; from robustfeat.hub.folder import ModelFolder;"
        "from robustfeat.serving.engines.options import RunOptions;"
        "from robustfeat.serving.torchserve.handler import Handler, Settings; import robustfeat;"
        "worker = Handler(ModelFolder(Path('model')), 'm',"
        " Settings(RunOptions(engine='onnxruntime'), 1, 8, 2**20, 10**6, 10.0, 5.0));"
        "print(robustfeat.__file__, worker.model.extractor.feature_size)"
    )
    place = tmp_path / "unpacked"
    env = {"PYTHONPATH": str(place), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", start], cwd=place, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(place / "robustfeat" / "__init__.py"), "32"]
