"""`robustfeat export --head`: one ONNX file that answers as the head does, and says by itself how to use it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import openvino
import pytest
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.multioutput import MultiOutputClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import Normalizer, StandardScaler
from sklearn.svm import LinearSVC

import robustfeat.training.export.classifier as exporting
from robustfeat import FeatureExtractor, Head
from robustfeat.errors import ExportError, InputError
from robustfeat.hub.preprocessing import Preprocessing, normalise
from robustfeat.serving.engines.options import RunOptions
from robustfeat.training.export.classifier import export_classifier
from robustfeat.training.export.graph_head import put_head
from robustfeat.training.export.onnx_import import import_onnx
from tests import built_in
from tests.conftest import ROOT, Run
from tests.training.export.bare_command import run_without_torch
from tests.training.export.onnx_networks import convolutional
from tests.training.export.test_graph_head import complete

Array = NDArray[Any]
Answers = dict[str, Array]

ON_PROCESSOR = RunOptions(engine="onnxruntime", device="cpu", threads=1)


def run_file(file: Path, pixels: Array) -> Answers:
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, {"pixel_values": pixels}), strict=True))


def metadata(file: Path) -> dict[str, Any]:
    found = {entry.key: entry.value for entry in onnx.load(file).metadata_props}
    texts = {"robustfeat.usage", "robustfeat.preprocessing_hash"}
    return {key: value if key in texts else json.loads(value) for key, value in found.items()}


def squares_of(extractor: FeatureExtractor, files: list[Path]) -> Array:
    return np.stack([extractor.prepare(file) for file in files])


@pytest.fixture(scope="module")
def small(small_model: Path) -> FeatureExtractor:
    return FeatureExtractor.load(str(small_model), ON_PROCESSOR)


@pytest.fixture(scope="module")
def features(small: FeatureExtractor, example_files: list[Path]) -> Array:
    return small.embed_prepared(squares_of(small, example_files))


LABELS: dict[str, Callable[[list[str]], Array]] = {
    "ten classes": np.array,
    "two classes": lambda names: np.where(np.array(names) == "hat", "hat", "no hat"),
    "several labels": lambda names: np.stack([np.char.startswith(names, "s"), np.char.endswith(names, "t")], 1),
}


def numbers(wanted: Array) -> Array:
    """Classes as numbers; several labels as they are."""
    return wanted if wanted.ndim == 2 else np.unique(wanted, return_inverse=True)[1]


@pytest.mark.parametrize("task", LABELS)
@pytest.mark.parametrize("kind", ["svm", "logistic"])
def test_the_file_gives_the_answers_of_the_head(
    kind: str, task: str, small: FeatureExtractor, features: Array, example_files: list[Path], tmp_path: Path
) -> None:
    wanted = LABELS[task]([file.parent.name for file in example_files])
    classifier: Any = LinearSVC(dual=False) if kind == "svm" else LogisticRegression()
    pipeline = make_pipeline(
        StandardScaler(), MultiOutputClassifier(classifier) if wanted.ndim == 2 else classifier
    ).fit(features, wanted)
    head = complete(Head.from_sklearn(pipeline, model=small.identity), features, numbers(wanted))
    out = tmp_path / "alone" / "classifier.onnx"
    out.parent.mkdir()
    report = export_classifier(head, small, out)
    assert [file.name for file in out.parent.iterdir()] == ["classifier.onnx"]
    assert report.size_bytes == out.stat().st_size
    assert max(report.differences[name] for name in ("probabilities", "scores")) <= 1e-5
    pixels = normalise(squares_of(small, example_files), small.config.preprocessing)
    margins = head.margins(features)
    for count in (1, 3, 40):
        got = run_file(out, pixels[:count])
        assert {values.dtype.name for values in got.values()} == {"float32"}
        np.testing.assert_allclose(got["probabilities"], head.calibrate(margins)[:count], rtol=0, atol=1e-5)
        np.testing.assert_allclose(got["scores"], margins[:count], rtol=0, atol=1e-5 * np.abs(margins).max())
        np.testing.assert_allclose(got["typicality"], head.typicality(features)[:count], rtol=0, atol=1e-5)
    predicted = np.asarray(pipeline.predict(features))
    if task == "several labels":
        assert ((got["scores"] > 0) == predicted).all()
    else:
        assert (np.array(metadata(out)["robustfeat.classes"])[got["scores"].argmax(1)] == predicted).all()
    exact = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.compile_model(openvino.Core().read_model(out), "CPU", exact)
    found = compiled(pixels[:7])
    for name in ("probabilities", "scores", "distance", "typicality"):
        np.testing.assert_allclose(found[name], got[name][:7], rtol=1e-4, atol=1e-5 * np.abs(got[name]).max())


def test_probabilities_are_scikit_learns(
    small: FeatureExtractor, features: Array, example_files: list[Path], tmp_path: Path
) -> None:
    wanted = np.array([file.parent.name for file in example_files])
    pipeline = make_pipeline(Normalizer(), LogisticRegression()).fit(features, wanted)
    head = Head.from_sklearn(pipeline, model=small.identity)
    # A multinomial regression is calibrated by itself.
    plain = {"calibration.scale": np.ones(10), "calibration.offset": np.zeros(10)}
    export_classifier(replace(head, arrays={**head.arrays, **plain}), small, tmp_path / "classifier.onnx")
    pixels = normalise(squares_of(small, example_files), small.config.preprocessing)
    got = run_file(tmp_path / "classifier.onnx", pixels[:13])
    assert list(got) == ["probabilities", "scores"]
    np.testing.assert_allclose(got["probabilities"], pipeline.predict_proba(features)[:13], rtol=0, atol=1e-5)
    export_classifier(head, small, tmp_path / "scores.onnx")
    assert list(run_file(tmp_path / "scores.onnx", pixels[:2])) == ["scores"]


@pytest.mark.parametrize("precision", ["int8", "fp16"])
def test_other_precisions_answer_as_the_head_does_for_their_features(
    precision: str, small_model: Path, features: Array, example_files: list[Path], tmp_path: Path
) -> None:
    extractor = FeatureExtractor.load(str(small_model), replace(ON_PROCESSOR, precision=precision))
    names = [file.parent.name for file in example_files]
    pipeline = make_pipeline(StandardScaler(), LinearSVC(dual=False)).fit(features, names)
    head = complete(Head.from_sklearn(pipeline, model=extractor.identity), features, numbers(np.array(names)))
    export_classifier(head, extractor, tmp_path / "classifier.onnx")
    squares = squares_of(extractor, example_files)
    expected = head.probabilities(extractor.embed_prepared(squares[:9]))
    got = run_file(tmp_path / "classifier.onnx", normalise(squares[:9], extractor.config.preprocessing))
    np.testing.assert_allclose(got["probabilities"], expected, rtol=0, atol=1e-5)
    assert metadata(tmp_path / "classifier.onnx")["robustfeat.model"]["precision"] == precision


def test_an_imported_network_is_taken(example_files: list[Path], tmp_path: Path) -> None:
    file = convolutional(tmp_path / "net.onnx", last="scores", outputs=("scores",))
    import_onnx(file, tmp_path / "model", mean=[0.5], std=[0.25], int8=False)
    extractor = FeatureExtractor.load(str(tmp_path / "model"), ON_PROCESSOR)
    squares = squares_of(extractor, example_files)
    features = extractor.embed_prepared(squares)
    names = np.array([file.parent.name for file in example_files])
    head = complete(
        Head.from_sklearn(LinearSVC(dual=False).fit(features, names), model=extractor.identity),
        features,
        numbers(names),
    )
    export_classifier(head, extractor, tmp_path / "classifier.onnx")
    got = run_file(tmp_path / "classifier.onnx", normalise(squares, extractor.config.preprocessing))
    np.testing.assert_allclose(got["probabilities"], head.probabilities(features), rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def classifier(clothes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The head of the example photographs with the built-in model, as a machine without PyTorch exports it."""
    out = tmp_path_factory.mktemp("classifier") / "classifier.onnx"
    result = run_without_torch("export", "--head", clothes, "--out", out, "--json", "--quiet")
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    about = json.loads(result.stdout)
    assert about["out"] == str(out)
    assert about["classes"] == 10
    assert about["bytes"] == out.stat().st_size
    assert about["differences"]["probabilities"] <= 1e-5
    return out


