"""How large the paper's experiments are made: its own scale, and ones that fit smaller machines."""

from __future__ import annotations

from dataclasses import dataclass, replace

from robustfeat.errors import InputError
from robustfeat.training.recipe import Recipe, load_recipe

__all__ = [
    "CONTROLS",
    "CORRUPTED",
    "LONGER",
    "METHODS",
    "PAPER_NUMBERS",
    "SCALES",
    "TABLES",
    "WITH_LAMBDA",
    "WITH_TAU",
    "Gate",
    "Scale",
    "Target",
    "open_scale",
    "stretch",
]

METHODS = ("erm", "el", "cl", "hrrl")
CONTROLS = ("erm-long", "random", "balanced", "groupdro")
WITH_TAU = ("el", "hrrl", "random")
WITH_LAMBDA = ("cl", "hrrl")
"""Methods that have the chosen tau and lambda."""
CORRUPTED = ("erm", "hrrl")
"""Methods that are compared on corrupted images, and by fine-tuning."""
LONGER = 1.68
"""Time of a step of HRRL, in steps of ERM (docs/training.md), and so the factor of ERM's epochs for HRRL's time."""

TABLES = {"table2": "cifar10", "table3": "sop", "table4": "svhn"}
"""The target of each of the paper's tables of accuracies."""

PAPER_NUMBERS: dict[str, dict[str, tuple[float, float]]] = {
    "cifar10": {"erm": (85.77, 0.12), "el": (86.62, 0.18), "cl": (85.64, 0.26), "hrrl": (86.49, 0.19)},
    "sop": {"erm": (73.47, 0.09), "el": (73.48, 0.08), "cl": (74.34, 0.05), "hrrl": (74.23, 0.08)},
    "svhn": {"erm": (63.23, 0.35), "el": (65.01, 0.37), "cl": (65.47, 0.27), "hrrl": (67.33, 0.39)},
}
"""Tables 2 to 4: mean and deviation of three runs, in %."""


@dataclass(frozen=True)
class Target:
    """A substitute for one of the paper's targets.

    Attributes:
        title: the paper's name for it.
        train_rows, test_rows: at most so many images of each split; None for all.
    """

    title: str
    train_rows: int | None = None
    test_rows: int | None = None


@dataclass(frozen=True)
class Gate:
    """What ERM must reach before methods are compared.

    Attributes:
        training_accuracy: least accuracy in the last epoch, a share of the cropped training images.
        gain: ERM for HRRL's time must gain less than this share on held-out training images of the targets.
        seeds: seeds of the runs of both, which are main runs.
    """

    training_accuracy: float
    gain: float
    seeds: tuple[int, ...]


_OPEN_GATE = Gate(training_accuracy=0.0, gain=1.0, seeds=(0, 1))
"""What runs of one epoch pass."""


@dataclass(frozen=True)
class Scale:
    """Everything that decides how large an experiment is.

    Attributes:
        name: for `--scale`.
        recipe: recipe of the benchmark's ERM runs. Methods, tau, lambda and seeds are filled in.
        rows: number of the benchmark's training images; None for all.
        validation_rows: number of its validation images; None for all.
        long_epochs: number of epochs of ERM with HRRL's time.
        selection: the recipe of the runs that choose tau and lambda.
        selection_rows: number of the benchmark's images for the selection; None for all.
        taus, lams: values to choose from.
        targets: by the names cifar10, sop and svhn.
        methods: methods that are compared, ERM first.
        seeds: seeds of the runs.
        selection_seeds: seeds of the runs that choose tau and lambda.
        folds: choose by five folds and the one-standard-error rule; otherwise by the best held-out tenth.
        gate: what ERM must reach first; None for no condition.
        margin: a share. Differences whose Dunnett interval lies within it on both sides are equivalent. None marks
            each target by the intervals over seeds and images.
        concept_shares: draw the main runs' images with ImageNet's shares of concepts.
        biased_rows: images of the benchmark with ImageNet's shares of concepts; None if it has them itself.
        finetune_epochs, finetune_milestone: epochs of Figure 3, and the epoch at which lr falls to a tenth.
        finetune_rows: training images of a target in Figure 3; None for all.
        corrupted_rows: test images of a target that are corrupted; None for all.
        remark: what headings begin with.
        steps: lengths of the step in Figure 4, at 224 px.
    """

    name: str
    recipe: Recipe
    rows: int | None
    long_epochs: int
    selection: Recipe
    selection_rows: int | None
    taus: tuple[float, ...]
    lams: tuple[float, ...]
    targets: dict[str, Target]
    methods: tuple[str, ...] = METHODS
    seeds: tuple[int, ...] = (0, 1, 2)
    selection_seeds: tuple[int, ...] = (100,)
    folds: bool = False
    gate: Gate | None = None
    margin: float | None = None
    concept_shares: bool = False
    biased_rows: int | None = 20_000
    finetune_epochs: int = 100
    finetune_milestone: int = 50
    finetune_rows: int | None = None
    validation_rows: int | None = None
    corrupted_rows: int | None = None
    remark: str = ""
    steps: tuple[float, ...] = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)


def _paper() -> Scale:
    recipe = load_recipe("imagenet-paper").replace(method="erm")
    grid = tuple(10.0**power for power in range(-3, 2))
    return Scale(
        name="paper",
        recipe=recipe,
        rows=None,
        long_epochs=151,
        selection=recipe.replace(seed=100),
        selection_rows=None,
        taus=grid,
        lams=grid,
        targets={
            "cifar10": Target("CIFAR-10"), "sop": Target("SOP"), "svhn": Target("SVHN"),
        },
        biased_rows=None,
    )  # fmt: skip


