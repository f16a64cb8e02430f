"""Teachers: their features, the loss, and runs that learn from them, with labels and without."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file
from torch.nn import functional

from robustfeat import FeatureExtractor
from robustfeat.cli.train_command import command
from robustfeat.errors import CheckpointError, DataError, InputError
from robustfeat.serving.verify import check_golden
from robustfeat.training.clusters import CLUSTERS_NAME, Clusters, find_clusters
from robustfeat.training.concepts import ConceptMap
from robustfeat.training.data.batches import EpochPlan, TrainingBatches
from robustfeat.training.data.opening import open_training_data
from robustfeat.training.export.runs import export_run
from robustfeat.training.hrrl import step_along
from robustfeat.training.loop import kept_features
from robustfeat.training.loop.checkpoint import load_checkpoint, require_same_recipe
from robustfeat.training.loop.ranks import Ranks
from robustfeat.training.loop.step import Guidance, TrainingStep
from robustfeat.training.loop.trainer import train
from robustfeat.training.network import StepOutput
from robustfeat.training.objective import Objective, StepBatch, create_objective
from robustfeat.training.recipe import Recipe
from robustfeat.training.teacher import Teacher, resolve_teacher
from tests.command_server import CommandServer
from tests.conftest import train_arguments
from tests.training import small
from tests.training.loop.test_distributed import run_ranks
from tests.training.small import run, run_one_epoch
from tests.training.test_objective import CONCEPTS, CPU, SMALL, pixels, seen

SIZE = 6
TAUGHT = dataclasses.replace(SMALL, teacher="any", teacher_size=SIZE, teacher_weight=3.0)


def unit(values: NDArray[Any]) -> NDArray[Any]:
    scaled: NDArray[Any] = values / np.linalg.norm(values, axis=1, keepdims=True)
    return scaled


def make(**options: Any) -> TrainingStep:
    step = TrainingStep(dataclasses.replace(TAUGHT, **options), CONCEPTS, CPU, Ranks())
    step.train()
    return step


def targets(size: int = 8) -> torch.Tensor:
    return functional.normalize(torch.randn(size, SIZE, generator=torch.Generator().manual_seed(5)), dim=1)


def test_features_are_those_that_the_extractor_gives(small_model: Path) -> None:
    extractor = FeatureExtractor.from_pretrained(small_model)
    teacher = Teacher(extractor)
    images = pixels(3, 5)[0]
    squares = images.permute(0, 2, 3, 1).numpy().astype(np.uint8)
    found = teacher.features(images)
    np.testing.assert_allclose(found.numpy(), unit(extractor.embed_prepared(squares)), rtol=1e-5, atol=1e-6)
    assert teacher.features(images[:0]).shape == (0, extractor.feature_size)


def test_crops_of_another_side_are_resized_as_pillow_does(small_model: Path, example_files: list[Path]) -> None:
    extractor = FeatureExtractor.from_pretrained(small_model)
    for side in (20, 75):
        with Image.open(example_files[0]) as image:
            crop = image.convert("RGB").resize((side, side))
        resized = np.asarray(crop.resize((32, 32), Image.Resampling.BILINEAR))
        found = Teacher(extractor).features(torch.from_numpy(np.asarray(crop).copy()).permute(2, 0, 1)[None].float())
        assert float(found[0].numpy() @ unit(extractor.embed_prepared(resized[None]))[0]) > 0.999


@pytest.mark.parametrize("labels", [True, False])
def test_the_loss_is_what_the_page_says(labels: bool) -> None:
    objective = create_objective(dataclasses.replace(TAUGHT, labels=labels), CONCEPTS)
    rng = np.random.default_rng(0)
    logits, projected, target = (rng.standard_normal(shape) for shape in ((4, 4), (4, SIZE), (4, SIZE)))
    y = np.array([0, 1, 3, 3])
    batch = StepBatch(
        torch.empty(4, 0), torch.from_numpy(y), torch.zeros(4, dtype=torch.long), 0.0, 4,
        teacher=torch.from_numpy(target),
    )  # fmt: skip
    output = StepOutput(torch.from_numpy(logits), torch.empty(4, 2), {"teacher": torch.from_numpy(projected)})
    expected = 3.0 * (1 - (unit(projected) * unit(target)).sum(1))
    if labels:
        expected += np.log(np.exp(logits).sum(1)) - logits[np.arange(4), y]
    np.testing.assert_allclose(objective.losses(output, batch).numpy(), expected, rtol=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_without_labels_one_batch_is_learned_and_the_classifier_stays(precision: str) -> None:
    step = make(labels=False, lr=0.05, precision=precision)
    images, labels = pixels()
    before = {name: value.clone() for name, value in step.network.state_dict().items()}
    results = [step(images, labels, 0.0, number, guidance=Guidance(targets())) for number in range(15)]
    assert float(results[-1].losses.mean()) < 0.5 * float(results[0].losses.mean())
    assert all(np.isnan(float(result.correct)) for result in results)
    after = step.network.state_dict()
    assert torch.equal(after["fc.weight"], before["fc.weight"])
    assert not torch.equal(after["conv1.weight"], before["conv1.weight"])


def test_images_move_along_the_gradient_of_the_distance_to_the_teacher() -> None:
    step = make(method="tests.training.test_objective:Seen", labels=False, lr=1e-12)
    step.network.eval()
    images, labels = pixels()
    x = step.to_input(images).requires_grad_()
    head = step._heads["teacher"]
    features: Any = step.network.pooled(x)  # type: ignore[operator]
    cosines = (functional.normalize(head(features), dim=1) * targets()).sum(1)
    (gradient,) = torch.autograd.grad((1 - cosines).sum(), x)
    step(images, labels, 0.0, 0, guidance=Guidance(targets()))
    expected = step_along(x, gradient, 1.0)
    torch.testing.assert_close(seen(step).after.detach(), expected, rtol=1e-4, atol=1e-5)
    assert not torch.equal(seen(step).after, seen(step).before)


def recipe(dataset: Path, model: Path, **changes: Any) -> Recipe:
    return small.recipe(dataset, teacher=str(model), **changes)


def assert_resumes(dataset: Path, folder: Path, made: Recipe) -> None:
    """A run in two parts ends as the whole one."""
    whole = run(dataset, folder / "whole", made)
    resumed = run_one_epoch(dataset, folder / "parts", folder / "whole", made)
    for name, value in run(dataset, folder / "parts", resumed, resume=True).items():
        assert torch.equal(value, whole[name]), name


def lloyd(points: NDArray[Any], centres: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """k-means, written out: from centres to those where nothing moves any more."""
    while True:
        nearest = ((points[:, None] - centres[None]) ** 2).sum(2).argmin(1)
        means = np.stack([points[nearest == number].mean(0) for number in range(len(centres))])
        if np.allclose(means, centres):
            return nearest, means
        centres = means


def test_clusters_are_those_of_lloyds_algorithm() -> None:
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 4, 200)
    points = unit(np.eye(4)[truth] + 0.2 * rng.standard_normal((200, 4))).astype(np.float32)
    points[7] = np.nan
    found = find_clusters(points, 4, seed=3)
    good = np.isfinite(points).all(1)
    nearest, means = lloyd(points[good], np.stack([points[good][truth[good] == number].mean(0) for number in range(4)]))
    order = ((means[:, None] - found.centres[None]) ** 2).sum(2).argmin(1)
    assert sorted(order) == [0, 1, 2, 3]
    np.testing.assert_allclose(found.centres[order], means, atol=0.01)
    assert (order[nearest] == found.of_image[good]).mean() > 0.98
    assert found.of_image[7] == 0
    assert np.array_equal(find_clusters(points, 4, seed=3).of_image, found.of_image)


def test_images_that_are_the_same_make_one_cluster_and_too_few_are_refused() -> None:
    points = np.ones((5, 3), np.float32)
    with pytest.warns(UserWarning, match="distinct clusters"):
        found = find_clusters(points, 3, seed=0)
    assert found.centres.shape == (1, 3)
    with pytest.raises(DataError, match="5 images make no 6 clusters; pass a smaller K"):
        find_clusters(points, 6, seed=0)


def test_clusters_are_concepts_of_images_and_a_class_has_its_commonest() -> None:
    clusters = Clusters(np.zeros((3, 2), np.float32), np.array([0, 0, 2, 1, 1, 2]))
    concepts = clusters.concepts(np.array([0, 0, 0, 1, 1, 1]), 2)
    assert concepts.names == ("cluster 0", "cluster 1", "cluster 2")
    assert concepts.counts.tolist() == [2, 2, 2]
    assert concepts.of_class.tolist() == [0, 1]
    assert concepts.class_counts.tolist() == [3, 3]


def test_a_step_weighs_each_image_by_its_own_concept() -> None:
    """With q at (3/4, 1/4) and N_k = (100, 400) of 500: weights 3.75 and 0.3125, whatever the labels."""
    of_image = np.repeat([0, 1], [100, 400])
    concepts = ConceptMap(("a", "b"), np.array([1, 1, 1, 1]), np.array([100, 300, 50, 50]), of_image=of_image)
    recipe = dataclasses.replace(SMALL, method="cl", reference={"a": 3, "b": 1})
    step = TrainingStep(recipe, concepts, CPU, Ranks())
    step.train()
    own = torch.tensor([0, 1, 1, 0, 0, 1, 1, 1])
    result = step(*pixels(), 0.0, 0, guidance=Guidance(concepts=own))
    expected = (torch.tensor([3.75, 0.3125])[own] * result.losses).mean()
    torch.testing.assert_close(result.objective, expected)


def test_a_run_with_clusters_resumes_exactly_without_a_label(photos: Path, small_model: Path, tmp_path: Path) -> None:
    made = recipe(photos, small_model, labels=False, concepts="clusters:3", val_fraction=0.2)
    assert_resumes(photos, tmp_path, made)
    saved = load_checkpoint(tmp_path / "whole")
    assert saved.concepts == ["cluster 0", "cluster 1", "cluster 2"]
    with np.load(tmp_path / "whole" / CLUSTERS_NAME) as kept:
        assert np.array_equal(kept["of_image"], saved.clusters["of_image"].numpy())
    # The teacher sees whole images, as `embed` does.
    train_set, _ = open_training_data(photos, val_fraction=0.2, labels=False)
    features = FeatureExtractor.from_pretrained(small_model).embed([train_set.read(row) for row in range(19)])
    distances = ((unit(features)[:, None] - saved.clusters["centres"].numpy()[None]) ** 2).sum(2)
    assert np.array_equal(distances.argmin(1), saved.clusters["of_image"].numpy())
    last = json.loads((tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()[-2])
    assert len(last["q"]) == 3
    other = Recipe.from_dict(saved.recipe).replace(concepts="clusters:2")
    with pytest.raises(CheckpointError, match="was trained with concepts = clusters:3, now it is clusters:2"):
        train(photos, other, tmp_path / "whole", resume=True, workers=0, threads=1, quiet=True, device="cpu")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"concepts": "clusters:3"}, "concepts=clusters:3: are of a teacher's features; pass a `teacher`"),
        ({"concepts": "clusters:x", "teacher": "a"}, "must be clusters:K with a whole number K"),
        ({"concepts": "clusters:0", "teacher": "a"}, "must be clusters:K with a whole number K"),
        ({"concepts": "clusters:3", "teacher": "a", "reference": {"a": 1.0}}, "cannot be named beforehand"),
    ],
)
def test_clusters_that_make_no_sense_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Recipe(**changes)


def test_fixed_crops_are_shown_in_turn_whatever_the_order_of_rows(photos: Path) -> None:
    data, _ = open_training_data(photos, val_fraction=0.2, labels=False)
    shown: list[dict[int, NDArray[Any]]] = []
    for epoch in range(4):
        plan = EpochPlan(data, 6, seed=1, epoch=epoch, fixed_crops=2)
        batches = [TrainingBatches(data, 32, plan)[number] for number in range(len(TrainingBatches(data, 32, plan)))]
        shown.append(
            {
                int(row): image.numpy()
                for batch in batches
                for row, image in zip(batch.rows, batch.images, strict=True)  # type: ignore[arg-type]
            }
        )
    for first, second in ((0, 2), (1, 3)):
        both = shown[first].keys() & shown[second].keys()
        assert len(both) > 12
        assert all(np.array_equal(shown[first][row], shown[second][row]) for row in both)
    assert not any(np.array_equal(shown[0][row], shown[1][row]) for row in shown[0].keys() & shown[1].keys())


def test_kept_features_are_the_teachers_of_the_same_crops(photos: Path, small_model: Path, tmp_path: Path) -> None:
    """Those in the file, against the teacher's at each step; the run ends alike but for float16."""
    made = recipe(photos, small_model, labels=False, concepts="classes", val_fraction=0.2, teacher_crops=2)
    whole = run(photos, tmp_path / "run", made)
    kept = np.memmap(tmp_path / "run" / "teacher-features.f16", np.float16, "r").reshape(2, 19, -1)
    data, _ = open_training_data(photos, val_fraction=0.2, labels=False)
    teacher = Teacher(FeatureExtractor.from_pretrained(small_model))
    for epoch in range(2):
        plan = EpochPlan(data, 6, seed=made.seed, epoch=epoch, min_crop_area=made.min_crop_area, fixed_crops=2)
        for number in range(3):
            batch = TrainingBatches(data, 32, plan)[number]
            expected = teacher.features(batch.images.float()).numpy()
            np.testing.assert_allclose(kept[epoch, batch.rows], expected, atol=1e-3)
    assert all(np.isfinite(value.numpy()).all() for value in whole.values())


