"""Robustness cards: each figure against a plain computation of the same."""

from __future__ import annotations

import csv
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.spatial.distance import cdist
from torch import nn

from robustfeat.cli.evaluate_command import command as evaluate_command
from robustfeat.cli.rendering import Failure
from robustfeat.hub.card import render_card
from robustfeat.hub.catalog import builtin_model
from robustfeat.hub.preprocessing import Preprocessing
from robustfeat.serving.heads.distance import measure_distance
from robustfeat.serving.heads.head import Head
from robustfeat.serving.heads.reports.reliability import Reliability
from robustfeat.training.concepts import assign_concepts
from robustfeat.training.evaluation.attack import AttackedHead, measure_attack, network_to_attack
from robustfeat.training.evaluation.probes import svm
from robustfeat.training.evaluation.robustness_card import CenteredDistances, Extent, measure_robustness
from robustfeat.training.evaluation.severities import SCALED, corrupt_to_scale
from robustfeat.training.evaluation.subject import NetworkSubject, open_subject
from robustfeat.training.evaluation.tasks import Task, TaskFeatures, embed_task, open_task
from robustfeat.training.export.onnx_import import import_onnx
from tests.training.export.onnx_networks import convolutional

CONTRACT = Preprocessing(32, 1.0)


@pytest.fixture
def subject() -> NetworkSubject:
    """Means of blocks of pixels."""
    return NetworkSubject(nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten()), CONTRACT, "blocks", torch.device("cpu"))


@pytest.fixture
def task(dataset: Path) -> Task:
    return open_task("clothes", str(dataset))


def fitted(subject: NetworkSubject, task: Task, **settings: Any) -> tuple[TaskFeatures, Head]:
    features = embed_task(subject, task)
    head = svm(features, calibrated=True, **settings).head
    assert head is not None
    return features, head


@pytest.fixture
def square(example_files: list[Path]) -> np.ndarray:
    with Image.open(example_files[0]) as image:
        return np.asarray(image.convert("RGB").resize((64, 64)))


@pytest.mark.parametrize(
    ("name", "severity", "side", "expected"),
    [
        ("noise", 5, 32, 0.10),
        ("noise", 5, 64, 0.18),
        ("noise", 5, 224, 0.38),
        ("shot noise", 1, 224, 60),
        ("impulse noise", 3, 64, 0.05),
        ("jpeg", 2, 32, 65),
        ("blur", 4, 224, 4),
        ("blur", 4, 448, 8),  # a length grows with the image
        ("noise", 5, 448, 0.38),
        ("noise", 5, 16, 0.10),
        ("contrast", 1, 32, 0.75),
        ("pixelate", 5, 64, 0.5),
    ],
)
def test_strengths_are_the_published_ones_at_their_sizes(name: str, severity: int, side: int, expected: float) -> None:
    assert SCALED[name].strength(severity, side) == expected


def test_strengths_between_two_sizes_are_linear_in_the_logarithm_of_the_side() -> None:
    share = math.log(112 / 64) / math.log(224 / 64)
    assert SCALED["noise"].strength(1, 112) == pytest.approx(0.04 + share * (0.08 - 0.04))


@pytest.mark.parametrize("name", list(SCALED))
def test_worse_severities_are_further_from_the_image(name: str, square: np.ndarray) -> None:
    moved = [np.abs(corrupt_to_scale(square, name, one).astype(int) - square).mean() for one in (1, 5)]
    assert moved[0] > 0
    # Large pixels that fall on the image's own may be nearer to it than smaller ones beside them.
    assert moved[0] < moved[1] or name == "pixelate"
    np.testing.assert_array_equal(corrupt_to_scale(square, name, 3, 5), corrupt_to_scale(square, name, 3, 5))


def test_shot_noise_has_the_variance_of_counted_photons() -> None:
    grey = np.full((64, 64, 3), 102, np.uint8)  # 0.4 of 255
    noisy = corrupt_to_scale(grey, "shot noise", 2) / 255
    assert noisy.mean() == pytest.approx(0.4, abs=0.005)
    assert noisy.var() == pytest.approx(0.4 / 100, rel=0.1)