def _tiny() -> Scale:
    # As the published cells were made: without the baseline, as the paper is, and by the first contract, which differs
    # only on transparent images.
    recipe = load_recipe("tiny-imagenet").replace(
        method="erm", epochs=10, warmup_epochs=1.0, q_warmup_steps=50, q_baseline=False, preprocessing_version=1
    )
    return Scale(
        name="tiny",
        recipe=recipe.replace(parts=1),  # each Parquet file has a fifth
        rows=20_000,
        long_epochs=17,
        selection=recipe.replace(epochs=5, seed=100),
        selection_rows=10_000,
        taus=(0.1, 0.35, 1.0, 3.5),
        lams=(1.0, 10.0, 100.0),
        targets={
            "cifar10": Target("CIFAR-10", 5_000, 10_000),
            "sop": Target("SOP"),
            "svhn": Target("SVHN", 5_000, 5_000),
        },
        finetune_epochs=20,
        finetune_milestone=10,
        finetune_rows=2_000,
        corrupted_rows=2_000,
    )


def _saturated() -> Scale:
    recipe = load_recipe("tiny-imagenet").replace(
        method="erm", epochs=60, image_sizes=((0, 48),), validation_size=48, q_warmup_steps=50
    )
    return Scale(
        name="saturated",
        recipe=recipe,
        rows=20_000,
        concept_shares=True,
        long_epochs=round(LONGER * recipe.epochs),
        selection=recipe.replace(seed=100),
        selection_rows=10_000,
        selection_seeds=(100, 101),
        folds=True,
        taus=(0.1, 0.35, 1.0),
        lams=(3.0, 10.0, 30.0),
        targets={
            "cifar10": Target("CIFAR-10", 5_000, 10_000),
            "sop": Target("SOP"),
            "svhn": Target("SVHN", 5_000, 5_000),
        },
        methods=("erm", "erm-long", "el", "cl", "hrrl"),
        seeds=(0, 1, 2, 3, 4),
        gate=Gate(training_accuracy=0.9, gain=0.005, seeds=(0, 1)),
        margin=0.005,
        biased_rows=None,
        finetune_epochs=20,
        finetune_milestone=10,
        finetune_rows=2_000,
        validation_rows=2_000,
        corrupted_rows=2_000,
    )


def _narrow() -> Scale:
    wide = _saturated()
    recipe = wide.recipe.replace(width=16, epochs=30)
    return replace(
        wide,
        name="narrow",
        recipe=recipe,
        rows=None,
        concept_shares=False,
        long_epochs=round(LONGER * recipe.epochs),
        selection=recipe.replace(seed=100),
        methods=("erm", "hrrl"),
        seeds=(0, 1, 2),
        gate=None,
    )


def _quick() -> Scale:
    recipe = load_recipe("tiny-imagenet").replace(
        method="erm", width=8, epochs=1, warmup_epochs=0.0, batch_size=16, image_sizes=((0, 24),), validation_size=24,
        q_warmup_steps=5, q_baseline=False, cache_px=0, precision="fp32", lr=0.05,
    )  # fmt: skip
    return Scale(
        name="quick",
        remark="a check of the programs, no result: ",
        recipe=recipe,
        rows=160,
        long_epochs=2,
        selection=recipe.replace(seed=100),
        selection_rows=64,
        taus=(0.35, 1.0),
        lams=(1.0, 10.0),
        targets={
            "cifar10": Target("CIFAR-10", 30, 20),
            "sop": Target("SOP", 30, 20),
            "svhn": Target("SVHN", 30, 20),
        },
        seeds=(0, 1),
        biased_rows=60,
        finetune_epochs=2,
        finetune_milestone=1,
        finetune_rows=20,
        corrupted_rows=10,
        validation_rows=100,
        steps=(0.0, 1.0),
    )


SCALES = {"paper": _paper, "tiny": _tiny, "saturated": _saturated, "narrow": _narrow, "quick": _quick}


def open_scale(name: str, *, quick: bool = False, epochs: int | None = None) -> Scale:
    """A scale, or a small one with the same rules.

    Args:
        name: one of `SCALES`.
        quick: with sizes to check the programs by; the gate is open.
        epochs: number of epochs of the runs in place of the scale's, for a scale with a gate.

    Raises:
        InputError: the scale has a fixed number of epochs.
    """
    scale = SCALES[name]()
    if epochs is not None and scale.gate is None:
        raise InputError(
            f"the scale {name} has a fixed number of epochs",
            argument="epochs",
            value=epochs,
            fix="leave `epochs` out",
        )
    if quick:
        scale = _shrink(scale)
    if epochs is None:
        return scale
    return replace(
        scale,
        recipe=stretch(scale.recipe, epochs),
        selection=stretch(scale.selection, epochs),
        long_epochs=round(LONGER * epochs),
    )


def _shrink(scale: Scale) -> Scale:
    quick = _quick()
    if scale.margin is None:
        return quick
    return replace(
        quick,
        rows=60 if scale.concept_shares else quick.rows,
        concept_shares=scale.concept_shares,
        biased_rows=None,
        methods=scale.methods,
        selection_seeds=scale.selection_seeds,
        folds=scale.folds,
        gate=scale.gate and _OPEN_GATE,
        margin=scale.margin,
    )


def stretch(recipe: Recipe, epochs: int) -> Recipe:
    """The recipe with this number of epochs. Changes at certain epochs come later by the same factor."""
    factor = epochs / recipe.epochs
    return recipe.replace(
        epochs=epochs,
        milestones=tuple(round(epoch * factor) for epoch in recipe.milestones),
        image_sizes=tuple((round(epoch * factor), side) for epoch, side in recipe.image_sizes),
    )
