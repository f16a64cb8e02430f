"""`robustfeat paper`: what needs no data, and all of it on a few hundred small images."""

import csv
import dataclasses
import json
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import numpy as np
import pytest
from PIL import Image

from robustfeat.cli.paper_command import command as paper_command
from robustfeat.errors import (
    CheckpointError,
    DataError,
    DecodeError,
    DivergedError,
    InputError,
    StoppedError,
    TrainingError,
)
from robustfeat.training.concepts import ConceptMap, assign_concepts, load_concepts
from robustfeat.training.data.opening import open_training_data
from robustfeat.training.evaluation.probes import svm
from robustfeat.training.evaluation.subject import open_subject
from robustfeat.training.evaluation.tasks import embed_task, open_task
from robustfeat.training.loop.journal import final_accuracies
from robustfeat.training.loop.trainer import TrainingResult
from robustfeat.training.paper.locks import Locks
from robustfeat.training.paper.measures import Measures
from robustfeat.training.paper.scale import SCALES
from robustfeat.training.paper.study import Machine, Study
from robustfeat.training.paper.subsets import draw_by_concept, same_origin, write_subset
from robustfeat.training.recipe import Recipe
from tests.command_server import CommandServer, ForkedCommand
from tests.conftest import Run


def crops(files: list[Path], rng: np.random.Generator, folder: Path, count: int) -> None:
    """Parts of photographs, 32 px."""
    folder.mkdir(parents=True)
    for number in range(count):
        with Image.open(files[number % len(files)]) as image:
            side = int(min(image.size) * rng.uniform(0.4, 0.9))
            left, top = (int(rng.integers(0, length - side + 1)) for length in image.size)
            image.crop((left, top, left + side, top + side)).resize((32, 32)).save(folder / f"{number}.png")


