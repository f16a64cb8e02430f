"""What the concept level's noise costs, and what takes it away: a linear softmax on a model's features.

    python benchmarks/concept_noise.py tiny-imagenet/ --rows 20000 --features features.npz

The features of `--model` are computed once, to `--features`. Then one linear layer learns DATA's classes from them by
SGD with HRRL's concept level, for each lambda and each way to lessen the noise: none, `q_baseline` (the last batch's
mean loss) and a running mean of each concept's losses. Prints a table of docs/concept-noise.md: mean and deviation
over the seeds of the validation accuracy, of the accuracy on the worst concept, and of the heaviest weight ever.

With `--estimate` it prints the other table there: how far weights differ between the seeds, and how far
`weight_noise` says that they do, both times lambda, which is so large that the model learns as by ERM.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from robustfeat.serving.extractor import FeatureExtractor
from robustfeat.training.concepts import ConceptMap, assign_concepts
from robustfeat.training.data.image_set import ImageSet
from robustfeat.training.data.opening import open_training_data
from robustfeat.training.hrrl import ConceptAdversary, concept_totals, project_simplex

BATCH = 256
OBSERVER = 1e4
"""A lambda with which all weights stay near 1."""
CHUNK = 512


class RunningMeans(ConceptAdversary):
    """Takes a running mean of its concept's losses from each loss, and adds it to g_k again, whatever the batch.

    g stays unbiased, since the means are of earlier batches.

    Args:
        decay: what the sums keep from step to step.
        options: of `ConceptAdversary`.
    """

    def __init__(self, *args: Any, decay: float, **options: Any) -> None:
        super().__init__(*args, **options)
        self._decay = decay
        self._sums, self._counts = torch.zeros_like(self.q), torch.zeros_like(self.q)

    def update(self, losses: Tensor, concepts: Tensor) -> None:
        sums, counts, _ = concept_totals(losses, concepts, len(self.q))
        overall = sums.sum() / counts.sum() if self.step == 0 else self._sums.sum() / self._counts.sum()
        means = torch.where(self._counts > 0, self._sums / self._counts.clamp_min(1e-9), overall)
        centred = self._n_over_nk * (sums - means * counts) / counts.sum() + means
        self.step += 1
        rate = 1 / (self.lam * self.step * (float(self.c or 1) if self.step <= self.warmup_steps else 1))
        self.q = project_simplex(self.q + rate * (centred - self.lam * (self.q - self.reference)))
        self._sums, self._counts = self._decay * self._sums + sums, self._decay * self._counts + counts


def create_adversary(kind: str, concepts: ConceptMap, lam: float, options: argparse.Namespace) -> ConceptAdversary:
    counts = torch.from_numpy(concepts.counts)
    c: float | str = options.c if options.c == "auto" else float(options.c)
    settings: dict[str, Any] = {"warmup_steps": options.s, "c": c}
    if kind.startswith("running"):
        return RunningMeans(counts, lam, decay=float(kind.split()[1]), **settings)
    passes = int(counts.sum()) // BATCH
    return ConceptAdversary(counts, lam, baseline=kind == "q_baseline", pass_steps=passes, **settings)


def features_of(extractor: FeatureExtractor, data: ImageSet, rows: int) -> NDArray[np.float32]:
    parts = [
        extractor.embed(data.read(row) for row in range(start, min(start + CHUNK, rows)))
        for start in range(0, rows, CHUNK)
    ]
    features: NDArray[np.float32] = np.concatenate(parts)
    return features


def load_features(options: argparse.Namespace) -> dict[str, Any]:
    """Features and labels of both splits, and the classes' names."""
    if not options.features.exists():
        train, validation = open_training_data(options.data)
        found: dict[str, Any] = {"classes": np.array(train.classes)}
        extractor = FeatureExtractor.from_pretrained(options.model)
        for name, data, limit in (("", train, options.rows), ("_test", validation, options.validation_rows)):
            rows = min(limit, len(data))
            found |= {"x" + name: features_of(extractor, data, rows), "y" + name: data.labels[:rows]}
        np.savez(options.features, **found)
    with np.load(options.features) as kept:
        return {name: kept[name] for name in kept.files}


