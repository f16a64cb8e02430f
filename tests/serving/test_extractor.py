from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import robustfeat
from robustfeat import FeatureExtractor
from robustfeat.errors import DecodeError, EngineError, ModelFolderError
from robustfeat.hub.config import ModelConfig
from robustfeat.hub.folder import ModelFolder, seal_folder
from robustfeat.hub.preprocessing import Preprocessing
from robustfeat.serving.verify import check_golden, cosine


def golden_cosine(extractor: FeatureExtractor) -> float:
    found = check_golden(extractor).cosine
    assert found is not None
    return found


@pytest.fixture(scope="module")
def extractor(model: Path) -> FeatureExtractor:
    return FeatureExtractor.from_pretrained(model, threads=1)


def test_all_kinds_of_images_give_the_same_row(extractor: FeatureExtractor, example_files: list[Path]) -> None:
    file = example_files[0]
    data = file.read_bytes()
    array = np.asarray(Image.open(file).convert("RGB"))
    features = extractor.embed([str(file), file, data, Image.open(io.BytesIO(data)), array])
    assert features.shape == (5, 512)
    assert features.dtype == np.float32
    assert (features == features[0]).all()


@pytest.fixture
def cut_outs(example_files: list[Path], tmp_path: Path) -> list[Path]:
    """Two that look the same and differ where they are transparent."""
    files = []
    photo = np.asarray(Image.open(example_files[0]).convert("RGB").resize((200, 260)))
    hidden = np.zeros(photo.shape[:2], bool)
    hidden[60:200, 50:150] = True
    for name, below in (
        ("black", np.zeros_like(photo)),
        ("noise", np.random.default_rng(0).integers(0, 256, photo.shape)),
    ):
        pixels = np.where(hidden[..., None], below, photo).astype(np.uint8)
        files.append(tmp_path / "cut-outs" / f"{name}.png")
        files[-1].parent.mkdir(exist_ok=True)
        Image.fromarray(np.dstack([pixels, np.where(hidden, 0, 255).astype(np.uint8)])).save(files[-1])
    return files


def test_cut_outs_that_look_the_same_have_the_same_features(
    small_model: Path, cut_outs: list[Path], tmp_path: Path
) -> None:
    extractor = FeatureExtractor.from_pretrained(small_model, threads=1)
    assert extractor.config.preprocessing.version == 2
    kinds = [image for file in cut_outs for image in (file, file.read_bytes(), Image.open(file))]
    features = extractor.embed(kinds)
    assert (features == features[0]).all()
    robustfeat.embed([cut_outs[0].parent], tmp_path / "f.npy", model=small_model, quiet=True)
    assert cosine(np.load(tmp_path / "f.npy"), features[:2]).min() > 0.999999


def write_earlier_model(out: Path) -> None:
    """A small network whose contract has version 1."""
    import torch

    from robustfeat.training.export.folder import Backbone, write_model_folder
    from robustfeat.training.network import build_network, feature_network

    torch.manual_seed(0)
    network = build_network(2, width=8)
    state, architecture = network.state_dict(), "robustfeat:resnet18-width8"
    config = ModelConfig("earlier-v1", architecture, 64, 2, Preprocessing(32, 1.0, version=1))
    write_model_folder(Backbone(feature_network(network), state, config), out, calibration=None)


def test_models_of_version_1_see_what_they_saw(cut_outs: list[Path], tmp_path: Path) -> None:
    earlier = tmp_path / "earlier"
    write_earlier_model(earlier)
    extractor = FeatureExtractor.from_pretrained(earlier, threads=1)
    assert extractor.config.preprocessing.version == 1
    opaque = [Image.open(file).convert("RGB") for file in cut_outs]
    seen = extractor.embed(opaque)
    assert cosine(seen[:1], seen[1:])[0] < 0.9
    assert (extractor.embed(cut_outs) == seen).all()
    robustfeat.embed([cut_outs[0].parent], tmp_path / "f.npy", model=earlier, quiet=True)
    assert cosine(np.load(tmp_path / "f.npy"), seen).min() > 0.999999


def test_golden_images_give_pytorchs_features(extractor: FeatureExtractor) -> None:
    assert golden_cosine(extractor) >= 0.9999


def test_a_vector_is_the_same_alone_and_in_a_batch(extractor: FeatureExtractor, example_files: list[Path]) -> None:
    together = extractor.embed(example_files)  # 40: a full batch and a part of one
    alone = np.concatenate([extractor.embed([file]) for file in example_files])
    assert len(together) == 40
    assert cosine(together, alone).min() >= 0.999999


def test_no_images_give_no_rows(extractor: FeatureExtractor) -> None:
    assert extractor.embed([]).shape == (0, 512)


