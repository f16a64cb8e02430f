"""Recipes: how a model is trained, as frozen data that is saved with the run."""

from __future__ import annotations

import dataclasses
import json
import math
import tomllib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields
from importlib import resources
from pathlib import Path
from typing import Any

from robustfeat.errors import InputError
from robustfeat.hub.preprocessing import Preprocessing
from robustfeat.training.concepts import cluster_count
from robustfeat.training.methods import METHODS

__all__ = ["RECIPE_NAME", "Recipe", "load_recipe", "shipped_recipes"]

RECIPE_NAME = "recipe.toml"


_INTEGERS = frozenset({
    "width", "epochs", "batch_size", "q_warmup_steps", "replays", "recalibrate", "cache_px", "seed", "validation_size",
    "teacher_crops", "stable_steps", "probe_every", "accumulate",
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
    ("min_crop_area", 1e-6, 1),
    ("erasing", 0, 1),
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
    "optimizer": ("sgd", "adamw"),
    "schedule": ("step", "linear", "cosine"),
    "teacher_precision": ("fp32", "bf16", "int8"),
    "precision": ("fp32", "bf16", "fp16"),
    "tau_unit": ("normalised", "pixel"),
    "tau_step": ("unit", "gradient"),
    "inner": ("full", "half", "free"),
    "inner_batch_norm": ("batch", "eval"),
    "stable_anchor": ("self", "start"),
    "p_divergence": ("l2", "kl", "chi2"),
    "q_divergence": ("l2", "kl", "chi2"),
    "probe_classifier": ("knn", "svm"),
    "best": ("none", "validation", "probe"),
}
_SWITCHES = ("trivial_augment", "q_baseline", "compile", "labels", "decay_norms")
_REMOVED = {
    "nesterov": False, "tau_ramp_epochs": 0, "q_steps": "decaying", "group_rate": 0.01, "batch_norm": "batch",
}  # fmt: skip
"""Keys of version 0.1, with the only values that are read now: what training does in any case."""


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a run's result besides its data. The defaults are the paper's, for ImageNet.

    Attributes:
        method: erm, el, cl, hrrl; stable; random, balanced, groupdro; or module:Class.
        concepts: imagenet11, classes, a CSV file `class,concept`, or clusters:K (of the teacher's features).
        network: resnet18, timm:NAME for a classifier of timm, or auto (the network of `init`; ResNet-18 without).
        width: of ResNet-18, channels of its first stage (64, the paper).
        init: weights to start from: a run, a model folder, ORG/NAME on the Hub, or a file (empty: random ones).
        init_sha256: of those weights; training fills it in, and refuses others afterwards.
        teacher: a model folder or ORG/NAME on the Hub: the network learns its features of the same crop (empty: none).
        teacher_weight: of that loss, beside the labels'.
        teacher_precision: of the teacher: fp32, bf16 or int8.
        teacher_crops: compute its features once, of so many crops an image, which the epochs show in turn (0: at each
            step, of crops that are always new).
        teacher_gb: the most that those features may take on the disk, in GB.
        teacher_sha256, teacher_size: of its config.json, and D of its features; training fills them in, and refuses
            another teacher afterwards.
        labels: learn the labels; without them, only features are learned, of the teacher or of the start.
        optimizer: sgd (the paper) or adamw, with PyTorch's betas, which has no `momentum`.
        epochs, batch_size, lr, momentum, weight_decay: of the optimiser.
        decay_norms: decay the weights of normalisation layers and biases, too (the paper says nothing of them).
        clip_norm: scale gradients down to this L2 norm, over all parameters; 0: never.
        accumulate: batches whose mean gradient makes one update; the last ones of an epoch may be fewer.
        ema: decay of an exponential moving average of the weights; the averaged network is what is validated and
            exported (0: no average, the paper).
        schedule: `step` (lr / 10 at each of `milestones`, in epochs), `linear` or `cosine` (to zero at the end).
        warmup_epochs: lr rises linearly from zero for so long.
        image_sizes: (first epoch, S in pixels) pairs; the training crops grow with the epochs.
        validation_size: S of the validation images, and the exported model's default.
        crop_pct: share of the resized validation image that its centre crop keeps.
        interpolation: of the validation images: bilinear or bicubic (None: `init`'s, or bilinear).
        mean, std: of the network's input, per channel in [0, 1] (None: `init`'s, or ImageNet's).
        min_crop_area: training crops cover between this share and all of an image's area.
        trivial_augment: change each crop by a random operation of TrivialAugment (wide).
        erasing: probability that a rectangle of a crop becomes the mean colour (0, the paper: none).
        label_smoothing: share of each target that all classes divide evenly (0, the paper: none).
        mixup, cutmix: alpha of MixUp and CutMix, which make one image of two (0, the paper: off). With both, either
            mixes half of the batches.
        tau: length of the example-level step at 224 px; at side S it is tau * S / 224.
        tau_unit: `normalised` (the length is measured in the network's input) or `pixel` (in pixels from 0 to 1).
        tau_step: `unit` (each image moves by tau) or `gradient` (by tau times its gradient, with tau * (S / 224)^2 at
            side S): Theorem 2's own step.
        inner: where the example level's gradient comes from: `full` (the paper: a pass of its own), `half` (that pass
            at half the resolution) or `free` (the step before, on the same batch).
        replays: with `free`, the steps in a row that use one batch; an epoch stays as many steps. An image that
            weighs nothing leaves no gradient and is not moved in the next step.
        inner_batch_norm: in the inner pass, `batch` statistics or running ones (`eval`).
        stable_weight: beta of `method = "stable"`: an image's loss has beta ||f(x + d) - a||^2 in it.
        stable_steps: gradient steps to d, the move of length tau that changes the features most.
        stable_anchor: a: `self` (f(x), the network's own features) or `start` (those that the network gave to x
            before training, which needs `init`).
        p_lam: lambda of Eq. 2, which weighs the examples of each batch by their losses (0: off, as in Algorithm 1).
        p_divergence: what keeps those weights equal: `l2` (the paper), `kl` or `chi2`.
        lam: lambda of the concept level.
        q_divergence: what keeps q near q0: `l2` (the paper), `kl` or `chi2`.
        q_warmup_steps, q_warmup_divisor: s and c of Algorithm 1; c may be `auto` (Theorem 3).
        q_baseline: see `ConceptAdversary`, `baseline`.
        reference: q0 as shares by concept, normalised to sum to 1 (None, the paper: N_k / N).
        recalibrate: after the last epoch, measure BatchNorm's running statistics anew on so many batches of
            unperturbed images (0, the paper: they stay as training left them, on x~).
        precision: fp32, bf16 or fp16 (autocast; fp16 on GPUs alone).
        compile: run the network through torch.compile.
        cache_px: decode each training image once, to a square of this side that a cache keeps (0: decode each time).
        seed: of the initial weights, the order and the crops.
        val_fraction: share of the training images held out where the data has no validation split.
        probe: labelled images, as DATA may be, on which a classifier of the features is scored (empty: none).
        probe_every: epochs between its scores; the last epoch has one in any case.
        probe_classifier: knn (10 nearest neighbours by cosine) or svm (linear, C and scaling chosen on its training
            images).
        best: also keep the checkpoint of the epoch that is best by `validation` (accuracy, or the loss where labels
            are not learned) or `probe`, or `none`.
        parts: use only the first so many Parquet files or tar shards of the training split (None: all).
    """

    method: str = "hrrl"
    concepts: str = "imagenet11"
    network: str = "auto"
    width: int = 64
    init: str = ""
    init_sha256: str | None = None
    teacher: str = ""
    teacher_weight: float = 1.0
    teacher_precision: str = "fp32"
    teacher_crops: int = 0
    teacher_gb: float = 20.0
    teacher_sha256: str | None = None
    teacher_size: int | None = None
    labels: bool = True
    epochs: int = 90
    batch_size: int = 256
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4
    optimizer: str = "sgd"
    decay_norms: bool = True
    clip_norm: float = 0.0
    accumulate: int = 1
    ema: float = 0.0
    schedule: str = "step"
    milestones: tuple[int, ...] = (30, 60)
    warmup_epochs: float = 0.0
    image_sizes: tuple[tuple[int, int], ...] = ((0, 224),)
    validation_size: int = 224
    crop_pct: float = 0.875
    interpolation: str | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    min_crop_area: float = 0.08
    trivial_augment: bool = False
    erasing: float = 0.0
    label_smoothing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    tau: float = 1.0
    tau_unit: str = "normalised"
    tau_step: str = "unit"
    inner: str = "full"
    replays: int = 4
    inner_batch_norm: str = "batch"
    stable_weight: float = 1.0
    stable_steps: int = 1
    stable_anchor: str = "self"
    p_lam: float = 0.0
    p_divergence: str = "l2"
    lam: float = 10.0
    q_divergence: str = "l2"
    q_warmup_steps: int = 1000
    q_warmup_divisor: float | str = 10.0
    q_baseline: bool = False
    reference: dict[str, float] | None = None
    recalibrate: int = 0
    precision: str = "fp32"
    compile: bool = False
    cache_px: int = 0
    seed: int = 0
    val_fraction: float = 0.02
    probe: str = ""
    probe_every: int = 1
    probe_classifier: str = "knn"
    best: str = "none"
    parts: int | None = field(default=None)

    def __post_init__(self) -> None:
        self._check_shapes()
        object.__setattr__(self, "milestones", tuple(self.milestones))
        for name in ("mean", "std"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        object.__setattr__(self, "image_sizes", tuple((first, side) for first, side in self.image_sizes))
        for name, least, most in _RANGES:
            value = getattr(self, name)
            if name == "q_warmup_divisor" and value == "auto":
                continue
            kind = int if name in _INTEGERS else (int, float)
            if isinstance(value, bool) or not isinstance(value, kind) or not least <= value <= most:
                whole = "a whole number " if name in _INTEGERS else ""
                raise _invalid(name, f"must be {whole}from {least:g} to {most:g}", value)
        self._check_choices()
        self._check_teacher()
        self._check_targets()
        self._check_stable()
        self._check_step()
        if self.parts is not None and (not _is_whole(self.parts) or self.parts < 1):
            raise _invalid("parts", "must be a whole number >= 1", self.parts)
        starts = [first for first, _ in self.image_sizes]
        if not starts or starts[0] != 0 or starts != sorted(set(starts)):
            raise _invalid("image_sizes", "must start at epoch 0 and ascend", self.image_sizes)
        if 0 < self.cache_px < 16:
            raise _invalid("cache_px", "must be 0 or at least 16", self.cache_px)
        try:
            self.preprocessing()
        except (ValueError, TypeError) as exc:
            raise InputError(str(exc)) from exc

    def _check_shapes(self) -> None:
        for name in ("method", "concepts", "network"):
            if not isinstance(getattr(self, name), str) or not getattr(self, name):
                raise _invalid(name, "must be text", getattr(self, name))
        if self.network not in {"auto", "resnet18"} and self.network.removeprefix("timm:") in {"", self.network}:
            raise _invalid("network", "must be resnet18, timm:NAME or auto", self.network)
        for name in ("init", "teacher", "probe"):
            if not isinstance(getattr(self, name), str):
                raise _invalid(name, "must be text", getattr(self, name))
        if self.network == "auto" and not self.init:
            object.__setattr__(self, "network", "resnet18")
        if not isinstance(self.milestones, list | tuple) or not all(
            _is_whole(epoch) and epoch >= 0 for epoch in self.milestones
        ):
            raise _invalid("milestones", "must be a list of epochs, as [30, 60]", self.milestones)
        if not isinstance(self.image_sizes, list | tuple) or not all(
            isinstance(pair, list | tuple) and len(pair) == 2 and all(map(_is_whole, pair)) for pair in self.image_sizes
        ):
            raise _invalid("image_sizes", "must be pairs of an epoch and a side, as [[0, 48]]", self.image_sizes)
        if not all(16 <= side <= 4096 for _, side in self.image_sizes):
            raise _invalid("image_sizes", "must be from 16 to 4096 px", self.image_sizes)
        shares = self.reference
        if shares is not None and not (
            isinstance(shares, dict)
            and all(isinstance(share, int | float) and not isinstance(share, bool) for share in shares.values())
        ):
            raise _invalid("reference", "must give each concept a number, as {Bird = 0.2}", shares)

    def _check_choices(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise _invalid(name, f"must be one of {', '.join(choices)}", getattr(self, name))
        for name in _SWITCHES:
            if not isinstance(getattr(self, name), bool):
                raise _invalid(name, "must be true or false", getattr(self, name))
        if self.best == "probe" and not self.probe:
            raise InputError("needs a probe", argument="best", value="probe", fix="pass `probe`, or `best=validation`")
        if self.accumulate > 1 and self.inner == "free":
            raise InputError(
                "must be 1 with `inner=free`, each of whose replays makes an update",
                argument="accumulate",
                value=self.accumulate,
                fix="pass `inner=half`, or leave `accumulate` out",
            )
        if self.q_warmup_divisor == "auto" and self.q_warmup_steps < 2:
            raise _invalid("q_warmup_divisor", f"needs q_warmup_steps >= 2, not {self.q_warmup_steps}", "auto")
        if self.q_warmup_divisor == "auto" and self.q_divergence != "l2":
            raise _invalid("q_warmup_divisor", "is Theorem 3's, of `q_divergence=l2`", "auto")

    def _check_teacher(self) -> None:
        size = self.teacher_size
        if size is not None and (not _is_whole(size) or size < 1):
            raise _invalid("teacher_size", "must be a whole number >= 1", size)
        if self.teacher_crops and not self.teacher:
            raise InputError(
                "are crops for a teacher", argument="teacher_crops", value=self.teacher_crops, fix="pass a `teacher`"
            )
        try:
            clusters = cluster_count(self.concepts)
        except ValueError as exc:
            raise _invalid("concepts", str(exc), self.concepts) from exc
        if clusters and not self.teacher:
            raise InputError(
                "are of a teacher's features", argument="concepts", value=self.concepts, fix="pass a `teacher`"
            )
        if clusters and self.reference:
            raise InputError(
                "cannot be named beforehand", argument="concepts", value=self.concepts, fix="leave `reference` out"
            )
        if not self.teacher and not self.labels and self.stable_anchor == "self":
            raise InputError(
                "leaves nothing to learn from",
                argument="labels",
                value="False",
                fix="pass a `teacher`, or `init`, `method=stable` and `stable_anchor=start`",
            )

    def _check_step(self) -> None:
        if self.tau_step == "unit":
            return
        if self.method in METHODS and METHODS[self.method].direction != "gradient":
            raise InputError(
                f"does nothing in {self.method}", argument="tau_step", value=self.tau_step, fix="leave it out"
            )
        if self.inner == "free":
            raise InputError(
                "needs the gradient of an image's own loss, and the step before leaves that of a weighted mean",
                argument="tau_step",
                value=self.tau_step,
                fix="pass `inner=full` or `inner=half`",
            )

    def _check_stable(self) -> None:
        if self.method == "stable" and self.inner == "free":
            raise InputError(
                "takes the direction from the gradient of the step before, and stable from one of the features",
                argument="inner",
                value=self.inner,
                fix="pass `inner=full` or `inner=half`",
            )
        if self.stable_anchor == "start" and not self.init:
            raise InputError("are the features of a start", argument="stable_anchor", value="start", fix="pass `init`")
        if self.stable_anchor == "start" and self.method != "stable" and ":" not in self.method:
            raise InputError(
                f"does nothing in {self.method}", argument="stable_anchor", value="start", fix="pass `method=stable`"
            )

    def _check_targets(self) -> None:
        if self.label_smoothing and not self.labels:
            raise InputError(
                "needs labels, which are not learned",
                argument="label_smoothing",
                value=self.label_smoothing,
                fix="leave it out",
            )
        if self.teacher_crops and (self.mixup or self.cutmix or self.augments):
            raise InputError(
                "are features of plain crops, kept for all epochs",
                argument="teacher_crops",
                value=self.teacher_crops,
                fix="pass 0, or leave out `mixup`, `cutmix`, `trivial_augment` and `erasing`",
            )

    @property
    def augments(self) -> bool:
        """Whether crops are changed after they are cut."""
        return self.trivial_augment or self.erasing > 0

    def image_size(self, epoch: int) -> int:
        """S of the training crops in this epoch, counted from 0."""
        return [side for first, side in self.image_sizes if first <= epoch][-1]

    def learning_rate(self, epoch: float) -> float:
        """At this point of training, in epochs."""
        if epoch < self.warmup_epochs:
            return self.lr * epoch / self.warmup_epochs
        if self.schedule == "step":
            return self.lr * 0.1 ** sum(epoch >= milestone for milestone in self.milestones)
        left = min(1.0, max(0.0, (self.epochs - epoch) / max(self.epochs - self.warmup_epochs, 1e-9)))
        if self.schedule == "cosine":
            return self.lr * 0.5 * (1 - math.cos(math.pi * left))
        return self.lr * left

    def preprocessing(self, image_size: int | None = None, crop_pct: float | None = None) -> Preprocessing:
        """The contract that the trained model is evaluated and exported with."""
        chosen: dict[str, Any] = {key: getattr(self, key) for key in ("interpolation", "mean", "std")}
        return Preprocessing(
            self.validation_size if image_size is None else image_size,
            self.crop_pct if crop_pct is None else crop_pct,
            **{key: value for key, value in chosen.items() if value is not None},
        )

    def replace(self, **changes: Any) -> Recipe:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def override(self, changes: Mapping[str, Any]) -> Recipe:
        """A copy with these keys changed, as the command line names them.

        Raises:
            InputError: a key is unknown or a value is out of range.
        """
        own = self.to_dict()
        if "image_sizes" in changes:
            del own["validation_size"]  # it follows from them, unless it is among the changes
        return Recipe.from_dict({**own, **changes})

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        data = dataclasses.asdict(self)
        lists = {name: list(data[name]) for name in ("milestones", "mean", "std") if data[name] is not None}
        return {**data, **lists, "image_sizes": [list(pair) for pair in self.image_sizes]}

    def to_toml(self) -> str:
        """A file that `load_recipe` reads."""
        lines = [f"{name} = {_toml(value)}" for name, value in self.to_dict().items() if value is not None]
        return "\n".join(lines) + "\n"

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], config: str | None = None) -> Recipe:
        """The inverse of `to_dict`; keys left out take their defaults, `validation_size` the last of `image_sizes`.

        Args:
            data: of this version or an earlier one.
            config: the file that it comes from, for messages.

        Raises:
            InputError: a key is unknown or a value is out of range.
        """
        try:
            return cls._from_dict(data)
        except InputError as exc:
            if config is None:
                raise
            what = exc.what if exc.argument is None else f"{exc.argument} {exc.what}; got {exc.value}"
            raise InputError(what, argument="config", value=config) from exc

    @classmethod
    def _from_dict(cls, data: Mapping[str, Any]) -> Recipe:
        data = _without_removed(data)
        known = {item.name for item in fields(cls)}
        unknown = sorted(set(data) - known)
        if unknown:
            raise InputError(f"unknown key {unknown[0]!r}; known are {', '.join(sorted(known))}")
        if "validation_size" not in data and "image_sizes" in data:
            with suppress(TypeError, ValueError, IndexError):  # said below
                data = {**data, "validation_size": data["image_sizes"][-1][1]}
        try:
            return cls(**data)
        except (TypeError, ValueError) as exc:
            raise InputError(f"a value in a recipe has the wrong type ({exc})") from exc


def _invalid(name: str, expected: str, value: object) -> InputError:
    return InputError(expected, argument=name, value=repr(value))


def _without_removed(data: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that a recipe has now.

    Raises:
        InputError: a removed key has another value than its default.
    """
    for name, default in _REMOVED.items():
        if name in data and data[name] != default:
            raise _invalid(name, f"is no longer supported; expected {default!r}, or no {name}", data[name])
    return {name: value for name, value in data.items() if name not in _REMOVED}


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {_toml(item)}" for key, item in value.items()) + "}"
    # JSON's text, numbers, booleans and lists are TOML's, too.
    return json.dumps(value, ensure_ascii=False)


def shipped_recipes() -> list[str]:
    """Names that `load_recipe` knows."""
    folder = resources.files("robustfeat.training").joinpath("recipes")
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


def load_recipe(config: str) -> Recipe:
    """A recipe that ships with the package, by name, or a TOML file.

    Raises:
        InputError: there is none, or it is not valid.
    """
    if config in shipped_recipes():
        text = resources.files("robustfeat.training").joinpath(f"recipes/{config}.toml").read_text("utf-8")
    else:
        try:
            text = Path(config).read_text("utf-8-sig")
        except (OSError, UnicodeDecodeError) as exc:
            raise InputError(
                f"neither a TOML file nor one of {', '.join(shipped_recipes())}", argument="config", value=config
            ) from exc
    try:
        data = tomllib.loads(text)
    except (ValueError, RecursionError) as exc:  # a number of thousands of digits is a ValueError of another kind
        raise InputError(f"not valid TOML ({exc})", argument="config", value=config) from exc
    return Recipe.from_dict(data, config)
