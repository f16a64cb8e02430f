"""Checks the values of a recipe. Loads no PyTorch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from robustfeat.errors import InputError
from robustfeat.hub.preprocessing import CONTRACT_VERSION
from robustfeat.serving.engines.options import PRECISIONS
from robustfeat.training.concepts import cluster_count
from robustfeat.training.methods import METHODS

if TYPE_CHECKING:
    from robustfeat.training.recipe import Recipe

__all__ = ["check_shapes", "check_values", "invalid"]

_INTEGERS = frozenset({
    "width", "epochs", "batch_size", "q_warmup_steps", "replays", "recalibrate", "cache_px", "seed", "validation_size",
    "teacher_crops", "stable_steps", "projection", "probe_every", "accumulate", "classifier_epochs",
    "preprocessing_version",
})  # fmt: skip
_RANGES: tuple[tuple[str, float, float], ...] = (
    ("width", 1, 512),
    ("epochs", 1, 100_000),
    ("batch_size", 2, 1_000_000),
    ("lr", 1e-12, 1e30),
    ("momentum", 0, 0.999999),
    ("weight_decay", 0, 1e6),
    ("clip_norm", 0, 1e30),
    ("accumulate", 1, 100_000),
    ("ema", 0, 0.9999999),
    ("warmup_epochs", 0, 100_000),
    ("classifier_epochs", 0, 100_000),
    ("preprocessing_version", 1, CONTRACT_VERSION),
    ("min_crop_area", 1e-6, 1),
    ("erasing", 0, 1),
    ("projection", 0, 1_000_000),
    ("ldr_lam", 1e-6, 1e6),
    ("ldr_margin", 0, 1e6),
    ("label_smoothing", 0, 0.999999),
    ("mixup", 0, 1000),
    ("cutmix", 0, 1000),
    ("teacher_weight", 1e-12, 1e6),
    ("teacher_crops", 0, 10_000),
    ("teacher_gb", 1e-9, 1e6),
    ("tau", 0, 1e6),
    ("stable_weight", 0, 1e6),
    ("stable_steps", 1, 100),
    ("p_lam", 0, 1e30),
    ("lam", 1e-12, 1e30),
    ("q_warmup_steps", 0, 1e12),
    ("q_warmup_divisor", 1, 1e12),
    ("replays", 1, 1000),
    ("recalibrate", 0, 1_000_000),
    ("cache_px", 0, 4096),
    ("seed", 0, 2**40),
    ("val_fraction", 0, 1),
    ("probe_every", 1, 100_000),
    ("validation_size", 8, 4096),
    ("crop_pct", 0.01, 1),
)
_CHOICES = {
    "loss": ("cross_entropy", "ldr_kl"),
    "optimizer": ("sgd", "adamw"),
    "schedule": ("step", "linear", "cosine"),
    "teacher_precision": PRECISIONS,
    "precision": ("fp32", "bf16", "fp16"),
    "tau_unit": ("normalised", "pixel"),
    "tau_step": ("unit", "gradient"),
    "inner": ("full", "half", "free"),
    "inner_batch_norm": ("batch", "eval"),
    "stable_anchor": ("self", "start"),
    "p_divergence": ("l2", "kl", "chi2"),
    "target_rule": ("mean", "em"),
    "q_divergence": ("l2", "kl", "chi2"),
    "probe_classifier": ("knn", "svm"),
    "best": ("none", "validation", "probe"),
}
_SWITCHES = ("trivial_augment", "q_baseline", "compile", "labels", "decay_norms")


def check_shapes(recipe: Recipe) -> None:
    """Checks the types of text and lists, so a recipe can normalise its values.

    Raises:
        InputError: naming a key.
    """
    for name in ("method", "concepts", "network"):
        if not isinstance(getattr(recipe, name), str) or not getattr(recipe, name):
            raise invalid(name, "must be text", getattr(recipe, name))
    if recipe.network not in {"auto", "resnet18"} and recipe.network.removeprefix("timm:") in {"", recipe.network}:
        raise invalid("network", "must be resnet18, timm:NAME or auto", recipe.network)
    for name in ("init", "teacher", "probe"):
        if not isinstance(getattr(recipe, name), str):
            raise invalid(name, "must be text", getattr(recipe, name))
    if not isinstance(recipe.milestones, list | tuple) or not all(
        _is_whole(epoch) and epoch >= 0 for epoch in recipe.milestones
    ):
        raise invalid("milestones", "must be a list of epochs, as [30, 60]", recipe.milestones)
    if not isinstance(recipe.image_sizes, list | tuple) or not all(
        isinstance(pair, list | tuple) and len(pair) == 2 and all(map(_is_whole, pair)) for pair in recipe.image_sizes
    ):
        raise invalid("image_sizes", "must be pairs of an epoch and a side, as [[0, 48]]", recipe.image_sizes)
    if not all(16 <= side <= 4096 for _, side in recipe.image_sizes):
        raise invalid("image_sizes", "must be from 16 to 4096 px", recipe.image_sizes)
    shares = recipe.reference
    if shares is not None and not (
        isinstance(shares, dict)
        and all(isinstance(share, int | float) and not isinstance(share, bool) for share in shares.values())
    ):
        raise invalid("reference", "must give each concept a number, as {Bird = 0.2}", shares)


def check_values(recipe: Recipe) -> None:
    """Every value is in its range, and keys that depend on each other agree.

    Raises:
        InputError: naming a key.
    """
    for name, least, most in _RANGES:
        value = getattr(recipe, name)
        if name == "q_warmup_divisor" and value == "auto":
            continue
        kind = int if name in _INTEGERS else (int, float)
        if isinstance(value, bool) or not isinstance(value, kind) or not least <= value <= most:
            whole = "a whole number " if name in _INTEGERS else ""
            raise invalid(name, f"must be {whole}from {least:g} to {most:g}", value)
    _check_choices(recipe)
    _check_teacher(recipe)
    _check_targets(recipe)
    _check_stable(recipe)
    _check_step(recipe)
    if recipe.parts is not None and (not _is_whole(recipe.parts) or recipe.parts < 1):
        raise invalid("parts", "must be a whole number >= 1", recipe.parts)
    starts = [first for first, _ in recipe.image_sizes]
    if not starts or starts[0] != 0 or starts != sorted(set(starts)):
        raise invalid("image_sizes", "must start at epoch 0 and ascend", recipe.image_sizes)
    if 0 < recipe.cache_px < 16:
        raise invalid("cache_px", "must be 0 or at least 16", recipe.cache_px)


def _check_choices(recipe: Recipe) -> None:
    for name, choices in _CHOICES.items():
        if getattr(recipe, name) not in choices:
            raise invalid(name, f"must be one of {', '.join(choices)}", getattr(recipe, name))
    for name in _SWITCHES:
        if not isinstance(getattr(recipe, name), bool):
            raise invalid(name, "must be true or false", getattr(recipe, name))
    if recipe.best == "probe" and not recipe.probe:
        raise InputError("needs a probe", argument="best", value="probe", fix="pass `probe`, or `best=validation`")
    if recipe.accumulate > 1 and recipe.inner == "free":
        raise InputError(
            "must be 1 with `inner=free`, each of whose replays makes an update",
            argument="accumulate",
            value=recipe.accumulate,
            fix="pass `inner=half`, or leave `accumulate` out",
        )
    if recipe.q_warmup_divisor == "auto" and recipe.q_warmup_steps < 2:
        raise invalid("q_warmup_divisor", f"needs q_warmup_steps >= 2, not {recipe.q_warmup_steps}", "auto")
    if recipe.q_warmup_divisor == "auto" and recipe.q_divergence != "l2":
        raise invalid("q_warmup_divisor", "is Theorem 3's, of `q_divergence=l2`", "auto")


def _check_teacher(recipe: Recipe) -> None:
    size = recipe.teacher_size
    if size is not None and (not _is_whole(size) or size < 1):
        raise invalid("teacher_size", "must be a whole number >= 1", size)
    if recipe.teacher_crops and not recipe.teacher:
        raise InputError(
            "are crops for a teacher", argument="teacher_crops", value=recipe.teacher_crops, fix="pass a `teacher`"
        )
    try:
        clusters = cluster_count(recipe.concepts)
    except ValueError as exc:
        raise invalid("concepts", str(exc), recipe.concepts) from exc
    if clusters and not recipe.teacher:
        raise InputError(
            "are of a teacher's features", argument="concepts", value=recipe.concepts, fix="pass a `teacher`"
        )
    if clusters and recipe.reference:
        raise InputError(
            "cannot be named beforehand", argument="concepts", value=recipe.concepts, fix="leave `reference` out"
        )
    if not recipe.teacher and not recipe.labels and recipe.stable_anchor == "self":
        raise InputError(
            "leaves nothing to learn from",
            argument="labels",
            value="False",
            fix="pass a `teacher`, or `init`, `method=stable` and `stable_anchor=start`",
        )


def _check_step(recipe: Recipe) -> None:
    if recipe.tau_step == "unit":
        return
    if recipe.method in METHODS and METHODS[recipe.method].direction != "gradient":
        raise InputError(
            f"does nothing in {recipe.method}", argument="tau_step", value=recipe.tau_step, fix="leave it out"
        )
    if recipe.inner == "free":
        raise InputError(
            "needs the gradient of an image's own loss, and the step before leaves that of a weighted mean",
            argument="tau_step",
            value=recipe.tau_step,
            fix="pass `inner=full` or `inner=half`",
        )


def _check_stable(recipe: Recipe) -> None:
    if recipe.method == "stable" and recipe.inner == "free":
        raise InputError(
            "takes the direction from the gradient of the step before, and stable from one of the features",
            argument="inner",
            value=recipe.inner,
            fix="pass `inner=full` or `inner=half`",
        )
    for argument, what in (("freeze_norms", "statistics"), ("classifier_epochs", "features")):
        if (value := getattr(recipe, argument)) and not recipe.init:
            raise InputError(
                f"keeps the {what} of a start", argument=argument, value=value, fix="pass `init` or leave it out"
            )
    if recipe.classifier_epochs and not recipe.labels and not recipe.teacher:
        raise InputError(
            "leaves nothing that learns, without labels and a teacher",
            argument="classifier_epochs",
            value=recipe.classifier_epochs,
            fix="leave it out",
        )
    kept = {
        "freeze_norms": recipe.freeze_norms,
        "stable_anchor=start": recipe.stable_anchor == "start",
        f"classifier_epochs={recipe.classifier_epochs}": recipe.classifier_epochs >= recipe.epochs,
    }
    keeps = next((name for name, holds in kept.items() if holds), None)
    if recipe.recalibrate and keeps:
        raise InputError(
            f"would replace the start's statistics, which BatchNorm keeps with `{keeps}`",
            argument="recalibrate",
            value=recipe.recalibrate,
            fix="leave it out",
        )
    if recipe.stable_anchor == "start" and not recipe.init:
        raise InputError("are the features of a start", argument="stable_anchor", value="start", fix="pass `init`")
    if recipe.stable_anchor == "start" and recipe.method != "stable" and ":" not in recipe.method:
        raise InputError(
            f"does nothing in {recipe.method}", argument="stable_anchor", value="start", fix="pass `method=stable`"
        )


def _check_targets(recipe: Recipe) -> None:
    for name, off in (("loss", "cross_entropy"), ("label_smoothing", 0)):
        value = getattr(recipe, name)
        if value != off and not recipe.labels:
            raise InputError("needs labels, which are not learned", argument=name, value=value, fix="leave it out")
    if recipe.projection and not recipe.labels and not recipe.teacher:
        raise InputError(
            "is what labels or a teacher see, and neither is learned",
            argument="projection",
            value=recipe.projection,
            fix="leave it out",
        )
    if recipe.teacher_crops and (recipe.mixup or recipe.cutmix or recipe.augments):
        raise InputError(
            "are features of plain crops, kept for all epochs",
            argument="teacher_crops",
            value=recipe.teacher_crops,
            fix="pass 0, or leave out `mixup`, `cutmix`, `trivial_augment` and `erasing`",
        )


def invalid(name: str, expected: str, value: object) -> InputError:
    """The error for a key with a value that it cannot have."""
    return InputError(expected, argument=name, value=repr(value))


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
