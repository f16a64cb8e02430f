"""Teaches a classifier with as few labels as it needs: it asks for the label of the image that it knows least.

    python examples/few_labels.py examples/images hat shoes

The folder of an image stands in for the person who labels it.
"""

import sys
from pathlib import Path

import numpy as np
from sklearn.linear_model import LogisticRegression

from robustfeat import FeatureExtractor


def main(folder: str, *classes: str) -> None:
    """Prints the accuracy on the images without a label after each answer."""
    files = [file for name in classes for file in sorted(Path(folder, name).glob("*.jpg"))]
    answers = np.array([file.parent.name for file in files])
    features = FeatureExtractor.from_pretrained().embed(files)
    features /= np.linalg.norm(features, axis=1, keepdims=True)

    labelled = [int(np.flatnonzero(answers == name)[0]) for name in classes]
    while len(labelled) < len(files):
        head = LogisticRegression(C=10).fit(features[labelled], answers[labelled])
        rest = np.setdiff1d(np.arange(len(files)), labelled)
        right = (head.predict(features[rest]) == answers[rest]).mean()
        print(f"{len(labelled)} labels: {right:.0%} of the other {len(rest)} images are right")
        least = rest[head.predict_proba(features[rest]).max(axis=1).argmin()]
        labelled.append(int(least))


if __name__ == "__main__":
    main(*sys.argv[1:])