def test_the_file_says_how_to_use_it(classifier: Path, clothes: Path) -> None:
    about, head, extractor = metadata(classifier), Head.load(clothes), FeatureExtractor.from_pretrained(threads=1)
    assert about["robustfeat.classes"] == list(head.classes)
    assert Preprocessing.from_dict(about["robustfeat.preprocessing"]) == extractor.config.preprocessing
    assert about["robustfeat.preprocessing_hash"] == extractor.config.preprocessing.hash
    assert about["robustfeat.model"]["config_hash"] == extractor.folder.config_hash
    assert about["robustfeat.model"]["weights_sha256"] == extractor.identity.weights_sha256
    assert about["robustfeat.head"]["sha256"] == head.sha256
    assert about["robustfeat.head"]["multi_label"] is False
    assert about["robustfeat.classifier_version"] == 1
    for name in ("pixel_values", "scores", "probabilities", "typicality", f"the shorter side to {built_in.SIDE} px"):
        assert name in about["robustfeat.usage"]
    model = onnx.load(classifier, load_external_data=False)
    assert not [tensor.name for tensor in model.graph.initializer if tensor.data_location]
    ends = [(one.name, one.type.tensor_type.shape.dim) for one in (*model.graph.input, *model.graph.output)]
    sides = {name: [side.dim_param or side.dim_value for side in dimensions] for name, dimensions in ends}
    assert sides == {
        "pixel_values": ["batch", *built_in.SHAPE[1:]],
        "probabilities": ["batch", 10],
        "scores": ["batch", 10],
        "distance": ["batch"],
        "typicality": ["batch"],
    }