def test_impulse_noise_hits_its_share_with_black_and_white() -> None:
    grey = np.full((64, 64, 3), 102, np.uint8)
    values, counts = np.unique(corrupt_to_scale(grey, "impulse noise", 5), return_counts=True)
    assert values.tolist() == [0, 102, 255]
    assert counts[[0, 2]].sum() / counts.sum() == pytest.approx(0.14, abs=0.02)
    assert counts[0] / counts[2] == pytest.approx(1, abs=0.2)


def test_the_calibration_error_is_that_of_a_plain_loop() -> None:
    draw = np.random.default_rng(0)
    confidence = draw.uniform(0.1, 1, 400)
    right = draw.uniform(size=400) < confidence**2
    error = 0.0
    for lowest in range(15):
        inside = [row for row in range(400) if lowest / 15 <= confidence[row] < (lowest + 1) / 15]
        if inside:
            error += len(inside) / 400 * float(abs(np.mean(confidence[inside]) - np.mean(right[inside])))
    assert Reliability.of_confidence(confidence, right, 15).error == pytest.approx(error)


def test_moves_are_measured_from_the_centre_and_against_the_nearest_other_image() -> None:
    draw = np.random.default_rng(0)
    training, clean = (np.abs(draw.normal(size=(count, 20))).astype(np.float32) for count in (50, 12))
    clean[7] = clean[3]  # a copy is no other image
    worse = clean + draw.normal(0, 0.1, clean.shape).astype(np.float32)
    centre = training.astype(np.float64).mean(0)
    before, after = (part - centre for part in (clean, worse))
    before, after = (part / np.linalg.norm(part, axis=1, keepdims=True) for part in (before, after))
    between = cdist(before, before)
    between[between < 1e-6] = np.inf
    expected = np.linalg.norm(after - before, axis=1) / between.min(1)
    found = CenteredDistances(training, clean).moved(slice(0, 12), worse)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    # A constant in all features, which makes all cosines large, changes nothing.
    shifted = CenteredDistances(training + 9, clean + 9).moved(slice(0, 12), worse + 9)
    np.testing.assert_allclose(shifted, expected, rtol=1e-3)


def test_a_single_image_has_no_neighbour() -> None:
    one = np.ones((1, 3), np.float32)
    assert np.isnan(CenteredDistances(np.zeros((2, 3), np.float32), one).moved(slice(0, 1), one)).all()


def test_the_card_is_what_a_plain_loop_measures(subject: NetworkSubject, task: Task, dataset: Path) -> None:
    features, head = fitted(subject, task)
    other = open_task("others", str(dataset), test_rows=6)
    counts = np.bincount(task.train.labels)
    concepts = assign_concepts(str(dataset / "concepts.csv"), task.train.classes, counts)
    card = measure_robustness(subject, task, features, head, Extent(rows=8, concepts=concepts, others=[other]))
    assert card["images"] == 8
    rows = np.sort(np.random.default_rng(0).permutation(10)[:8])
    clean = np.stack([subject.prepare(task.test.image(row)) for row in rows])
    known = measure_distance(head.arrays, features.x_test[rows])
    accuracies, aurocs = [], []
    for name in SCALED:
        for severity in range(1, 6):
            worse = np.stack([corrupt_to_scale(one, name, severity, row) for row, one in enumerate(clean)])
            answers = head.predict(embedded := subject.embed_prepared(worse))
            right = answers == task.test.labels[rows]
            away = measure_distance(head.arrays, embedded)
            auroc = np.mean([(one > two) + 0.5 * (one == two) for one in away for two in known])
            found = card["by_corruption"][name][str(severity)]
            assert found["accuracy"] == pytest.approx(right.mean())
            assert found["auroc"] == pytest.approx(auroc, abs=0.02)  # last bits depend on the batch
            confidence = head.probabilities(embedded).max(1)
            assert found["ece"] == pytest.approx(Reliability.of_confidence(confidence, right, 15).error, abs=1e-4)
            accuracies.append(right.mean())
            aurocs.append(auroc)
    assert card["corrupted"] == pytest.approx(np.mean(accuracies))
    assert card["auroc_corrupted"] == pytest.approx(np.mean(aurocs), abs=0.01)
    unknown = measure_distance(head.arrays, embed_task(subject, other).x_test)
    expected = np.mean([(one > two) + 0.5 * (one == two) for one in unknown for two in known])
    assert card["auroc"] == {"others": pytest.approx(expected, abs=0.02)}
    assert card["attack"] == {"left_out": ""}


