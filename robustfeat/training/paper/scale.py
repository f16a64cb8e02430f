"""How large the paper's experiments are made: its own scale, and ones that fit smaller machines."""

from __future__ import annotations

from dataclasses import dataclass

from robustfeat.training.recipe import Recipe, load_recipe

__all__ = [
    "CONTROLS",
    "CORRUPTED",
    "METHODS",
    "PAPER_NUMBERS",
    "SCALES",
    "TABLES",
    "WITH_LAMBDA",
    "WITH_TAU",
    "Scale",
    "Target",
]

METHODS = ("erm", "el", "cl", "hrrl")
CONTROLS = ("erm-long", "random", "balanced", "groupdro")
WITH_TAU = ("el", "hrrl", "random")
WITH_LAMBDA = ("cl", "hrrl")
"""Methods that have the chosen tau and lambda."""
CORRUPTED = ("erm", "hrrl")
"""Methods that are compared on corrupted images, and by fine-tuning."""

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
        seeds: seeds of the runs.
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
    seeds: tuple[int, ...] = (0, 1, 2)
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


SCALES = {"paper": _paper, "tiny": _tiny, "quick": _quick}
