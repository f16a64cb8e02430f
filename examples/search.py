"""Embeds a folder once, and prints the images that are most like a given one.

    python examples/search.py examples/images examples/images/hat/hat-1.jpg

The features are kept in feats.npy. A second call embeds only the given image.
"""

import sys
from pathlib import Path

import numpy as np

import robustfeat


def main(folder: str, query: str) -> None:
    """Prints cosine and path of the five nearest images."""
    if not Path("feats.npy").exists():
        robustfeat.embed(folder, "feats.npy", quiet=True)
    collection = robustfeat.load("feats.npy")
    rows = np.flatnonzero(collection.good)
    values = collection.values[rows]
    wanted = robustfeat.FeatureExtractor.from_pretrained().embed([query])[0]
    cosines = values @ wanted / (np.linalg.norm(values, axis=1) * np.linalg.norm(wanted))
    for place in np.argsort(-cosines)[:5]:
        print(f"{cosines[place]:.3f}  {collection.paths[rows[place]]}")


if __name__ == "__main__":
    main(*sys.argv[1:])