def test_worst_classes_and_concepts_are_those_counted_by_hand(
    subject: NetworkSubject, task: Task, dataset: Path
) -> None:
    task = Task(task.name, task.train, task.train)  # three images a class
    features, head = fitted(subject, task, cs=[0.001], scalings=["none"])
    concepts = assign_concepts(str(dataset / "concepts.csv"), task.train.classes, np.bincount(task.train.labels))
    card = measure_robustness(subject, task, features, head, Extent(rows=4, concepts=concepts))
    with open(dataset / "concepts.csv") as handle:
        concept_of = {line["class"]: line["concept"] for line in csv.DictReader(handle)}
    hits: dict[str, list[bool]] = {}
    for answer, label in zip(head.predict(features.x_test), task.test.labels, strict=True):
        name = task.test.classes[label]
        for group in (f"class {name}", f"concept {concept_of[name]}"):
            hits.setdefault(group, []).append(answer == label)
    for kind in ("class", "concept"):
        shares = {group: np.mean(own) for group, own in hits.items() if group.startswith(kind)}
        worst = card[f"worst_{kind}"]
        assert worst["accuracy"] == pytest.approx(min(shares.values()))
        assert shares[f"{kind} {worst['name']}"] == min(shares.values())
        assert worst["images"] == len(hits[f"{kind} {worst['name']}"])


def test_a_head_without_held_out_rows_has_no_probabilities(subject: NetworkSubject, task: Task) -> None:
    firsts = np.sort(np.unique(task.train.labels, return_index=True)[1])
    few = Task(task.name, task.train.subset(firsts), task.test)
    features, head = fitted(subject, few)
    card = measure_robustness(subject, few, features, head, Extent(rows=3, others=[task]))
    assert (card["ece"], card["ece_corrupted"], card["auroc_corrupted"]) == (None, None, None)
    assert card["auroc"] == {"clothes": None}


def test_the_attack_finds_the_boundary_of_a_linear_network(subject: NetworkSubject, task: Task) -> None:
    """There, the distance to another answer is a formula."""
    features, head = fitted(subject, task, cs=[0.01], scalings=["none"])
    margins = head.margins(features.x_test)
    # A feature is the mean of 64 normalised values, so a pixel moves it by 1 / (64 std).
    weights = head.arrays["coefficients"].reshape(10, 3, 16) / np.array(CONTRACT.std)[:, None]
    lengths = []
    for own, row in zip(margins.argmax(1), margins, strict=True):
        away = [
            (row[own] - row[one]) / (np.linalg.norm(weights[own] - weights[one]) / 8) for one in range(10) if one != own
        ]
        lengths.append(min(away))
    found = measure_attack(subject, head, task.test)
    assert found["changed"] == 1
    assert np.median(lengths) <= found["l2"] <= 1.05 * np.median(lengths)
    assert found["levels"] == pytest.approx(255 * found["l2"] / math.sqrt(3 * 32 * 32))


@pytest.mark.parametrize("scaling", ["none", "l2", "standard"])
def test_the_attacked_margins_are_those_of_the_head(subject: NetworkSubject, task: Task, scaling: str) -> None:
    features, head = fitted(subject, task, scalings=[scaling])
    squares = np.stack([subject.prepare(task.test.image(row)) for row in range(10)])
    pixels = torch.from_numpy(squares.transpose(0, 3, 1, 2) / np.float32(255))
    with torch.no_grad():
        margins = AttackedHead(subject, head)(pixels)
    np.testing.assert_allclose(margins.numpy(), head.margins(features.x_test), atol=1e-4)