def test_the_lines_in_the_docs_give_the_answers_of_svm_predict(
    classifier: Path, clothes: Path, examples: Path, python: Run, robustfeat: Run, tmp_path: Path
) -> None:
    text = (ROOT / "docs" / "heads.md").read_text("utf-8")
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "classifier.onnx" in block)
    assert "import robustfeat" not in code
    assert "from robustfeat" not in code
    lines = [line for line in code.splitlines() if line and "import " not in line]
    assert len(lines) <= 12
    shutil.copy(classifier, tmp_path)
    saving = "import numpy\nnumpy.save('answer.npy', numpy.concatenate([probabilities[0], typicality]))"
    for photo in ("hat/hat-1.jpg", "dress/dress-2.jpg", "shoes/shoes-3.jpg"):
        file = examples / photo
        ready = code.replace("examples/images/hat/hat-1.jpg", str(file))
        result = python(f"{ready}\n{saving}", cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        found = np.load(tmp_path / "answer.npy")
        wanted = robustfeat("svm", "predict", clothes, file, "--probabilities", "--json", "--quiet")
        answer = json.loads(wanted.stdout)
        assert result.stdout.split()[0] == answer["prediction"]
        # Pillow resizes the whole image there, and here what the crop keeps: one of 255 levels.
        np.testing.assert_allclose(found[:-1], list(answer["probabilities"].values()), rtol=0, atol=5e-3)
        assert abs(found[-1] - answer["typicality"]) <= 0.05


def test_mistakes_are_one_line_and_leave_nothing(clothes: Path, model: Path, robustfeat: Run, tmp_path: Path) -> None:
    out = tmp_path / "classifier.onnx"
    for arguments, code, reason in [
        (["--head", clothes, "--out", out, "--model", model], 1, f"needs features of {built_in.NAME}"),
        (["--head", tmp_path, "--out", out], 1, "not a head"),
        (["--head", clothes, "--out", tmp_path / "no" / "c.onnx"], 1, "make it first"),
        (["--head", clothes, "--out", ROOT / "README.md"], 2, "expected a name ending in .onnx"),
        (["--head", clothes, "--out", out, "--best"], 2, "--best is for the export of a run"),
        (["run", "--out", out, "--precision", "int8"], 2, "--precision is for the export of a head"),
        (["run", "--head", clothes, "--out", out], 2, "not both"),
        (["--out", out], 2, "pass RUN or --head HEAD"),
    ]:
        result = robustfeat("export", *arguments)
        assert result.returncode == code, result.stderr
        assert reason in result.stderr
        if code == 1:
            assert result.stderr.count("\n") == 1
    without = run_without_torch("export", "--head", clothes, "--out", out, missing="onnx")
    assert without.stderr == "robustfeat: this needs onnx: pip install 'robustfeat[onnx]'\n"
    assert not list(tmp_path.iterdir())
    out.write_bytes(b"mine")
    result = robustfeat("export", "--head", clothes, "--out", out)
    assert "exists already" in result.stderr
    assert out.read_bytes() == b"mine"


def test_a_file_with_other_answers_is_refused(
    small: FeatureExtractor, features: Array, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = Head.from_sklearn(LinearSVC(dual=False).fit(features, np.arange(40) % 4), model=small.identity)

    def wrong(graph: onnx.GraphProto, head: Head, features: str, opset: int) -> None:
        arrays = {**head.arrays, "intercepts": head.arrays["intercepts"] + 0.1}
        put_head(graph, replace(head, arrays=arrays), features, opset)

    monkeypatch.setattr(exporting, "put_head", wrong)
    with pytest.raises(ExportError, match="other scores than the head"):
        export_classifier(head, small, tmp_path / "classifier.onnx")
    assert not list(tmp_path.iterdir())


def test_a_head_of_another_model_is_refused(small: FeatureExtractor, features: Array, tmp_path: Path) -> None:
    other = replace(small.identity, weights_sha256="0" * 64)
    head = Head.from_sklearn(LinearSVC(dual=False).fit(features, np.arange(40) % 4), model=other)
    with pytest.raises(InputError, match="the head: needs features of"):
        export_classifier(head, small, tmp_path / "classifier.onnx")
