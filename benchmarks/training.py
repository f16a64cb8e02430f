"""What a step of each method costs beside a step of ERM, and what feeding it costs beside data that lies in memory.

    python benchmarks/training.py --out training.json [--data tiny-imagenet/] [--side 64] [--batch-size 256]

One process, one device (the GPU where there is one), the trainer's own step. The methods take turns: one step of each
(on a GPU twelve, since the host runs ahead there; free: one after the other of its replays), N times over, each time in
another order, since a step leaves its caches to the next; the figures are medians. `ideal` is the network's forward and
backward pass alone. With --data, ERM steps from the decoded cache and from its sources take turns with steps on one
batch that lies in memory.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable, Iterator
from itertools import count, repeat
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from machine import hardware
from robustfeat.system import available_cpus
from robustfeat.training.concepts import ConceptMap
from robustfeat.training.data.batches import Batch, EpochPlan, TrainingBatches, load_batches
from robustfeat.training.data.cache import CachedSet, build_cache, cached_batches
from robustfeat.training.data.image_set import ImageSet
from robustfeat.training.data.opening import open_training_data
from robustfeat.training.loop.ranks import Ranks
from robustfeat.training.loop.step import TrainingStep
from robustfeat.training.objective import Objective, create_objective
from robustfeat.training.recipe import Recipe

VARIANTS: dict[str, dict[str, Any]] = {
    "ERM": {"method": "erm"},
    "CL": {"method": "cl"},
    "EL": {"method": "el"},
    "HRRL full": {"method": "hrrl"},
    "HRRL half": {"method": "hrrl", "inner": "half"},
    "HRRL free": {"method": "hrrl", "inner": "free"},
    "random": {"method": "random"},
    "GroupDRO": {"method": "groupdro"},
}
CONCEPTS = 11


class Bench:
    """Steps of one device, timed."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.set_num_threads(available_cpus())
        self.arguments = arguments
        self.classes = arguments.classes
        of_class = np.arange(self.classes) % CONCEPTS
        names = tuple(f"concept {number}" for number in range(CONCEPTS))
        self.concepts = ConceptMap(names, of_class, np.full(self.classes, 500))
        self.recipe = Recipe(
            image_sizes=((0, arguments.side),), precision=arguments.precision, compile=arguments.compile,
            batch_size=arguments.batch_size,
        )  # fmt: skip
        generator = torch.Generator().manual_seed(0)
        shape = (arguments.batch_size, 3, arguments.side, arguments.side)
        pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        labels = torch.randint(0, self.classes, (arguments.batch_size,), generator=generator)
        self.batch = Batch(pixels.contiguous(memory_format=torch.channels_last).to(self.device), labels.to(self.device))
        self.pixels, self.labels = self.batch.pixels(self.device, arguments.side), self.batch.labels

    def step(self, **changes: Any) -> TrainingStep:
        made = TrainingStep(self.recipe.replace(**changes), self.concepts, self.device, Ranks())
        made.train()
        return made

    def seconds(self, work: Callable[[], object]) -> float:
        self.wait()
        began = time.perf_counter()
        work()
        self.wait()
        return time.perf_counter() - began

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def interleaved(self, works: dict[str, Callable[[int], object]]) -> dict[str, list[float]]:
        """Seconds of `steps` turns of each, after three that do not count."""
        times: dict[str, list[float]] = {name: [] for name in works}
        burst = 12 if self.device.type == "cuda" else 1
        order, shuffled = list(works), random.Random(0)
        for turn in range(-3, self.arguments.steps):
            shuffled.shuffle(order)
            for name in order:
                work = works[name]
                numbers = range((turn + 3) * burst, (turn + 4) * burst)
                taken = self.seconds(lambda work=work, numbers=numbers: [work(n) for n in numbers])  # type: ignore[misc]
                if turn >= 0:
                    times[name].append(taken / burst)
        return times

    def methods(self) -> dict[str, Any]:
        """Each method's step as a ratio to ERM's."""
        # One network for all: where its tensors lie in memory makes a step some percent faster or slower.
        step = self.step()
        objectives = {
            name: create_objective(self.recipe.replace(**changes), self.concepts) for name, changes in VARIANTS.items()
        }

        def forward_backward(turn: int) -> None:
            with step.autocast():
                logits = step.network(step.to_input(self.pixels).contiguous(memory_format=torch.channels_last))
            functional.cross_entropy(logits.float(), self.labels).backward()
            step.network.zero_grad()

        def run(objective: Objective, turn: int) -> None:
            step.objective = objective
            step(self.pixels, self.labels, 0.0, turn, replay=turn % objective.replays)

        works: dict[str, Callable[[int], object]] = {"ideal": forward_backward}
        for name, objective in objectives.items():
            works[name] = lambda turn, objective=objective: run(objective, turn)  # type: ignore[misc]
        times = self.interleaved(works)
        replays = {name: objectives[name].replays if name in objectives else 1 for name in works}
        medians = {
            # Steps of a cycle differ: the median of each place in it, and their mean.
            name: statistics.mean(statistics.median(taken[place :: replays[name]]) for place in range(replays[name]))
            for name, taken in times.items()
        }
        return {
            name: {
                "ratio_to_erm": round(median / medians["ERM"], 3),
                "images_per_s": round(self.arguments.batch_size / median, 1),
                "spread": [round(q / median, 3) for q in np.quantile(times[name], [0.1, 0.9])],
            }
            for name, median in medians.items()
        }

    def loading(self) -> dict[str, Any]:
        """ERM steps fed by the trainer's loaders, as ratios to steps on a batch that lies in memory."""
        side, size = self.arguments.side, self.arguments.batch_size
        step = self.step(method="erm")
        train, _ = open_training_data(self.arguments.data, parts=1)
        cached = build_cache(
            train, side, "device" if self.device.type == "cuda" else "ram", device=self.device, workers=2, quiet=True
        )
        feeds = {"cache": (self.batches(cached, side, size)), "decoding": (self.batches(train, side, size))}

        def fed(batches: Iterator[Batch], turn: int) -> None:
            batch = next(batches)
            step(batch.pixels(self.device, side), batch.labels, 0.0, turn)

        works: dict[str, Callable[[int], object]] = {"memory": lambda turn: fed(repeat(self.batch), turn)}
        works |= {name: lambda turn, feed=feed: fed(feed, turn) for name, feed in feeds.items()}  # type: ignore[misc]
        # Each feed alone beside memory: loaders work ahead, on the same processors.
        ratios = {}
        for name in feeds:
            times = self.blocks({"memory": works["memory"], name: works[name]})
            ratios[name] = round(statistics.median(times[name]) / statistics.median(times["memory"]), 3)
        return {f"{name}_ratio_to_memory": ratio for name, ratio in ratios.items()}

    def blocks(self, works: dict[str, Callable[[int], object]]) -> dict[str, list[float]]:
        """As `interleaved`, in turns of ten steps, so that what a loader prepared ahead is used up within a turn."""
        times: dict[str, list[float]] = {name: [] for name in works}
        for turn in range(-1, max(3, self.arguments.steps // 5)):
            for name, work in works.items():
                taken = self.seconds(lambda work=work: [work(number) for number in range(10)])  # type: ignore[misc]
                if turn >= 0:
                    times[name].append(taken)
        return times

    def batches(self, data: ImageSet, side: int, size: int) -> Iterator[Batch]:
        for epoch in count():
            batches = TrainingBatches(data, side, EpochPlan(data, size, seed=0, epoch=epoch))
            if isinstance(data, CachedSet) and self.device.type == "cuda":
                yield from cached_batches(data, batches.plan, range(len(batches)), self.device)
            else:
                workers = 1 if isinstance(data, CachedSet) else available_cpus()
                yield from load_batches(batches, workers, pin=self.device.type == "cuda")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True)
    parser.add_argument("--data", help="a training set, to measure loading")
    parser.add_argument("--side", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--classes", type=int, default=200)
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--only", choices=["methods", "loading"])
    arguments = parser.parse_args()
    bench = Bench(arguments)
    name = torch.cuda.get_device_name() if bench.device.type == "cuda" else "cpu"
    result: dict[str, Any] = {
        "machine": hardware(),
        "device": name,
        "torch": torch.__version__,
        "asked": vars(arguments),
    }
    if arguments.only != "loading":
        result["methods"] = bench.methods()
        for method, numbers in result["methods"].items():
            print(f"{method:10}  {numbers['ratio_to_erm']:6.3f} x ERM  {numbers['images_per_s']:9,.1f} images/s")
        share = result["methods"]["ideal"]["ratio_to_erm"]
        print(f"forward and backward alone take {share:.1%} of an ERM step")
    if arguments.data and arguments.only != "methods":
        result["loading"] = bench.loading()
        print("\n".join(f"{name}: {ratio}" for name, ratio in result["loading"].items()))
    with open(arguments.out, "w", encoding="utf-8") as handle:
        json.dump(result, handle, indent=1)


if __name__ == "__main__":
    main()
