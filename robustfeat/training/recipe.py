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
from robustfeat.hub.preprocessing import CONTRACT_VERSION, Preprocessing
from robustfeat.training.recipe_checks import check_shapes, check_values, invalid

__all__ = ["RECIPE_NAME", "Recipe", "load_recipe", "shipped_recipes"]

RECIPE_NAME = "recipe.toml"


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
        width: channels of ResNet-18's first stage (64, the paper).
        init: weights to start from: a run, a model folder, ORG/NAME on the Hub, or a file (empty: random ones).
        init_sha256: sha256 of those weights. Training fills it in, and refuses others afterwards.
        teacher: a model folder or ORG/NAME on the Hub: the network learns its features of the same crop (empty: none).
        teacher_weight: weight of the teacher's loss, besides the labels' loss.
        teacher_precision: precision of the teacher: fp32, fp16, bf16 or int8.
        teacher_crops: compute its features once, of so many crops per image, which the epochs use in turn (0: at each
            step, of crops that are always new).
        teacher_gb: the most that those features may take on the disk, in GB.
        teacher_sha256, teacher_size: sha256 of its config.json, and its D. Training fills them in, and refuses
            another teacher afterwards.
        labels: learn the labels; without them, only features are learned, of the teacher or of the start.
        optimizer: sgd (the paper) or adamw, with PyTorch's betas, which has no `momentum`.
        epochs, batch_size, lr, momentum, weight_decay: settings of the optimiser.
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
        interpolation: interpolation of the validation images, bilinear or bicubic (None: `init`'s, or bilinear).
        mean, std: mean and standard deviation of the input, per channel in [0, 1] (None: `init`'s, or ImageNet's).
        preprocessing_version: version of the contract for decoding: 2, or 1 as in earlier versions.
        min_crop_area: training crops cover between this share and all of an image's area.
        trivial_augment: change each crop by a random operation of TrivialAugment (wide).
        erasing: probability that a rectangle of a crop becomes the mean colour (0, the paper: none).
        projection: hidden units of an MLP between the features and all that is learned from them, which is thrown
            away with the classifier (0, the paper: none).
        loss: loss of the labels, `cross_entropy` (the paper) or `ldr_kl`, which has lambda `ldr_lam` and the margin
            `ldr_margin`; see `label_losses`.
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
        target_rule: how q0 is estimated from a target's images: `mean` or `em` (see `estimate_reference`).
        reference: q0 as shares by concept, normalised to sum to 1 (None, the paper: N_k / N).
        classifier_epochs: first epochs, in which only the classifier and other new layers learn. The features stay as
            in `init`.
        freeze_norms: BatchNorm keeps the start's statistics in training, which needs `init`.
        recalibrate: after the last epoch, measure BatchNorm's running statistics anew on so many batches of
            unperturbed images (0, the paper: they stay as training left them, on x~).
        precision: fp32, bf16 or fp16 (autocast; fp16 only on GPUs).
        compile: run the network through torch.compile.
        cache_px: decode each training image once, to a square of this side that a cache keeps (0: decode each time).
        seed: random seed of the initial weights, the order and the crops.
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
    preprocessing_version: int = CONTRACT_VERSION
    min_crop_area: float = 0.08
    trivial_augment: bool = False
    erasing: float = 0.0
    projection: int = 0
    loss: str = "cross_entropy"
    ldr_lam: float = 1.0
    ldr_margin: float = 0.0
    label_smoothing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    tau: float = 1.0
    tau_unit: str = "normalised"
    tau_step: str = "unit"
    inner: str = "full"
    replays: int = 4
    inner_batch_norm: str = "batch"
    stable_weight: float = 0.01
    stable_steps: int = 1
    stable_anchor: str = "self"
    p_lam: float = 0.0
    p_divergence: str = "l2"
    lam: float = 10.0
    q_divergence: str = "l2"
    q_warmup_steps: int = 1000
    q_warmup_divisor: float | str = 10.0
    q_baseline: bool = False
    target_rule: str = "mean"
    reference: dict[str, float] | None = None
    classifier_epochs: int = 0
    freeze_norms: bool = False
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
        check_shapes(self)
        if self.network == "auto" and not self.init:
            object.__setattr__(self, "network", "resnet18")
        object.__setattr__(self, "milestones", tuple(self.milestones))
        for name in ("mean", "std"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        object.__setattr__(self, "image_sizes", tuple((first, side) for first, side in self.image_sizes))
        check_values(self)
        try:
            self.preprocessing()
        except (ValueError, TypeError) as exc:
            raise InputError(str(exc)) from exc

    @property
    def augments(self) -> bool:
        """Whether crops are changed after they are cut."""
        return self.trivial_augment or self.erasing > 0

    @property
    def classifies(self) -> bool:
        """Whether training fits a classifier directly on the features, which then belongs to the model."""
        return self.labels and not self.projection

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
            version=self.preprocessing_version,
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
        if changes.get("init") and not self.init and self.network == "resnet18":
            own["network"] = "auto"  # without a start, `resnet18` may just be the default
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
            data: data of this version, or of an earlier one, which decoded images by version 1 of the contract.
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
        data = {"preprocessing_version": 1, **_without_removed(data)}
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


def _without_removed(data: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that a recipe has now.

    Raises:
        InputError: a removed key has another value than its default.
    """
    for name, default in _REMOVED.items():
        if name in data and data[name] != default:
            raise invalid(name, f"is no longer supported; expected {default!r}, or no {name}", data[name])
    return {name: value for name, value in data.items() if name not in _REMOVED}


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
    return Recipe.from_dict({"preprocessing_version": CONTRACT_VERSION, **data}, config)
