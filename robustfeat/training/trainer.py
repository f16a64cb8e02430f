"""Training in one process, on a CPU or a GPU: SGD, checkpoints, exact resume, metrics as JSON lines."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from robustfeat.errors import CheckpointError, DataError, InputError, TrainingError
from robustfeat.files import new_file
from robustfeat.hub.preprocessing import Preprocessing
from robustfeat.progress import Progress
from robustfeat.serving.cpus import available_cpus
from robustfeat.training.checkpoint import CHECKPOINT_NAME, Checkpoint, load_checkpoint, save_checkpoint
from robustfeat.training.concepts import assign_concepts
from robustfeat.training.data import (
    EvaluationBatches,
    TrainingBatches,
    is_hub_dataset,
    load_batches,
    open_training_data,
)
from robustfeat.training.hrrl import DivergedError
from robustfeat.training.network import build_network
from robustfeat.training.objective import create_objective
from robustfeat.training.recipe import Recipe

__all__ = ["METRICS_NAME", "TrainingResult", "train"]

METRICS_NAME = "metrics.jsonl"
_LOG_EVERY_STEPS = 50
_MAX_BAD_SHARE = 0.01


@dataclass(frozen=True)
class TrainingResult:
    """How a run ended.

    Attributes:
        run: its folder.
        validation_accuracy: share of validation images classified correctly by the last epoch's parameters.
        bad_images: the images that could not be decoded and were left out.
    """

    run: Path
    validation_accuracy: float
    bad_images: tuple[str, ...]


def train(
    data: str | Path,
    recipe: Recipe,
    out: str | Path,
    *,
    resume: bool = False,
    device: str = "auto",
    workers: int | None = None,
    threads: int | None = None,
    checkpoint_every_s: float = 300.0,
    quiet: bool = False,
) -> TrainingResult:
    """Trains by `recipe` on `data` into the folder `out`.

    Args:
        data: see `open_training_data`.
        out: gets `checkpoint.pt` and `metrics.jsonl`.
        resume: go on from the checkpoint in `out`; the recipe and the data must be the same.
        device: auto, cpu or cuda.
        workers: processes that decode images; by default one for each processor, at most 8.
        threads: processors for the network; by default all that the cgroup grants.
        checkpoint_every_s: also within an epoch; one is written after each epoch in any case.

    Raises:
        DataError, CheckpointError, InputError: see the messages.
        TrainingError: the loss is no longer finite, or a signal stopped the run (its state is saved).
    """
    trainer = _Trainer(data, recipe, Path(out), device, workers, threads, checkpoint_every_s, quiet)
    return trainer.run(resume)


class _Trainer:
    def __init__(
        self,
        data: str | Path,
        recipe: Recipe,
        out: Path,
        device: str,
        workers: int | None,
        threads: int | None,
        checkpoint_every_s: float,
        quiet: bool,
    ) -> None:
        self.recipe, self.out, self.quiet = recipe, out, quiet
        self.checkpoint_every_s = checkpoint_every_s
        self.device = _choose_device(device)
        cpus = available_cpus()
        self.workers = min(8, cpus) if workers is None else workers
        torch.set_num_threads(threads or cpus)
        self.progress = Progress("", 0, quiet=quiet)

        self.train_set, self.validation_set = open_training_data(
            data, val_fraction=recipe.val_fraction, seed=recipe.seed, parts=recipe.parts
        )
        if len(self.train_set) < recipe.batch_size:
            raise DataError(
                f"{data}: {len(self.train_set)} training images, fewer than one batch of {recipe.batch_size}; "
                "pass a smaller --batch-size"
            )
        classes = self.train_set.classes
        class_counts = np.bincount(self.train_set.labels, minlength=len(classes))
        self.concepts = assign_concepts(recipe.concepts, classes, class_counts)
        concept_counts = np.bincount(self.concepts.of_class, weights=class_counts, minlength=len(self.concepts.names))
        self.data_identity: dict[str, Any] = {
            "root": str(data if is_hub_dataset(data) else Path(data).resolve()),
            "fingerprint": self.train_set.fingerprint,
            "images": len(self.train_set),
            "validation_images": len(self.validation_set),
        }

        if recipe.precision == "fp32":
            # Exact resume needs the same kernels each time, and fp32 means fp32.
            torch.backends.cudnn.deterministic = True
            torch.backends.cudnn.allow_tf32 = False
        torch.manual_seed(recipe.seed)
        self.model = build_network(len(classes)).to(memory_format=torch.channels_last).to(self.device)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(),
            lr=recipe.lr,
            momentum=recipe.momentum,
            nesterov=recipe.nesterov,
            weight_decay=recipe.weight_decay,
        )
        self.objective = create_objective(recipe, torch.from_numpy(concept_counts))
        self.concept_of_class = torch.from_numpy(self.concepts.of_class).to(self.device)
        contract = recipe.preprocessing()
        self.mean = torch.tensor(contract.mean, device=self.device).view(1, 3, 1, 1)
        self.std = torch.tensor(contract.std, device=self.device).view(1, 3, 1, 1)
        self.epoch = self.step = self.global_step = 0
        self.bad_images: dict[str, set[str]] = {"training": set(), "validation": set()}

    def run(self, resume: bool) -> TrainingResult:
        if resume:
            self._load()
        elif (self.out / CHECKPOINT_NAME).exists() or (self.out / METRICS_NAME).exists():
            raise CheckpointError(
                f"{self.out}: holds a run already; pass --resume to go on with it or choose another --out"
            )
        try:
            self.out.mkdir(parents=True, exist_ok=True)
        except OSError as exc:
            raise InputError(f"--out {self.out}: cannot be made ({exc.strerror})") from exc
        self._introduce()
        if not resume:
            # At once: a run that is killed before its first epoch ends can then be resumed, too.
            self._save()
        accuracy = float("nan")
        with _stop_on_signal() as stop:
            while self.epoch < self.recipe.epochs:
                accuracy = self._run_epoch(stop)
        if np.isnan(accuracy):  # resumed after the last epoch
            accuracy = self._validate()[1]
        return TrainingResult(self.out, accuracy, tuple(sorted(set().union(*self.bad_images.values()))))

    def _introduce(self) -> None:
        recipe, say = self.recipe, self.progress.say
        say(
            f"{len(self.train_set):,} training and {len(self.validation_set):,} validation images, "
            f"{len(self.train_set.classes)} classes, {len(self.concepts.names)} concepts; "
            f"{recipe.method} on {self.device.type}, {recipe.precision}, {recipe.epochs} epochs"
        )
        if self.concepts.empty:
            say(f"concepts without examples here, left out: {', '.join(self.concepts.empty)}")

    def _run_epoch(self, stop: _Stop) -> float:
        recipe, side = self.recipe, self.recipe.image_size(self.epoch)
        batches = TrainingBatches(
            self.train_set,
            recipe.batch_size,
            side,
            seed=recipe.seed,
            epoch=self.epoch,
            min_crop_area=recipe.min_crop_area,
        )
        steps = len(batches)
        label = f"epoch {self.epoch + 1}/{recipe.epochs} at {side} px"
        self.progress = Progress(
            label, steps * recipe.batch_size, start=self.step * recipe.batch_size, quiet=self.quiet
        )
        saved_at = time.monotonic()
        window = _Window(self.device)
        self.model.train()
        for batch in load_batches(batches, self.workers, self.step):
            self._note_failures(batch.failures, "training", len(self.train_set))
            at = self.epoch + self.step / steps
            if len(batch.labels) > 1:  # BatchNorm needs two
                self._train_step(batch.images, batch.labels, at, window)
            self.step += 1
            self.global_step += 1
            last = self.step == steps
            due = time.monotonic() - saved_at > self.checkpoint_every_s
            if last or due or stop.requested or self.global_step % _LOG_EVERY_STEPS == 0:
                self._log_window(window, side, at)
                window = _Window(self.device)
            self.progress.advance(recipe.batch_size, self._note)
            if (due or stop.requested) and not last:
                self._save()
                saved_at = time.monotonic()
                stop.check(self.out)
        self.epoch, self.step = self.epoch + 1, 0
        loss, accuracy = self._validate()
        if not np.isfinite(loss):
            raise self._diverged(f"the validation loss is {loss}")
        self._log("epoch", epoch=self.epoch, validation_loss=round(loss, 5), validation_accuracy=round(accuracy, 5))
        self.progress.finish(f"validation accuracy {accuracy:.2%}")
        self._save()
        if self.epoch < recipe.epochs:
            stop.check(self.out)
        return accuracy

    def _train_step(self, images: Tensor, labels: Tensor, epoch: float, window: _Window) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.learning_rate(epoch)
        # Methods that draw random numbers draw the same ones after a resume.
        torch.manual_seed(self.recipe.seed * 1_000_003 + self.global_step)
        x, labels = self._to_input(images), labels.to(self.device, non_blocking=True)
        concepts = self.concept_of_class[labels]
        try:
            with self._autocast():
                x = self.objective.training_images(self.model, x, labels, epoch)
                logits = self.model(x.contiguous(memory_format=torch.channels_last)).float()
            losses = functional.cross_entropy(logits, labels, reduction="none")
            loss = self.objective.training_loss(losses, concepts)
        except DivergedError as exc:
            raise self._diverged(str(exc)) from exc
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        window.add(losses, loss, logits, labels)

    def _validate(self) -> tuple[float, float]:
        """Mean loss and accuracy on the validation images."""
        contract: Preprocessing = self.recipe.preprocessing()
        self.model.eval()
        loss = correct = count = 0.0
        with torch.no_grad():
            for batch in load_batches(EvaluationBatches(self.validation_set, 256, contract), self.workers):
                self._note_failures(batch.failures, "validation", len(self.validation_set))
                labels = batch.labels.to(self.device)
                with self._autocast():
                    logits = self.model(self._to_input(batch.images)).float()
                loss += float(functional.cross_entropy(logits, labels, reduction="sum"))
                correct += float((logits.argmax(1) == labels).sum())
                count += len(labels)
        self.model.train()
        if not count:
            raise DataError(f"{self.data_identity['root']}: none of the validation images can be decoded")
        return loss / count, correct / count

    def _to_input(self, images: Tensor) -> Tensor:
        """(m, 3, S, S) uint8 on the CPU to the normalised input on the device."""
        return (images.to(self.device, non_blocking=True).float() / 255 - self.mean) / self.std

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.precision == "bf16")

    def _note_failures(self, failures: tuple[str, ...], split: str, total: int) -> None:
        bad = self.bad_images[split]
        for line in failures:
            if line not in bad:
                bad.add(line)
                self.progress.say(f"left out: {line}")
        if len(bad) > max(10, _MAX_BAD_SHARE * total):
            raise DataError(
                f"{len(bad)} {split} images cannot be decoded, over 1 % of {total}; "
                f"first {min(bad)}; repair or remove them, then train again"
            )

    def _log_window(self, window: _Window, side: int, epoch: float) -> None:
        numbers = window.numbers()
        if numbers is None:
            return
        if not np.isfinite(numbers["objective"]):
            raise self._diverged(f"the loss is {numbers['objective']}")
        tau = getattr(self.objective, "tau", None)
        self._note = f"loss {numbers['loss']:.3f}, accuracy {numbers['accuracy']:.1%}"
        self._log(
            "train",
            epoch=round(epoch, 5),
            image_size=side,
            lr=round(self.recipe.learning_rate(epoch), 8),
            **({"tau": round(tau(side, epoch), 6)} if callable(tau) else {}),
            **numbers,
            **self.objective.metrics(),
        )

    _note = ""

    def _log(self, event: str, **numbers: Any) -> None:
        line = json.dumps({"event": event, "step": self.global_step, **numbers})
        try:
            with open(self.out / METRICS_NAME, "a", encoding="utf-8") as handle:
                handle.write(line + "\n")
        except OSError as exc:
            raise InputError(
                f"{self.out / METRICS_NAME}: cannot be written ({exc.strerror}); free space, then go on with --resume"
            ) from exc

    def _diverged(self, reason: str) -> TrainingError:
        return TrainingError(
            f"training diverged at step {self.global_step} ({reason}); "
            "the last checkpoint is intact: try a smaller --lr or --tau, or a larger --lambda"
        )

    def _save(self) -> None:
        save_checkpoint(
            Checkpoint(
                recipe=self.recipe.to_dict(),
                data=self.data_identity,
                classes=list(self.train_set.classes),
                concepts=list(self.concepts.names),
                concept_of_class=self.concepts.of_class.tolist(),
                epoch=self.epoch,
                step=self.step,
                global_step=self.global_step,
                model=self.model.state_dict(),
                optimizer=self.optimizer.state_dict(),
                objective=self.objective.state_dict(),
            ),
            self.out,
        )

    def _load(self) -> None:
        saved = load_checkpoint(self.out)
        mine = self.recipe.to_dict()
        changed = [name for name in mine if saved.recipe.get(name) != mine[name]]
        if changed:
            name = changed[0]
            raise CheckpointError(
                f"{self.out}: was trained with {name} = {saved.recipe.get(name)}, now it is {mine[name]}; "
                "resume with the same options or choose another --out"
            )
        if (
            saved.data["fingerprint"] != self.data_identity["fingerprint"]
            or saved.concept_of_class != self.concepts.of_class.tolist()
        ):
            raise CheckpointError(
                f"{self.out}: was trained on other data ({saved.data['images']:,} images of {saved.data['root']}) "
                "or concepts; resume with the same or choose another --out"
            )
        self.model.load_state_dict(saved.model)
        self.optimizer.load_state_dict(saved.optimizer)
        self.objective.load_state_dict(saved.objective)
        self.epoch, self.step, self.global_step = saved.epoch, saved.step, saved.global_step
        self._forget_later_metrics()

    def _forget_later_metrics(self) -> None:
        """Drops the lines written after the checkpoint; those steps are made again."""
        file = self.out / METRICS_NAME
        if not file.exists():
            return
        kept = []
        for line in file.read_text("utf-8").splitlines():
            try:
                if json.loads(line)["step"] > self.global_step:
                    break
            except ValueError:  # a line cut short by the kill
                break
            kept.append(line + "\n")
        with new_file(file) as partial:
            partial.write_text("".join(kept), "utf-8")


class _Window:
    """Sums over the steps between two log lines, kept on the device so that no step waits for it."""

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(3, device=device, dtype=torch.float64)
        self._images = self._steps = 0
        self._began = time.monotonic()

    def add(self, losses: Tensor, objective: Tensor, logits: Tensor, labels: Tensor) -> None:
        correct = (logits.detach().argmax(1) == labels).sum()
        self._sums += torch.stack([losses.detach().sum().double(), objective.detach().double(), correct.double()])
        self._images += len(labels)
        self._steps += 1

    def numbers(self) -> dict[str, float] | None:
        """Means over the window: unweighted loss, what was descended, accuracy, speed."""
        if not self._steps:
            return None
        loss, objective, correct = self._sums.tolist()
        return {
            "loss": round(loss / self._images, 5),
            "objective": round(objective / self._steps, 5),
            "accuracy": round(correct / self._images, 5),
            "images_per_s": round(self._images / max(time.monotonic() - self._began, 1e-9), 1),
        }


class _Stop:
    """A request to stop after the current step."""

    def __init__(self) -> None:
        self.requested = False

    def check(self, out: Path) -> None:
        if self.requested:
            raise TrainingError(f"stopped; {out / CHECKPOINT_NAME} is up to date: go on with --resume")


@contextmanager
def _stop_on_signal() -> Iterator[_Stop]:
    """SIGINT and SIGTERM let the step finish and the checkpoint be written; a second one ends at once."""
    stop = _Stop()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def request(number: int, frame: FrameType | None) -> None:
        stop.requested = True
        signal.signal(number, before[signal.Signals(number)])

    try:
        for number in before:
            signal.signal(number, request)
    except ValueError:  # not the main thread: the caller handles signals
        yield stop
        return
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _choose_device(name: str) -> torch.device:
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise InputError("--device cuda: PyTorch sees no GPU; check the driver, or pass --device cpu")
    if name not in {"auto", "cpu", "cuda"}:
        raise InputError(f"--device {name}: expected auto, cpu or cuda")
    return torch.device("cuda" if available and name != "cpu" else "cpu")
