"""q0 from a target's images, and from a file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from robustfeat.errors import DataError
from robustfeat.hub.preprocessing import decode, preprocess
from robustfeat.serving.heads.shares import fit_shares
from robustfeat.training.concepts import ConceptMap, load_reference
from robustfeat.training.network import build_network
from robustfeat.training.target import estimate_reference
from tests.conftest import Run, train_arguments

Array = NDArray[np.float64]


def probabilities(model: Path, examples: Path) -> tuple[Array, list[str], Array]:
    """(n, K) of the examples, by the whole network in PyTorch; the K concepts' names and shares of classes."""
    from safetensors.torch import load_file

    from robustfeat.hub.folder import ModelFolder

    training = json.loads((model / "training.json").read_text())
    network = build_network(len(training["classes"]))
    network.load_state_dict(load_file(model / "model.safetensors"))
    network.eval()
    contract = ModelFolder(model).config.preprocessing
    images = [decode(file.read_bytes()) for file in sorted((examples / "hat").glob("*.jpg"))]
    with torch.no_grad():
        logits = network(torch.from_numpy(preprocess(images, contract)))
    softmax = nn.functional.softmax(logits.double(), 1).numpy()
    of_class = np.array(training["concept_of_class"])
    concepts = range(len(training["concepts"]))
    found = np.stack([softmax[:, of_class == concept].sum(1) for concept in concepts], 1)
    return found, training["concepts"], np.array([(of_class == concept).mean() for concept in concepts])


def test_the_estimate_is_the_mean_softmax_by_concept(model: Path, dataset: Path, examples: Path) -> None:
    shares, names, _ = probabilities(model, examples)
    estimate = estimate_reference(str(examples / "hat"), str(dataset / "concepts.csv"), str(model))
    assert estimate == pytest.approx(dict(zip(names, shares.mean(0), strict=True)), abs=1e-5)
    assert sum(estimate.values()) == pytest.approx(1, abs=1e-5)


def test_by_em_the_estimate_is_fitted_to_the_images(model: Path, dataset: Path, examples: Path) -> None:
    shares, names, prior = probabilities(model, examples)
    estimate = estimate_reference(str(examples / "hat"), str(dataset / "concepts.csv"), str(model), rule="em")
    fitted = fit_shares(shares, prior, least=0.1 / len(names))
    assert estimate == pytest.approx(dict(zip(names, fitted, strict=True)), abs=1e-3)
    assert estimate != pytest.approx(dict(zip(names, shares.mean(0), strict=True)), abs=0.01)


def test_images_that_cannot_be_read_do_not_count(
    model: Path, dataset: Path, examples: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    concepts = str(dataset / "concepts.csv")
    folder = tmp_path / "target"
    shutil.copytree(examples / "hat", folder)
    whole = estimate_reference(str(folder), concepts, str(model))
    (folder / "bad.jpg").write_bytes(b"junk")
    (folder / "gone.jpg").symlink_to(tmp_path / "nowhere")
    (folder / "b.psd").write_bytes(b"")
    assert estimate_reference(str(folder), concepts, str(model)) == whole
    assert capsys.readouterr().err == ""
    estimate_reference(str(folder), concepts, str(model), quiet=False)
    assert "target: files left out: 1 (.psd 1); images that cannot be decoded: 2\n" in capsys.readouterr().err
    for file in folder.glob("*.jpg"):
        file.unlink()
    (folder / "bad.jpg").write_bytes(b"junk")
    with pytest.raises(DataError, match="none of its 1 images can be decoded"):
        estimate_reference(str(folder), concepts, str(model))


def test_a_model_without_classes_is_refused(model: Path, examples: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="classes have no concept"):
        estimate_reference(str(examples / "hat"), "imagenet11", str(model))
    copy = Path(shutil.copytree(model, tmp_path / "model"))
    (copy / "training.json").write_text("{}")
    with pytest.raises(DataError, match=r"has no named classes .* pass a model that robustfeat trained"):
        estimate_reference(str(examples / "hat"), "imagenet11", str(copy))
    config = json.loads((copy / "config.json").read_text())
    config["robustfeat"]["recipe"]["labels"] = False
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match="was trained with `projection` or without labels, so no classifier"):
        estimate_reference(str(examples / "hat"), "imagenet11", str(copy))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("concept,share\nbird,0.2\nbird,0.3\n", "line 3 needs a new concept and a share >= 0; got 'bird', '0.3'"),
        ("concept,share\nbird,-1\n", "line 2 needs a new concept"),
        ("concept,share\nbird,many\n", "line 2 needs a new concept"),
        ("bird,1\n", "the first line must be concept,share; got bird,1"),
        ("concept,share\nbird," + "1" * 200_000 + "\n", "not a CSV file"),
        ("concept,share\nbird\n", "line 2 needs a concept and a share; got 'bird'"),
    ],
)
def test_bad_references_are_explained(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "q0.csv"
    file.write_text(text)
    with pytest.raises(DataError, match=message):
        load_reference(str(file))


def test_a_run_starts_at_the_reference_of_its_target(
    dataset: Path, model: Path, examples: Path, tmp_path: Path, robustfeat: Run
) -> None:
    arguments = train_arguments(dataset, tmp_path / "run", epochs=1, **{"lambda": 1e9})
    arguments += ["--set", "target_rule=em"]
    result = robustfeat(*arguments, "--target", examples / "hat", "--target-model", model)
    assert result.returncode == 0, result.stderr
    estimate = estimate_reference(str(examples / "hat"), str(dataset / "concepts.csv"), str(model), rule="em")
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert dict(zip(sorted(estimate), line["q"], strict=True)) == pytest.approx(estimate, abs=1e-4)
    assert "q0 of" in result.stderr
    (tmp_path / "q0.csv").write_text("concept,share\nupper,1\nother,3\n")
    arguments = train_arguments(dataset, tmp_path / "second", epochs=1, **{"lambda": 1e9})
    assert robustfeat(*arguments, "--reference", tmp_path / "q0.csv", "--quiet").returncode == 0
    line = json.loads((tmp_path / "second" / "metrics.jsonl").read_text().splitlines()[0])
    assert line["q"] == pytest.approx([0.75, 0.25], abs=1e-4)


def test_a_reference_names_every_concept_that_is_there() -> None:
    concepts = ConceptMap(("bird", "dog"), np.array([0, 1]), np.array([5, 5]), empty=("cat",))
    np.testing.assert_allclose(concepts.distribution({"bird": 3, "dog": 1, "cat": 4}), [0.75, 0.25])
    with pytest.raises(DataError, match="no share for concept 'dog'; add one, 0 if that is meant"):
        concepts.distribution({"bird": 1})
    with pytest.raises(DataError, match="'fish' is no concept here; known are bird, dog"):
        concepts.distribution({"bird": 1, "dog": 1, "fish": 1})


def test_a_target_is_told_by_classes_that_need_concepts(dataset: Path, examples: Path) -> None:
    concepts = str(dataset / "concepts.csv")
    with pytest.raises(
        DataError, match=r"target=.*builtin tells the target's concepts by classes of its own"
    ) as caught:
        estimate_reference(str(examples / "hat"), concepts)
    assert f"too: `concepts={concepts}`: " in str(caught.value)


def test_both_references_at_once_are_refused(dataset: Path, tmp_path: Path, robustfeat: Run) -> None:
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    arguments = [*train_arguments(dataset, tmp_path / "run"), "--reference", "x.csv", "--target", tmp_path]
    result = robustfeat(*arguments)
    assert (result.returncode, result.stderr) == (
        1,
        "robustfeat: --reference and --target: both give q0; pass one of them\n",
    )
