"""Why a run diverged, and what to change."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from robustfeat.errors import DivergedError
from robustfeat.training.loop.run_folder import CHECKPOINT_NAME
from robustfeat.training.recipe import Recipe

__all__ = ["explain_divergence"]

_HEAVY_WEIGHT = 10.0
_STRONG_TAU = 3.0


def explain_divergence(
    recipe: Recipe,
    step: int,
    reason: str,
    *,
    metrics: Mapping[str, Any],
    tau_at_224px: float,
    folder: Path,
    saved_step: int,
) -> DivergedError:
    """The error that ends a diverged run.

    Args:
        recipe: recipe of the run.
        step: where it diverged.
        reason: the observation.
        metrics: the last line in the log.
        tau_at_224px: the objective's; 0 without an example level.
        folder: folder of the run.
        saved_step: step of the last checkpoint.
    """
    cause, change = _likely_cause(recipe, metrics, tau_at_224px)
    return DivergedError(
        f"training diverged at step {step} ({reason}); likely cause: {cause}. {folder / CHECKPOINT_NAME} is intact, "
        f"of step {saved_step}",
        fix=f"try {change}, in a new run with another `out`",
    )


def _likely_cause(recipe: Recipe, metrics: Mapping[str, Any], tau_at_224px: float) -> tuple[str, str]:
    """The cause, and what to change."""
    if metrics.get("weight_max", 0) >= _HEAVY_WEIGHT:
        return (
            f"an example of concept {metrics.get('heaviest')} weighed {metrics['weight_max']:.1f} times as much as at "
            "the start",
            "a larger `lam` or a smaller `lr`",
        )
    if recipe.precision == "fp16":
        return "numbers beyond fp16's range", "`precision=bf16`"
    if recipe.method == "stable":
        return (
            f"a learning rate of {recipe.lr:g} is too high, or a `stable_weight` of {recipe.stable_weight:g} for "
            "features of this scale",
            "a smaller `lr` or `stable_weight`",
        )
    strong = f", or a smaller `tau` than {tau_at_224px:g}" if tau_at_224px > _STRONG_TAU else ""
    return f"a learning rate of {recipe.lr:g} is too high", f"a smaller `lr`{strong}"