def test_a_bad_image_is_a_row_of_nan_when_asked(extractor: FeatureExtractor, example_files: list[Path]) -> None:
    good = extractor.embed(example_files[:2])
    mixed = extractor.embed([example_files[0], b"junk", "/no/such.jpg", example_files[1]], on_error="nan")
    np.testing.assert_array_equal(mixed[[0, 3]], good)
    assert np.isnan(mixed[[1, 2]]).all()


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (b"junk", "image 1: not an image"),
        ("/no/such.jpg", "image 1: /no/such.jpg: No such file"),
        (np.zeros((4, 4)), r"image 1: an array must be \(H, W, 3\) uint8"),
        (np.zeros((0, 4, 3), np.uint8), "image 1: an array must be"),
    ],
)
def test_a_bad_image_is_named(
    extractor: FeatureExtractor, example_files: list[Path], image: object, message: str
) -> None:
    with pytest.raises(DecodeError, match=message):
        extractor.embed([example_files[0], image])


def test_a_damaged_pillow_image_is_a_decode_error(extractor: FeatureExtractor, example_files: list[Path]) -> None:
    data = example_files[0].read_bytes()
    with pytest.raises(DecodeError, match="damaged"):
        extractor.embed([Image.open(io.BytesIO(data[: len(data) // 2]))])


@pytest.mark.parametrize("images", ["a.jpg", b"data", Path("a.jpg")])
def test_a_single_image_is_refused(extractor: FeatureExtractor, images: object) -> None:
    with pytest.raises(TypeError, match="put it in a list"):
        extractor.embed(images)  # type: ignore[arg-type]


def test_an_unknown_kind_of_image_is_a_type_error(extractor: FeatureExtractor) -> None:
    with pytest.raises(TypeError, match="got int"):
        extractor.embed([3])


def test_a_folder_with_another_preprocessing_than_its_onnx_is_refused(model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model, tmp_path / "other"))
    config: ModelConfig = ModelFolder(folder).config
    seal_folder(folder, config.replace(preprocessing=Preprocessing(32, 0.5)), "")
    with pytest.raises(ModelFolderError, match="was exported for preprocessing"):
        FeatureExtractor.from_pretrained(folder)


def test_a_precision_that_is_absent_is_refused(model: Path) -> None:
    with pytest.raises(ModelFolderError, match="has no int8 model; it has fp32"):
        FeatureExtractor.from_pretrained(model, precision="int8")


def test_cuda_is_refused_where_it_does_not_run(model: Path) -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime has CUDA")
    with pytest.raises(EngineError, match="runs on the CPU here"):
        FeatureExtractor.from_pretrained(model, device="cuda")


@pytest.mark.parametrize("options", [{"device": "tpu"}, {"engine": "magic"}])
def test_unknown_engines_and_devices_are_refused(model: Path, options: dict[str, str]) -> None:
    with pytest.raises(EngineError, match="expected auto, "):
        FeatureExtractor.from_pretrained(model, **options)  # type: ignore[arg-type]


def test_without_onnx_runtime_exporting_says_what_is_missing(tmp_path: Path, finished_run: Path) -> None:
    for arguments in (["export", str(finished_run)], ["import", "timm:resnet18"]):
        code = (
            "import sys; sys.modules['onnxruntime'] = None\n"
            "from robustfeat.cli import main\n"
            f"sys.argv = ['robustfeat', *{arguments!r}, '--out', {str(tmp_path / 'x')!r}]\n"
            "main()"
        )
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert result.returncode == 1
        assert "this needs onnxruntime: pip install 'robustfeat[cpu]'" in result.stderr  # said before PyTorch loads
        assert len(result.stderr.splitlines()) == 1


def test_without_onnx_runtime_one_line_names_both_wheels(model: Path) -> None:
    code = (
        "import sys; sys.modules['onnxruntime'] = sys.modules['openvino'] = None\n"
        "from robustfeat.cli import cli, main\n"
        f"sys.argv = ['robustfeat', 'embed', {str(model / 'golden')!r}, '--out', 'x.npy', '--model', {str(model)!r}]\n"
        "main()"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert len(result.stderr.splitlines()) == 1
    assert "robustfeat[cpu]" in result.stderr
    assert "robustfeat[gpu]" in result.stderr


def test_int8_is_refused_where_a_golden_image_is_off(tmp_path: Path) -> None:
    """A folder whose golden features were changed stands for a processor on which int8 saturates."""
    folder = Path(shutil.copytree(FeatureExtractor.from_pretrained().folder.path, tmp_path / "model"))
    assert golden_cosine(FeatureExtractor.from_pretrained(folder, precision="int8")) >= 0.99
    features = np.load(folder / "golden" / "features.npy")
    features[0] = features[0][::-1]
    np.save(folder / "golden" / "features.npy", features)
    seal_folder(folder, ModelFolder(folder).config, "")
    with pytest.raises(EngineError, match="int8 is too inexact"):
        FeatureExtractor.from_pretrained(folder, precision="int8")
    assert json.loads((folder / "config.json").read_text())


def test_the_builtin_model_is_the_default(example_files: list[Path]) -> None:
    default = FeatureExtractor.from_pretrained()
    named = FeatureExtractor.from_pretrained("builtin")
    np.testing.assert_array_equal(default.embed(example_files[:3]), named.embed(example_files[:3]))
    assert golden_cosine(default) >= 0.9999