def test_a_run_with_kept_features_resumes_exactly(photos: Path, small_model: Path, tmp_path: Path) -> None:
    made = recipe(photos, small_model, labels=False, concepts="clusters:2", val_fraction=0.2, teacher_crops=2)
    assert_resumes(photos, tmp_path, made)


def test_features_go_on_where_a_killed_process_stopped(
    photos: Path, small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept_features, "_BLOCK", 4)  # 5 blocks a crop, the last one of 3
    made = recipe(photos, small_model, labels=False, concepts="classes", val_fraction=0.2, teacher_crops=2, epochs=1)
    run(photos, tmp_path / "whole", made)
    own, calls = Teacher.features, 0

    def dying(teacher: Teacher, crops: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 8:
            raise KeyboardInterrupt
        return own(teacher, crops)

    monkeypatch.setattr(Teacher, "features", dying)
    with pytest.raises(KeyboardInterrupt):
        run(photos, tmp_path / "killed", made)
    state = json.loads((tmp_path / "killed" / "teacher-features.json").read_text())
    assert state["done"] == 7
    calls = 100
    run(photos, tmp_path / "killed", made)
    assert calls == 100 + 3 + 1, "three blocks were left, and one batch of validation images"
    files = [(tmp_path / name / "teacher-features.f16").read_bytes() for name in ("whole", "killed")]
    assert files[0] == files[1]


def test_features_of_another_recipe_are_computed_anew(photos: Path, small_model: Path, tmp_path: Path) -> None:
    made = recipe(photos, small_model, labels=False, concepts="classes", val_fraction=0.2, teacher_crops=1, epochs=1)
    run(photos, tmp_path / "first", made)
    (tmp_path / "second").mkdir()
    for name in ("teacher-features.f16", "teacher-features.json"):
        (tmp_path / "second" / name).write_bytes((tmp_path / "first" / name).read_bytes())
    run(photos, tmp_path / "second", made.replace(seed=1))
    assert (tmp_path / "first" / "teacher-features.f16").read_bytes() != (
        tmp_path / "second" / "teacher-features.f16"
    ).read_bytes()


def test_features_that_take_too_much_are_refused_before_they_are_computed(
    photos: Path, small_model: Path, tmp_path: Path
) -> None:
    made = recipe(photos, small_model, labels=False, concepts="classes", teacher_crops=1000, teacher_gb=0.001)
    with pytest.raises(InputError, match=r"features of 1000 crops of .* and `teacher_gb` allows 0.001"):
        run(photos, tmp_path / "run", made)
    assert not (tmp_path / "run").exists()
    with pytest.raises(InputError, match="teacher_crops=2: are crops for a teacher; pass a `teacher`"):
        Recipe(teacher_crops=2)


@pytest.mark.parametrize("labels", [True, False])
def test_a_run_with_a_teacher_resumes_exactly(dataset: Path, small_model: Path, tmp_path: Path, labels: bool) -> None:
    assert_resumes(dataset, tmp_path, recipe(dataset, small_model, labels=labels, schedule="step"))
    saved = load_checkpoint(tmp_path / "whole")
    assert saved.heads["teacher.weight"].shape == (saved.recipe["teacher_size"], 64)
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert all(("accuracy" in line or "validation_accuracy" in line) == labels for line in lines)
    assert all(np.isfinite(line.get("loss", line.get("validation_loss"))) for line in lines)


def test_a_run_resumes_with_a_teacher_and_a_probe_that_have_moved(
    dataset: Path, small_model: Path, tmp_path: Path
) -> None:
    before = {"teacher": tmp_path / "teacher", "probe": tmp_path / "probe"}
    after = {name: tmp_path / "elsewhere" / name for name in before}
    shutil.copytree(small_model, before["teacher"])
    shutil.copytree(dataset, before["probe"])
    made = small.recipe(dataset, labels=False, **{name: str(place) for name, place in before.items()})
    whole = run(dataset, tmp_path / "whole", made)
    resumed = run_one_epoch(dataset, tmp_path / "parts", tmp_path / "whole", made)
    (tmp_path / "elsewhere").mkdir()
    for name, place in before.items():
        place.rename(after[name])
    moved = resumed.replace(**{name: str(place) for name, place in after.items()})
    saved = load_checkpoint(tmp_path / "parts")
    probed = {"fingerprint": saved.data["fingerprint"], "probe": "other images"}
    with pytest.raises(CheckpointError, match=r"was trained with probe = .*, now it is .*elsewhere"):
        require_same_recipe(saved, tmp_path, moved, probed)
    other = moved.replace(teacher_sha256="0" * 64)
    with pytest.raises(CheckpointError, match="was trained with teacher_sha256 = "):
        require_same_recipe(saved, tmp_path, other, saved.data)
    with pytest.raises(CheckpointError, match="was trained with teacher = "):
        require_same_recipe(saved, tmp_path, moved.replace(teacher="", labels=True), saved.data)
    for name, value in run(dataset, tmp_path / "parts", moved, resume=True).items():
        assert torch.equal(value, whole[name]), name


@pytest.fixture(scope="module")
def photos(example_files: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images, some of them in a folder of their own, with a file that is none."""
    root = tmp_path_factory.mktemp("photos")
    (root / "more" / "deep").mkdir(parents=True)
    for number, file in enumerate(example_files[:24]):
        with Image.open(file) as image:
            image.resize((40, 40)).save(root / ("more/deep" if number % 3 else ".") / f"{number}.png")
    (root / "notes.txt").write_text("no image")
    return root


def test_a_folder_of_images_is_learned_from_exported_and_embeds(
    photos: Path, small_model: Path, tmp_path: Path, example_files: list[Path]
) -> None:
    made = recipe(photos, small_model, labels=False, concepts="classes", val_fraction=0.2, epochs=1, method="el")
    run(photos, tmp_path / "run", made)
    saved = load_checkpoint(tmp_path / "run")
    assert (saved.data["images"], saved.data["validation_images"]) == (19, 5)
    report = export_run(tmp_path / "run", tmp_path / "model")
    assert report.folder.config.num_classes == 0
    assert not any(name.startswith("fc.") for name in load_file(report.folder.path / "model.safetensors"))
    check = check_golden(FeatureExtractor.from_pretrained(report.folder.path))
    assert check.cosine is not None
    assert check.cosine > 0.9999
    assert FeatureExtractor.from_pretrained(report.folder.path).embed(example_files[:2]).shape == (2, 64)
    card = (tmp_path / "model" / "README.md").read_text()
    assert "on 19 images without labels, in 1 concept. It learned from the features of `small`." in card


def test_train_and_val_may_be_folders_of_images(photos: Path, tmp_path: Path) -> None:
    for split in ("train", "val"):
        (tmp_path / split).symlink_to(photos)
    train_set, validation_set = open_training_data(tmp_path, labels=False)
    assert len(train_set) == len(validation_set) == 24
    assert set(train_set.labels) == {0}
    assert "files left out: 1 (.txt 1)" in train_set.remarks[0]
    flat = tmp_path / "flat" / "train"
    flat.mkdir(parents=True)
    (flat / "0.png").symlink_to(photos / "0.png")
    with pytest.raises(DataError, match="no class folders"):
        open_training_data(flat.parent)


def test_class_folders_stay_classes_without_labels(dataset: Path) -> None:
    train_set, _ = open_training_data(dataset, labels=False)
    assert len(train_set.classes) == 10
    assert train_set.fingerprint == open_training_data(dataset)[0].fingerprint


def test_images_without_labels_need_other_concepts(photos: Path, small_model: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="concepts=imagenet11: names classes, and the images have none"):
        run(photos, tmp_path / "run", recipe(photos, small_model, labels=False, concepts="imagenet11"))
    with pytest.raises(InputError, match="lies in the training data, which it would change"):
        run(photos, photos / "run", recipe(photos, small_model, labels=False, concepts="classes"))
    with pytest.raises(DataError, match="for images without labels, pass a `teacher` and `labels=False`"):
        run(photos, tmp_path / "run", recipe(photos, small_model, concepts="classes"))


def test_two_ranks_learn_from_a_teacher_without_labels(
    dataset: Path, small_model: Path, tmp_path: Path, commands: CommandServer
) -> None:
    options = {
        "epochs": 1,
        "method": "stable",
        "teacher": small_model,
        "concepts": "clusters:2",
        "set": "teacher_crops=1",
    }
    run_ranks(commands, [*train_arguments(dataset, tmp_path / "run", **options), "--no-labels"], tmp_path, 2)
    saved = load_checkpoint(tmp_path / "run")
    assert saved.global_step == 5
    assert saved.recipe["labels"] is False
    assert len(saved.clusters["of_image"]) == 30
    assert saved.recipe["teacher_crops"] == 1


def test_what_makes_no_sense_is_said(
    dataset: Path, small_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(InputError, match=r"labels=False: leaves nothing to learn from; pass a `teacher`"):
        Recipe(labels=False)
    with pytest.raises(InputError, match=r"teacher=nosuch: .*no such"):
        resolve_teacher(Recipe(teacher="nosuch"))
    other = Recipe(teacher=str(small_model), teacher_sha256="0" * 64)
    with pytest.raises(InputError, match="the sha256 must be 000000000000"):
        resolve_teacher(other)
    clustered = recipe(dataset, small_model, concepts="clusters:2")
    with pytest.raises(InputError, match="needs concepts of classes; leave out clusters or the target"):
        train(dataset, clustered, tmp_path / "target", target=str(dataset), workers=0, quiet=True, device="cpu")
    made = recipe(dataset, small_model, method=f"{__name__}:Forgetful")
    with pytest.raises(InputError, match="create_heads leaves out 'teacher'"):
        run(dataset, tmp_path / "run", made)
    arguments = train_arguments(dataset, tmp_path / "plain", epochs=1, teacher=small_model)[1:]
    assert command.main([*arguments, "--no-labels", "--json", "--quiet"], standalone_mode=False) == 0
    assert json.loads(capsys.readouterr().out)["validation_accuracy"] is None


class Forgetful(Objective):
    def create_heads(self, feature_size: int, classes: int) -> torch.nn.ModuleDict:
        return torch.nn.ModuleDict()
