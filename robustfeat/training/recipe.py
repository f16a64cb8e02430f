"""Recipes: how a model is trained, as frozen data that is saved with the run."""

from __future__ import annotations

import dataclasses
import tomllib
from dataclasses import dataclass, field, fields
from importlib import resources
from pathlib import Path
from typing import Any

from robustfeat.errors import InputError
from robustfeat.hub.preprocessing import Preprocessing

__all__ = ["Recipe", "load_recipe", "shipped_recipes"]


_INTEGERS = frozenset({"epochs", "batch_size", "q_warmup_steps", "seed"})
_RANGES: tuple[tuple[str, float, float], ...] = (
    ("epochs", 1, 100_000),
    ("batch_size", 2, 1_000_000),
    ("lr", 1e-12, 1e30),
    ("momentum", 0, 0.999999),
    ("weight_decay", 0, 1e6),
    ("warmup_epochs", 0, 100_000),
    ("min_crop_area", 1e-6, 1),
    ("tau", 0, 1e6),
    ("tau_ramp_epochs", 0, 100_000),
    ("lam", 1e-12, 1e30),
    ("q_warmup_steps", 0, 1e12),
    ("q_warmup_divisor", 1, 1e12),
    ("seed", 0, 2**40),
    ("val_fraction", 0, 1),
)


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a run's result besides its data. The defaults are the paper's, for ImageNet.

    Attributes:
        method: erm, el, cl, hrrl, or package.module:Class.
        concepts: imagenet11, classes, or a CSV file `class,concept`.
        epochs, batch_size, lr, momentum, weight_decay, nesterov: of SGD.
        schedule: `step` (lr / 10 at each of `milestones`, in epochs) or `linear` (to zero at the end).
        warmup_epochs: lr rises linearly from zero for so long.
        image_sizes: (first epoch, S in pixels) pairs; the training crops grow with the epochs.
        validation_size: S of the validation images, and the exported model's default.
        crop_pct: share of the resized validation image that its centre crop keeps.
        min_crop_area: training crops cover between this share and all of an image's area.
        tau: length of the example-level step at 224 px; at side S it is tau * S / 224.
        tau_ramp_epochs: tau rises linearly from zero for so long (0, the paper: it does not).
        lam: lambda of the concept level.
        q_warmup_steps, q_warmup_divisor: s and c of Algorithm 1.
        precision: fp32 or bf16 (autocast).
        seed: of the initial weights, the order and the crops.
        val_fraction: share of the training images held out where the data has no validation split.
        parts: use only the first so many Parquet files of the training split (None: all).
    """

    method: str = "hrrl"
    concepts: str = "imagenet11"
    epochs: int = 90
    batch_size: int = 256
    lr: float = 0.1
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 1e-4
    schedule: str = "step"
    milestones: tuple[int, ...] = (30, 60)
    warmup_epochs: float = 0.0
    image_sizes: tuple[tuple[int, int], ...] = ((0, 224),)
    validation_size: int = 224
    crop_pct: float = 0.875
    min_crop_area: float = 0.08
    tau: float = 0.35
    tau_ramp_epochs: float = 0.0
    lam: float = 10.0
    q_warmup_steps: int = 1000
    q_warmup_divisor: float = 10.0
    precision: str = "fp32"
    seed: int = 0
    val_fraction: float = 0.02
    parts: int | None = field(default=None)

    def __post_init__(self) -> None:
        object.__setattr__(self, "milestones", tuple(int(epoch) for epoch in self.milestones))
        object.__setattr__(self, "image_sizes", tuple((int(first), int(side)) for first, side in self.image_sizes))
        for name, least, most in _RANGES:
            value = getattr(self, name)
            kind = int if name in _INTEGERS else (int, float)
            if isinstance(value, bool) or not isinstance(value, kind) or not least <= value <= most:
                whole = "a whole number " if name in _INTEGERS else ""
                raise InputError(f"recipe: {name} must be {whole}from {least:g} to {most:g}; got {value!r}")
        if self.parts is not None and (not isinstance(self.parts, int) or self.parts < 1):
            raise InputError(f"recipe: parts must be a whole number >= 1; got {self.parts!r}")
        if self.nesterov and not self.momentum:
            raise InputError("recipe: nesterov needs a momentum above 0")
        starts = [first for first, _ in self.image_sizes]
        if not starts or starts[0] != 0 or starts != sorted(set(starts)):
            raise InputError(f"recipe: image_sizes must start at epoch 0 and ascend; got {self.image_sizes}")
        if min(side for _, side in self.image_sizes) < 16:
            raise InputError(f"recipe: image_sizes must be at least 16 px; got {self.image_sizes}")
        if self.schedule not in {"step", "linear"}:
            raise InputError(f"recipe: schedule must be step or linear; got {self.schedule!r}")
        if self.precision not in {"fp32", "bf16"}:
            raise InputError(f"recipe: precision must be fp32 or bf16; got {self.precision!r}")
        try:
            self.preprocessing()
        except ValueError as exc:
            raise InputError(f"recipe: {exc}") from exc

    def image_size(self, epoch: int) -> int:
        """S of the training crops in this epoch, counted from 0."""
        return [side for first, side in self.image_sizes if first <= epoch][-1]

    def learning_rate(self, epoch: float) -> float:
        """At this point of training, in epochs."""
        if epoch < self.warmup_epochs:
            return self.lr * epoch / self.warmup_epochs
        if self.schedule == "step":
            return self.lr * 0.1 ** sum(epoch >= milestone for milestone in self.milestones)
        return self.lr * min(1.0, max(0.0, (self.epochs - epoch) / max(self.epochs - self.warmup_epochs, 1e-9)))

    def preprocessing(self, image_size: int | None = None, crop_pct: float | None = None) -> Preprocessing:
        """The contract that the trained model is evaluated and exported with."""
        return Preprocessing(
            self.validation_size if image_size is None else image_size,
            self.crop_pct if crop_pct is None else crop_pct,
        )

    def replace(self, **changes: Any) -> Recipe:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        data = dataclasses.asdict(self)
        return {**data, "milestones": list(self.milestones), "image_sizes": [list(pair) for pair in self.image_sizes]}

    @classmethod
    def from_dict(cls, data: dict[str, Any], source: str = "recipe") -> Recipe:
        """The inverse of `to_dict`; keys left out take their defaults.

        Raises:
            InputError: a key is unknown or a value is out of range.
        """
        known = {item.name for item in fields(cls)}
        unknown = sorted(set(data) - known)
        if unknown:
            raise InputError(f"{source}: unknown key {unknown[0]!r}; known are {', '.join(sorted(known))}")
        try:
            return cls(**data)
        except (TypeError, ValueError) as exc:
            raise InputError(f"{source}: a value has the wrong type ({exc})") from exc


def shipped_recipes() -> list[str]:
    """Names that `load_recipe` knows."""
    folder = resources.files("robustfeat.training").joinpath("recipes")
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


def load_recipe(source: str) -> Recipe:
    """A recipe that ships with the package, by name, or a TOML file.

    Raises:
        InputError: there is none, or it is not valid.
    """
    if source in shipped_recipes():
        text = resources.files("robustfeat.training").joinpath(f"recipes/{source}.toml").read_text("utf-8")
    else:
        try:
            text = Path(source).read_text("utf-8")
        except (OSError, UnicodeDecodeError) as exc:
            raise InputError(
                f"--config {source}: neither a TOML file nor one of {', '.join(shipped_recipes())}"
            ) from exc
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as exc:
        raise InputError(f"--config {source}: not valid TOML ({exc})") from exc
    return Recipe.from_dict(data, f"--config {source}")