class Trial:
    """A linear softmax on standardised features.

    Args:
        found: of `load_features`.
        options: of the command line.
    """

    def __init__(self, found: dict[str, Any], options: argparse.Namespace) -> None:
        x, self._options, self._classes = found["x"], options, len(found["classes"])
        mean, std = x.mean(0), x.std(0) + 1e-6
        self._x, self._x_test = (torch.from_numpy((part - mean) / std) for part in (x, found["x_test"]))
        self._y, self._y_test = torch.from_numpy(found["y"]), torch.from_numpy(found["y_test"])
        counts = np.bincount(found["y"], minlength=self._classes)
        self.concepts = assign_concepts(options.concepts, list(found["classes"]), counts)
        self._of = torch.from_numpy(self.concepts.of_class)

    def run(
        self, kind: str, lam: float, seed: int, watch: Callable[[int, ConceptAdversary], None] | None = None
    ) -> tuple[float, float, float]:
        """Accuracy, accuracy on the worst concept, both in %, and the heaviest weight at any time.

        `watch` gets the number of steps so far and the adversary, after each step.
        """
        options, order = self._options, torch.Generator().manual_seed(seed)
        layer = torch.nn.Linear(self._x.shape[1], self._classes)
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
        optimizer = torch.optim.SGD(layer.parameters(), lr=options.lr, momentum=0.9, weight_decay=5e-4)
        adversary = None if kind == "ERM" else create_adversary(kind, self.concepts, lam, options)
        heaviest, steps_of_pass = 1.0, len(self._x) // BATCH
        rows = torch.empty(0, dtype=torch.int64)
        for step in range(options.steps):
            at = step % steps_of_pass * BATCH
            if at == 0:
                rows = torch.randperm(len(self._x), generator=order)
            batch = rows[at : at + BATCH]
            losses = functional.cross_entropy(layer(self._x[batch]), self._y[batch], reduction="none")
            loss = losses.mean()
            if adversary is not None:
                loss = (adversary.weigh(losses.detach(), self._of[self._y[batch]]) * losses).mean()
                heaviest = max(heaviest, float(adversary.concept_weights().max()))
            optimizer.param_groups[0]["lr"] = options.lr * (1 - step / options.steps)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if watch and adversary is not None:
                watch(step + 1, adversary)
        with torch.no_grad():
            right = (layer(self._x_test).argmax(1) == self._y_test).double()
        own = self._of[self._y_test]
        worst = min(float(right[own == concept].mean()) for concept in torch.unique(own))
        return 100 * float(right.mean()), 100 * worst, heaviest


def print_estimates(trial: Trial, options: argparse.Namespace) -> None:
    """Root mean squares over the training images, as `weight_noise` is one."""
    shares = trial.concepts.counts / trial.concepts.counts.sum()
    print("| baseline | steps | measured noise | estimated noise | signal |\n|---|---|---|---|---|")
    for kind in ("none", "q_baseline"):
        seen: dict[int, list[tuple[NDArray[np.float64], float, float]]] = {}

        def watch(step: int, adversary: ConceptAdversary, seen: dict[int, Any] = seen) -> None:
            if step in options.estimate:
                signal, noise = (float(value) for value in adversary.weight_noise())
                seen.setdefault(step, []).append((adversary.concept_weights().numpy(), signal, noise))

        for seed in range(options.seeds):
            trial.run(kind, OBSERVER, seed, watch)
        for step, told in seen.items():
            weights, signals, noises = (np.array(values) for values in zip(*told, strict=True))
            measured = np.sqrt((shares * weights.var(0, ddof=1)).sum())
            numbers = measured, np.sqrt(np.mean(noises**2)), np.sqrt(np.mean(signals**2))
            print(f"| {kind} | {step} | {' | '.join(f'{OBSERVER * number:.2f}' for number in numbers)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--features", type=Path, required=True, metavar="FILE.npz")
    parser.add_argument("--model", default="builtin")
    parser.add_argument("--concepts", default="imagenet11")
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--validation-rows", type=int, default=10_000)
    parser.add_argument("--steps", type=int, default=195)
    parser.add_argument("--lr", type=float, default=0.02)
    parser.add_argument("--s", type=int, default=50)
    parser.add_argument("--c", default="10")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--lambdas", type=float, nargs="+", default=[1, 3, 10])
    parser.add_argument("--kinds", nargs="+", default=["none", "q_baseline", "running 0.9", "running 0.99"])
    parser.add_argument("--estimate", type=int, nargs="+", metavar="STEPS", help="after so many, then end")
    options = parser.parse_args()
    trial = Trial(load_features(options), options)
    if options.estimate:
        print_estimates(trial, options)
        return
    print("| lambda | baseline | accuracy | worst concept | heaviest weight |\n|---|---|---|---|---|")
    for lam, kind in [(0.0, "ERM"), *((lam, kind) for lam in options.lambdas for kind in options.kinds)]:
        values = np.array([trial.run(kind, lam, seed) for seed in range(options.seeds)])
        cells = [f"{mean:.2f} ± {sd:.2f}" for mean, sd in zip(values.mean(0), values.std(0, ddof=1), strict=True)]
        print(f"| {lam:g} | {kind} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
