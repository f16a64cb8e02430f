"""How near the rules of `target_rule` come to a target's shares of concepts, where these are known.

    python benchmarks/target_shares.py tiny-imagenet/ --cifar10 cifar10/ --man-made caltech-artifacts/

Prints the tables of docs/training-options.md. First: 2,000 validation images of DATA, drawn with other shares of
concepts, three times each; half the sum of the absolute errors of the shares, for each rule and for the shares of
training. Then other datasets, whose concepts follow from their classes: CIFAR-10's, and the share of living things in
a set without any.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robustfeat.hub.catalog import resolve_model
from robustfeat.hub.folder import TRAINING
from robustfeat.serving.extractor import FeatureExtractor
from robustfeat.serving.heads.shares import fit_shares
from robustfeat.training.concepts import assign_concepts
from robustfeat.training.data.image_set import ImageSet
from robustfeat.training.data.opening import open_training_data
from robustfeat.training.target import read_classifier

Array = NDArray[np.float64]

IMAGENET = {
    "Animal": 121, "Artifact": 107, "Bird": 59, "Container": 56, "Device": 129, "Dog": 118, "Instrumentality": 106,
    "Mammal": 100, "Structure": 57, "Vehicle": 67, "Others": 80,
}  # fmt: skip
CIFAR10 = {
    "airplane": "Vehicle", "automobile": "Vehicle", "bird": "Bird", "cat": "Mammal", "deer": "Mammal", "dog": "Dog",
    "frog": "Animal", "horse": "Mammal", "ship": "Vehicle", "truck": "Vehicle",
}  # fmt: skip
LIVING = ("Animal", "Bird", "Dog", "Mammal")
DRAWN, SEEDS, CHUNK = 2000, 3, 512


class Classifier:
    """The model's probabilities of the concepts.

    Args:
        model: trained by robustfeat on ImageNet's classes or some of them.
    """

    def __init__(self, model: str) -> None:
        folder = resolve_model(model)
        self._extractor = FeatureExtractor.open(folder)
        self._weight, self._bias = read_classifier(folder)
        self.classes: list[str] = json.loads(folder.read(TRAINING))["classes"]
        self.concepts = assign_concepts("imagenet11", self.classes, np.ones(len(self.classes), np.int64))
        self._membership = np.eye(len(self.concepts.names))[self.concepts.of_class]
        self.prior: Array = self._membership.mean(0)

    def __call__(self, data: ImageSet) -> Array:
        """(N, K) for all images."""
        starts = range(0, len(data), CHUNK)
        parts = [
            self._extractor.embed(data.read(row) for row in range(start, min(start + CHUNK, len(data))))
            for start in starts
        ]
        logits = np.concatenate(parts).astype(np.float64) @ self._weight.T + self._bias
        shares = np.exp(logits - logits.max(1, keepdims=True))
        found: Array = shares / shares.sum(1, keepdims=True) @ self._membership
        return found


def estimates(posteriors: Array, prior: Array) -> dict[str, Array]:
    return {"N_k / N": prior, "mean": posteriors.mean(0), "em": fit_shares(posteriors, prior, least=0.1 / len(prior))}


def wanted_shares(names: list[str], prior: Array) -> dict[str, Array]:
    half = np.array([0.25 if name in {"Bird", "Dog"} else 0.5 / (len(names) - 2) for name in names])
    man_made = np.where([name in {*LIVING, "Others"} for name in names], 0, prior)
    return {
        "as in training": prior,
        "ImageNet's": np.array([IMAGENET[name] for name in names]) / 1000,
        "half birds and dogs": half,
        "only man-made things": man_made / man_made.sum(),
    }


def print_row(title: str, cells: dict[str, Any]) -> None:
    print(f"| {title} | {' | '.join(str(cell) for cell in cells.values())} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--model", default="builtin")
    parser.add_argument("--cifar10", metavar="DATA")
    parser.add_argument("--man-made", metavar="DATA")
    options = parser.parse_args()
    classifier = Classifier(options.model)
    names, prior = list(classifier.concepts.names), classifier.prior
    _, validation = open_training_data(options.data)
    posteriors, concepts = classifier(validation), classifier.concepts.of_class[validation.labels]
    print("| shares | N_k / N | mean | em |\n|---|---|---|---|")
    for title, shares in wanted_shares(names, prior).items():
        errors: dict[str, list[float]] = {}
        for seed in range(SEEDS):
            rng = np.random.default_rng(seed)
            drawn = enumerate(rng.multinomial(DRAWN, shares))
            rows = np.concatenate([rng.choice(np.flatnonzero(concepts == one), count) for one, count in drawn])
            truth = np.bincount(concepts[rows], minlength=len(names)) / DRAWN
            for rule, estimate in estimates(posteriors[rows], prior).items():
                errors.setdefault(rule, []).append(np.abs(estimate - truth).sum() / 2)
        print_row(title, {rule: f"{np.mean(of):.3f} ± {np.std(of, ddof=1):.3f}" for rule, of in errors.items()})
    if options.cifar10:
        _, test = open_training_data(options.cifar10)
        own = np.array([names.index(CIFAR10[name]) for name in test.classes])[test.labels]
        truth = np.bincount(own, minlength=len(names)) / len(own)
        found = estimates(classifier(test), prior)
        print_row("CIFAR-10", {rule: f"{np.abs(of - truth).sum() / 2:.3f}" for rule, of in found.items()})
    if options.man_made:
        _, test = open_training_data(options.man_made)
        living = [names.index(name) for name in LIVING]
        found = estimates(classifier(test), prior)
        print_row("man-made, share of living things", {rule: f"{of[living].sum():.3f}" for rule, of in found.items()})


if __name__ == "__main__":
    main()