@pytest.fixture(scope="module")
def benchmark(examples: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two of ImageNet's classes of each concept, 8 and 2 images each, which show clothes."""
    root, rng = tmp_path_factory.mktemp("benchmark"), np.random.default_rng(0)
    concepts = load_concepts("imagenet11")
    folders = sorted(examples.iterdir())
    wnids = [
        [wnid for wnid in sorted(concepts) if concepts[wnid] == name][:2] for name in sorted(set(concepts.values()))
    ]
    for number, wnid in enumerate(sorted(wnid for pair in wnids for wnid in pair)):
        files = sorted(folders[number % len(folders)].glob("*.jpg"))
        crops(files, rng, root / "train" / wnid, 8)
        crops(files, rng, root / "val" / wnid, 2)
    return root


@pytest.fixture(scope="module")
def target(examples: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten classes of clothes, 7 and 4 images each."""
    root, rng = tmp_path_factory.mktemp("target"), np.random.default_rng(1)
    for folder in sorted(examples.iterdir()):
        files = sorted(folder.glob("*.jpg"))
        crops(files[:3], rng, root / "train" / folder.name, 7)
        crops(files[3:], rng, root / "test" / folder.name, 4)
    return root


def rows(file: Path) -> list[dict[str, str]]:
    with open(file, newline="") as handle:
        return list(csv.DictReader(handle))


def test_what_needs_no_data_matches_the_paper(tmp_path: Path, robustfeat: Run) -> None:
    done = robustfeat("paper", "table1", "fig2", "--out", tmp_path / "report")
    assert done.returncode == 0, done.stderr
    concepts = rows(tmp_path / "report" / "table1.csv")
    assert len(concepts) == 11
    assert all(row["classes in the paper"] == row["classes here"] for row in concepts)
    assert {row["mu"]: row["maximum at s"] for row in rows(tmp_path / "report" / "fig2.csv")} == {
        "100": "755", "150": "1534", "200": "2550", "300": "5253",
    }  # fmt: skip
    assert "11 of 11 counts agree." in done.stdout


def test_all_of_it_runs_from_end_to_end(benchmark: Path, target: Path, tmp_path: Path, commands: CommandServer) -> None:
    out = tmp_path / "report"
    targets = [part for name in ("cifar10", "sop", "svhn") for part in ("--target", f"{name}={target}")]
    command = ["paper", "all", "--scale", "tiny", "--quick", "--benchmark", benchmark, *targets, "--out", out]
    command += ["--threads", 1, "--workers", 0, "--device", "cpu"]
    patience = {"robustfeat.training.paper.measures._PATIENCE": 0.5}

    def begin() -> ForkedCommand:
        return commands.start(list(map(str, command)), constants=patience)

    def end(process: ForkedCommand) -> tuple[str, str]:
        stdout, stderr = process.communicate()
        assert process.returncode == 0, stderr
        return stdout, stderr

    done, helper = map(end, [begin(), begin()])
    # Two processes part the work: neither does all of it, and nothing is done twice.
    shares = [re.findall(r"^(\S+): training$", stderr, re.MULTILINE) for _, stderr in (done, helper)]
    assert all(shares)
    assert sorted(shares[0] + shares[1]) == sorted(folder.name for folder in (out / "runs").iterdir())
    assert done[0] == helper[0]
    names = ["table1", "table2", "table3", "table4", "fig2", "fig3", "fig4", "fig5"]
    for name in (*names, "verdicts", "exploratory", "selection", "opinions", "corruptions"):
        kinds = ("csv", "md", "png", "svg") if name.startswith(("fig", "corr", "expl")) else ("csv", "md")
        assert all((out / f"{name}.{kind}").stat().st_size > 50 for kind in kinds), name
    page = (out / "index.html").read_text()
    assert page.count("<section") == 13
    assert page.count("<svg") == 6
    assert f"Targets: {target.name} (for CIFAR-10), at most 30 training images; {target.name} (for SOP)" in page
    assert f"a check of the programs, no result: {benchmark.name}, 160 images, 24 px, 1 epoch" in page
    assert not re.search(r'(src|href)="(?!#)', page)  # nothing is fetched from elsewhere
    table = rows(out / "table2.csv")
    assert [row["method"] for row in table] == ["ERM", "EL", "CL", "HRRL"]
    assert all(row["verdict"] in {"holds", "fails", "undecided"} for row in table[1:])
    assert [row[f"{target.name} (for CIFAR-10)"].split() for row in rows(out / "verdicts.csv")] == [
        [row["here, minus ERM"], row["verdict"]] for row in table[1:]
    ]
    # A cell says what the evaluation of that run says.
    cell = json.loads((out / "cells" / "svm-cifar10-main-hrrl-s1.json").read_text())
    quick = SCALES["quick"]().targets["cifar10"]
    task = open_task("cifar10", str(target), train_rows=quick.train_rows, test_rows=quick.test_rows)
    score = svm(embed_task(open_subject(str(out / "runs" / "main-hrrl-s1")), task))
    assert cell["values"]["accuracy"] == score.accuracy
    # It also says how well the run fitted its own images, and ERM is measured in the selection.
    logged = final_accuracies(out / "runs" / "main-hrrl-s1")
    assert {name: cell["values"][name] for name in logged} == logged
    assert sorted(logged) == ["training_accuracy", "validation_accuracy"]
    (erm, *_) = rows(out / "selection.csv")
    assert erm["model"] == "ERM"
    assert 0 <= float(erm["mean"]) <= 100
    fitted = {"table2", "selection", "opinions", "corruptions", "fig3"}
    assert fitted == {
        name
        for name in fitted
        if all(row.get("training") and row.get("validation") for row in rows(out / f"{name}.csv"))
    }
    # Given again, nothing is computed: neither runs nor features are needed any more.
    (out / "runs").rename(tmp_path / "runs")
    (out / "features.db").unlink()
    assert end(begin())[0] == done[0]
    assert not (out / "runs").exists()


def test_missing_data_is_said_before_anything_is_trained(benchmark: Path, tmp_path: Path, robustfeat: Run) -> None:
    done = robustfeat("paper", "table2", "--quick", "--benchmark", benchmark, "--out", tmp_path / "report")
    assert done.returncode == 1
    assert done.stderr == (
        "robustfeat: more data is needed; give --target cifar10=DATA (CIFAR-10, or what stands for it), "
        "--target sop=DATA (SOP, or what stands for it), --target svhn=DATA (SVHN, or what stands for it)\n"
    )
    with pytest.raises(InputError, match="give `benchmark=DATA`"):
        Measures(Study(tmp_path, SCALES["quick"](), None, {}, Machine())).require_data(["fig4"])
    assert not (tmp_path / "report").exists()
    (tmp_path / "report").write_text("mine")
    for out in (tmp_path / "report", tmp_path / "report" / "more"):
        done = robustfeat("paper", "table1", "--out", out)
        assert done.stderr == f"robustfeat: --out {out}: {tmp_path / 'report'} is a file; name a folder\n"


def test_a_run_of_another_recipe_is_not_taken(benchmark: Path, tmp_path: Path) -> None:
    study = Study(tmp_path, SCALES["quick"](), str(benchmark), {}, Machine("cpu", 1, 0, quiet=True))
    recipe = study.recipe("main", "erm", 0, None, None).replace(epochs=1)
    study.run("main-erm-s0", recipe)
    with pytest.raises(CheckpointError, match=r"main-erm-s0: was trained with lr = 0\.05, this report needs 0\.06"):
        study.run("main-erm-s0", recipe.replace(lr=0.06))


def test_a_report_keeps_to_its_benchmark(benchmark: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(benchmark, other)
    for file in sorted(other.glob("train/*/0.png")):
        file.write_bytes(file.read_bytes() + b"more")
    machine, quick = Machine("cpu", 1, 0, quiet=True), SCALES["quick"]()
    first = Study(tmp_path / "report", quick, str(benchmark), {}, machine)
    first.run(*first.selection_run("erm"))
    with pytest.raises(InputError, match="was drawn from another benchmark or at another scale"):
        Study(tmp_path / "report", quick, str(other), {}, machine).data("main")
    whole = dataclasses.replace(quick, rows=None, selection_rows=None)
    run, recipe = Study(tmp_path / "whole", whole, str(benchmark), {}, machine).selection_run("erm")
    Study(tmp_path / "whole", whole, str(benchmark), {}, machine).run(run, recipe)
    with pytest.raises(CheckpointError, match="was trained on other data"):
        Study(tmp_path / "whole", whole, str(other), {}, machine).run(run, recipe)
    shutil.rmtree(other / "val")
    with pytest.raises(InputError, match="has no validation split"):
        Study(tmp_path / "third", whole, str(other), {}, machine).data("main")


def test_the_biased_benchmark_has_imagenets_shares(benchmark: Path, tmp_path: Path) -> None:
    study = Study(tmp_path, SCALES["quick"](), str(benchmark), {}, Machine("cpu", 1, 0, quiet=True), biased=True)
    images, _ = open_training_data(study.data("biased"))
    assert 56 <= len(images) <= 64  # each class has a whole number
    assert study.title.endswith(
        f"{benchmark.name}, {len(images)} images, 24 px, 1 epoch, with ImageNet's shares of concepts"
    )
    assert study.differences()[0].startswith(f"Pre-trained on {len(images)} images")
    concepts = assign_concepts("imagenet11", images.classes, np.bincount(images.labels))
    counts = dict(zip(concepts.names, concepts.counts.tolist(), strict=True))
    assert (counts["Device"], counts["Dog"], counts["Bird"]) == (8, 8, 4)  # 60 x 0.129, 0.118, 0.059, in pairs


def test_an_image_of_the_benchmark_that_cannot_be_read_is_named_at_once(benchmark: Path, tmp_path: Path) -> None:
    shutil.copytree(benchmark, tmp_path / "copy")
    bad = sorted((tmp_path / "copy" / "val").glob("*/*"))[3]
    bad.write_bytes(b"junk")
    study = Study(tmp_path / "report", SCALES["quick"](), str(tmp_path / "copy"), {}, Machine("cpu", 1, 0, quiet=True))
    with pytest.raises(DecodeError, match=rf"{bad.parent.name}/{bad.name}: .*; repair or remove it"):
        study.data("main")
    assert not list((tmp_path / "report" / "data").glob("[!.]*"))
    # A benchmark that has fewer images than the scale asks for is told as it is.
    few = dataclasses.replace(SCALES["quick"](), rows=1000, selection_rows=100)
    study = Study(tmp_path / "few", few, str(benchmark), {"sop": "there/two  words"}, Machine("cpu", 1, 0, quiet=True))
    assert study.title.endswith(f"{benchmark.name}, 176 images, 24 px, 1 epoch")
    assert study.differences()[0].startswith("Pre-trained on 176 images")
    assert study.differences()[2] == "Targets: two words (for SOP), at most 30 training images."
    assert study.target_title("sop") == "two words (for SOP)"


def test_a_cell_is_of_its_target(benchmark: Path, target: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(target, other)
    shutil.rmtree(other / "train" / "hat")
    shutil.rmtree(other / "test" / "hat")
    machine, quick = (
        Machine("cpu", 1, 0, quiet=True),
        dataclasses.replace(SCALES["quick"](), rows=32, selection_rows=16),
    )
    first, second = (
        Measures(Study(tmp_path / "report", quick, str(benchmark), {"cifar10": str(place)}, machine))
        for place in (target, other)
    )
    first.held_out("el", 1.0, "cifar10")
    with pytest.raises(InputError, match="is the result of another task"):
        second.held_out("el", 1.0, "cifar10")
    first.score("erm", 0, "cifar10")
    with pytest.raises(InputError, match="is the result of another task"):
        second.score("erm", 0, "cifar10")


def test_files_of_a_report_are_written_by_one_process_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["table1", "--out", str(tmp_path)]
    said = Event()
    monkeypatch.setattr(Study, "say", lambda _, text: said.set() if text.endswith("at work on pages") else None)
    with ThreadPoolExecutor() as pool:
        with Locks(tmp_path / "locks", print).held("pages"):
            waiting = pool.submit(paper_command, arguments, standalone_mode=False)
            assert said.wait(60)
            assert not list(tmp_path.glob("table1*"))
        assert waiting.result(timeout=60) == 0
    assert (tmp_path / "table1.csv").exists()


def test_selection_sees_no_test_image(benchmark: Path, target: Path, tmp_path: Path) -> None:
    """With test images that cannot be read, tau and lambda are chosen all the same."""
    blind = tmp_path / "blind"
    for file in target.rglob("*.png"):
        copy = blind / file.relative_to(target)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(b"" if "test" in file.relative_to(target).parts else file.read_bytes())
    places = dict.fromkeys(("cifar10", "sop", "svhn"), str(blind))
    study = Study(tmp_path / "report", SCALES["quick"](), str(benchmark), places, Machine("cpu", 1, 0, quiet=True))
    measures = Measures(study)
    tried = list(measures.grid())
    assert len(tried) == 12
    sums: dict[tuple[str, float], float] = {}
    for method, value, place in tried:
        share = measures.held_out(method, value, place)
        assert share is not None
        sums[method, value] = sums.get((method, value), 0.0) + share
    tau, lam = measures.chosen
    assert tau is not None
    assert lam is not None
    assert sums["el", tau] == max(sums["el", value] for value in study.scale.taus)
    assert sums["cl", lam] == max(sums["cl", value] for value in study.scale.lams)


def test_a_run_that_diverged_is_a_result_and_is_tried_once(
    benchmark: Path, target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def diverge(_: Study, data: str, recipe: Recipe, folder: Path, resume: bool) -> TrainingResult:
        tried.append(folder.name)
        raise DivergedError("the loss is not finite")

    monkeypatch.setattr(Study, "_train", diverge)
    study = Study(tmp_path, SCALES["quick"](), str(benchmark), {"cifar10": str(target)}, Machine("cpu", 1, 0))
    measures = Measures(study)
    assert measures.held_out("el", 1.0, "cifar10") is None
    assert measures.by_step("el", 1.0) is None
    assert measures.by_class("cl", 10.0) is None
    assert tried == ["selection-el-tau1-s100", "selection-cl-lam10-s100"]
    kept = [json.loads(file.read_text())["values"] for file in sorted((tmp_path / "cells").glob("*.json"))]
    assert len(kept) == 3
    assert all("the loss is not finite" in values["diverged"] for values in kept)
    with pytest.raises(DivergedError, match="main-erm-s0: the loss"):  # nothing can be said without it
        measures.score("erm", 0, "cifar10")


@pytest.mark.parametrize(
    ("fix", "said"),
    [
        ("pass fewer `workers`, then resume with `resume=True`", "repeat the command to resume"),
        ("check the driver, or pass `device=cpu`", "check the driver, or pass `device=cpu`"),
        ("free space", "free space"),
    ],
)
def test_fixes_name_nothing_that_a_report_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fix: str, said: str
) -> None:
    def fail(*_: object, **__: object) -> TrainingResult:
        raise TrainingError("a process ended", argument="precision", value="fp16", fix=fix)

    monkeypatch.setattr("robustfeat.training.paper.study.train", fail)
    study = Study(tmp_path, SCALES["quick"](), None, {}, Machine())
    with pytest.raises(TrainingError) as info:
        study._train("data", Recipe(), tmp_path, resume=False)
    assert str(info.value) == f"precision=fp16: a process ended; {said}"


def test_a_signal_in_a_training_ends_the_report_with_its_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> TrainingResult:
        raise StoppedError("stopped", fix="pass `resume=True` to resume it")

    monkeypatch.setattr("robustfeat.training.paper.study.train", stop)
    monkeypatch.setattr(Study, "data", lambda *_: "data")
    with pytest.raises(StoppedError, match="main-erm-s0 is saved as far as it is; give the same command") as caught:
        Study(tmp_path, SCALES["quick"](), None, {}, Machine()).run("main-erm-s0", Recipe())
    assert caught.value.exit_code == 75


def test_what_is_left_out_is_said_before_a_part_is_drawn(
    benchmark: Path, target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = [Path(shutil.copytree(one, tmp_path / one.name)) for one in (benchmark, target)]
    for place in places:
        (next((place / "train").iterdir()) / "photo.psd").touch()
    study = Study(tmp_path / "report", SCALES["quick"](), str(places[0]), {"sop": str(places[1])}, Machine())
    study.images("main")
    study.task("sop")
    said = capsys.readouterr().err.splitlines()
    assert [line.partition(" (")[0] for line in said] == [f"{place / 'train'}: files left out: 1" for place in places]


def test_runs_that_diverged_are_not_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = Study(tmp_path, SCALES["quick"](), None, {}, Machine())
    lost = {0.35, 1.0}
    monkeypatch.setattr(Measures, "held_out", lambda _, method, value, target: None if value in lost else 0.5)
    with pytest.raises(DivergedError, match="el: every run of the selection diverged"):
        _ = Measures(study).chosen
    lost.remove(1.0)
    monkeypatch.setattr(Measures, "held_out", lambda _, method, value, target: None if value in lost else value / 100)
    assert Measures(study).chosen == (1.0, 10.0)
    once = (1.0, "sop")  # the better value, on two of three targets
    monkeypatch.setattr(
        Measures, "held_out", lambda _, method, value, target: None if (value, target) == once else value
    )
    assert Measures(study).chosen == (0.35, 10.0)


def test_a_longer_run_of_erm_lowers_its_rate_as_much_later(tmp_path: Path) -> None:
    scale = SCALES["paper"]()
    recipe = Study(tmp_path, scale, None, {}, Machine()).recipe("main", "erm-long", 0, None, None)
    assert (recipe.method, recipe.epochs, recipe.milestones) == ("erm", 151, (50, 101))
    assert scale.recipe.milestones == (30, 60)


def test_a_biased_subset_has_the_shares_asked_for(benchmark: Path, tmp_path: Path) -> None:
    images, validation = open_training_data(benchmark)
    of_class = np.arange(len(images.classes)) % 2
    concepts = ConceptMap(("few", "many"), of_class, np.bincount(images.labels))
    drawn = draw_by_concept(images.labels, concepts, {"few": 1.0, "many": 4.0}, 55)
    assert np.bincount(images.labels[drawn], minlength=len(of_class)).tolist() == [1, 4] * (len(of_class) // 2)
    write_subset(images, drawn, validation, tmp_path / "subset", {"seed": 0})
    assert same_origin(tmp_path / "subset", {"seed": 0})
    assert not same_origin(tmp_path / "subset", {"seed": 1})
    again, same_validation = open_training_data(tmp_path / "subset")
    assert again.classes == images.classes
    np.testing.assert_array_equal(again.labels, images.labels[drawn])
    assert again.source.read(7) == images.source.read(int(drawn[7]))
    assert len(same_validation) == len(validation)
    with pytest.raises(DataError, match="a class of many has 8 images and 44 are needed for 500"):
        draw_by_concept(images.labels, concepts, {"few": 1.0, "many": 40.0}, 500)
