"""Asks a server with the built-in model for the features of its golden images, and compares them.

    python docker/compare.py http://127.0.0.1:8000

Exits with 1 where a cosine is below 0.9999.
"""

from __future__ import annotations

import io
import sys
import urllib.request

import numpy as np

from robustfeat.hub.catalog import builtin_model

NEEDED = 0.9999


def embed(url: str, image: bytes) -> np.ndarray:
    """(1, D) float32."""
    request = urllib.request.Request(f"{url}/embed", image, {"Accept": "application/x-npy"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        features: np.ndarray = np.load(io.BytesIO(answer.read()))
    return features


def main(url: str) -> int:
    """The exit code."""
    images, expected = builtin_model().golden()
    found = np.concatenate([embed(url, image) for image in images])
    cosines = (found * expected).sum(1) / np.linalg.norm(found, axis=1) / np.linalg.norm(expected, axis=1)
    print(f"{url}: {len(images)} golden images, least cosine {cosines.min():.6f}")
    return 0 if cosines.min() >= NEEDED else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