def test_a_folder_is_attacked_as_its_network_and_without_foolbox_not_at_all(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = open_subject(str(model))
    network, reason = network_to_attack(str(model), subject)
    assert isinstance(network, NetworkSubject)
    assert reason == ""
    monkeypatch.setitem(sys.modules, "foolbox", None)
    network, reason = network_to_attack(str(model), subject)
    assert network is None
    assert "pip install 'robustfeat[attack]'" in reason


def test_a_network_without_weights_in_pytorch_is_left_out(tmp_path: Path) -> None:
    file = convolutional(tmp_path / "files" / "net.onnx")
    import_onnx(file, tmp_path / "net", mean=[0.5], std=[0.25], output="vector", name="net-v1", license_id="mit")
    network, reason = network_to_attack(str(tmp_path / "net"), open_subject(str(tmp_path / "net")))
    assert network is None
    assert reason.startswith("it needs the network in PyTorch (")


def arguments(model: str, dataset: Path, *options: object) -> list[str]:
    return [model, "--task", f"clothes={dataset}", "--no-few-shot", "--quiet", *map(str, options)]


def test_the_command_writes_a_card_in_each_format(
    model: Path, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cards = {suffix: tmp_path / f"card.{suffix}" for suffix in ("md", "csv", "json", "svg", "png")}
    options = ["--robustness", "--robustness-rows", 5, "--attack-rows", 1, "--out", tmp_path / "r.json"]
    options += ["--concepts", f"clothes={dataset / 'concepts.csv'}", "--task", f"others={dataset / 'train'}"]
    options += [part for file in cards.values() for part in ("--card", file)]
    assert evaluate_command(arguments(str(model), dataset, *options), standalone_mode=False) == 0
    printed = capsys.readouterr().out
    results = json.loads((tmp_path / "r.json").read_text())
    first = results[0]["robustness"]
    assert printed.endswith(f"\n\n{cards['md'].read_text()}")
    heading, _, row = [line for line in printed.splitlines() if line.startswith("|")][4:7]
    cells = dict(zip(*([cell.strip() for cell in line.split("|")] for line in (heading, row)), strict=True))
    assert cells["corrupted"] == f"{100 * first['corrupted']:.2f}"
    assert cells["AUROC, other tasks"] == f"{first['auroc']['others']:.3f}"
    worst = first["worst_concept"]
    assert cells["worst concept"] == f"{worst['name']} {100 * worst['accuracy']:.2f} ({worst['images']})"
    assert cells["attack, L2"] == f"{first['attack']['l2']:.3f}"
    assert "on at most 5 test images per task and corruption" in " ".join(printed.split())
    with open(cards["csv"], newline="") as handle:
        lines = list(csv.DictReader(handle))
    assert len(lines) == 2 * 41
    worse = [float(line["accuracy"]) for line in lines if line["task"] == "clothes" and line["severity"] != "0"]
    assert np.mean(worse) == pytest.approx(first["corrupted"])
    assert b"<svg" in cards["svg"].read_bytes()
    with Image.open(cards["png"]) as picture:
        assert picture.width > 500
    # The results of a model card, which `export` takes.
    card = render_card(builtin_model().config.replace(results=json.loads(cards["json"].read_text())))
    assert row in card
    assert "How robustness was measured: Accuracies and ECE are in %" in card


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--card", "card.md"], "--card: applies to --robustness"),
        (["--attack-rows", "3"], "--attack-rows: applies to --robustness"),
        (["--robustness", "--card", "card.pdf"], "--card card.pdf: expected a name ending in .csv, .json, .md"),
        (["--robustness", "--card", "a/../one.md", "--out", "one.md"], "--card a/../one.md: is also the file of --out"),
        (["--robustness", "--concepts", "pets=classes"], "--concepts pets: there is no task of this name"),
        (["--robustness", "--concepts", "clothes=nowhere.csv"], "--concepts nowhere.csv: cannot be read"),
    ],
)
def test_what_cannot_be_measured_is_said_first(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Failure, match=re.escape(message)):
        evaluate_command(arguments("builtin", dataset, *options), standalone_mode=False)
