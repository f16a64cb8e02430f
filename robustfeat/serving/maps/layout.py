"""Computes a two-dimensional layout: t-SNE of reduced features, started from their first two components.

It uses openTSNE if installed, whose time is proportional to the rows. Otherwise it uses scikit-learn's t-SNE with
Barnes and Hut's approximation, whose time grows slightly faster.

Sources: van der Maaten and Hinton, JMLR 2008; Linderman et al., Nature Methods 2019 (openTSNE's gradients); Kobak and
Berens, Nature Communications 2019 (the start and the rate of learning).
"""

from __future__ import annotations

import importlib.util
import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robustfeat.progress import Progress, remark

__all__ = ["has_opentsne", "lay_out", "to_unit_square"]

_EARLY, _LATER = 250, 500
"""Iterations with early exaggeration and after it, the defaults of both libraries."""
_EXACT_ROWS = 10
_PERPLEXITY = 30.0


def has_opentsne() -> bool:
    """Whether openTSNE is installed."""
    return importlib.util.find_spec("openTSNE") is not None


def lay_out(
    reduced: NDArray[np.float32], *, seed: int = 0, threads: int = 1, quiet: bool = False
) -> NDArray[np.float32]:
    """Computes coordinates such that neighbours in the features are neighbours in the plane.

    The same input, seed and library give the same coordinates.

    Args:
        reduced: (n, d) from `reduce_features`.
        seed: random seed.
        threads: number of threads.
        quiet: hide progress.

    Returns:
        (n, 2) float32, normalised by `to_unit_square`.
    """
    first = np.zeros((len(reduced), 2))
    first[:, : reduced.shape[1]] = reduced[:, :2]
    if len(reduced) < _EXACT_ROWS:
        return to_unit_square(first)
    spread = first[:, 0].std()
    start = first / (spread if spread > 0 else 1) * 1e-4
    # Equal rows would stay together, since no force separates them.
    start += np.random.default_rng(seed).normal(0, 1e-6, start.shape)
    perplexity = min(_PERPLEXITY, (len(reduced) - 1) / 3)
    method = _by_opentsne if has_opentsne() else _by_sklearn
    return to_unit_square(method(reduced, start, perplexity, seed, threads, quiet))


def _by_opentsne(
    reduced: NDArray[np.float32], start: NDArray[np.float64], perplexity: float, seed: int, threads: int, quiet: bool
) -> Any:
    from openTSNE import TSNE

    progress = Progress("layout", _EARLY + _LATER, "iterations", quiet=quiet)

    def advance(iteration: int, error: float, places: Any) -> bool:
        progress.advance(_EVERY)
        return False

    remark(f"finding the neighbours of {len(reduced):,} rows", quiet=quiet)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        places = TSNE(
            perplexity=perplexity,
            initialization=start,
            early_exaggeration_iter=_EARLY,
            n_iter=_LATER,
            random_state=seed,
            n_jobs=threads,
            callbacks=advance,
            callbacks_every_iters=_EVERY,
        ).fit(reduced)
    progress.finish()
    return places


_EVERY = 10


def _by_sklearn(
    reduced: NDArray[np.float32], start: NDArray[np.float64], perplexity: float, seed: int, threads: int, quiet: bool
) -> Any:
    from sklearn.manifold import TSNE

    remark(f"layout of {len(reduced):,} rows by scikit-learn, which reports no progress", quiet=quiet)
    model = TSNE(
        perplexity=perplexity,
        init=start.astype(np.float32),
        max_iter=_EARLY + _LATER,
        random_state=seed,
        n_jobs=threads,
    )
    return model.fit_transform(reduced)


def to_unit_square(places: Any) -> NDArray[np.float32]:
    """Centres coordinates and scales the longer side of their box to 0 to 1."""
    found = np.asarray(places, np.float64)
    low, high = found.min(0), found.max(0)
    side = max(float((high - low).max()), 1e-12)
    return np.asarray((found - (low + high) / 2) / side + 0.5, np.float32)
