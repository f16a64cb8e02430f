"""Data parallelism: the processes that torchrun starts, one group, and sums that are the same bits on each of them."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NoReturn

import torch
from torch import Tensor, distributed

from robustfeat.errors import InputError, RobustFeatError, TrainingError, first_line
from robustfeat.training.loop.ranks import Ranks

__all__ = [
    "fail_together",
    "gather_objects",
    "gather_tensors",
    "join_group",
    "raise_together",
    "require_same",
    "sum_over_ranks",
    "together",
]


@contextmanager
def join_group(ranks: Ranks, device: torch.device) -> Iterator[None]:
    """Joins the other processes of a torchrun, with gloo for the CPU and NCCL for GPUs.

    Raises:
        TrainingError: the others cannot be reached.
    """
    if ranks.world == 1:
        yield
        return
    try:
        distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            device_id=device if device.type == "cuda" else None,
            timeout=_TIMEOUT,
        )
    except (RuntimeError, ValueError) as exc:
        raise TrainingError(
            f"rank {ranks.rank} of {ranks.world} cannot join the others ({first_line(exc)})",
            fix="start it with torchrun, which sets MASTER_ADDR and MASTER_PORT",
        ) from exc
    try:
        yield
    except RobustFeatError as exc:
        if ranks.rank == 0:
            raise
        raise type(exc)(f"rank {ranks.rank}: {exc.what}", argument=exc.argument, value=exc.value, fix=exc.fix) from exc
    except RuntimeError as exc:
        if not any(sign in str(exc) for sign in _LOST_PEER):
            raise
        raise TrainingError(
            f"rank {ranks.rank} lost another one ({first_line(exc)}), whose own message tells why",
            fix="fix that, then pass `resume=True` to resume the run",
        ) from exc
    finally:
        distributed.destroy_process_group()


_TIMEOUT = timedelta(hours=4)  # one process may fill a cache while the others wait
_LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "NCCL", "Timed out waiting")


def raise_together(error: RobustFeatError | None) -> None:
    """Ends all ranks when one of them has an error. It is a collective call, so no rank waits for a dead one.

    Raises:
        RobustFeatError: `error`, on the first rank that has one. The others end with its exit code and say nothing.
    """
    codes = gather_objects(error and error.exit_code)
    failed = [rank for rank, code in enumerate(codes) if code is not None]
    if failed:
        if error is not None and (not distributed.is_initialized() or failed[0] == distributed.get_rank()):
            raise error
        sys.exit(codes[failed[0]])


def fail_together(error: RobustFeatError) -> NoReturn:
    """Ends all ranks, which all have the same error; a collective call. The first rank raises it.

    Raises:
        RobustFeatError: `error`.
    """
    raise_together(error)
    raise error


@contextmanager
def together() -> Iterator[None]:
    """An error within the block ends all ranks, and one of them raises it."""
    error: RobustFeatError | None = None
    try:
        yield
    except RobustFeatError as exc:
        error = exc
    raise_together(error)


def gather_tensors(values: Tensor) -> Tensor:
    """(world, ...), each rank's `values` of the same shape, in the order of the ranks."""
    if not distributed.is_initialized():
        return values[None]
    values = values.contiguous()
    gathered = [torch.empty_like(values) for _ in range(distributed.get_world_size())]
    distributed.all_gather(gathered, values)
    return torch.stack(gathered)


def sum_over_ranks(values: Tensor) -> Tensor:
    """The sum of `values` over all ranks; `values` itself outside of a group.

    Every rank adds the same numbers in the order of the ranks, so the results are the same bits, whatever route the
    backend takes: q must not drift apart.

    Args:
        values: values of the same shape on each rank.
    """
    if not distributed.is_initialized():
        return values
    parts = gather_tensors(values)
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def require_same(values: Mapping[str, Any]) -> None:
    """Refuses ranks that looked up the same names and found different things; a collective call.

    Args:
        values: what was found, by parameter.

    Raises:
        InputError: naming the first parameter that differs, on the first rank.
    """
    of_ranks = gather_objects(dict(values))
    differing = next((name for name in values if any(other[name] != values[name] for other in of_ranks)), None)
    if differing is not None:
        raise_together(
            InputError(
                "is not the same on all ranks, because it changed while they started",
                argument=differing,
                fix="run the same command again",
            )
        )


def gather_objects(value: Any) -> list[Any]:
    """Each rank's small, picklable `value`, in the order of the ranks."""
    if not distributed.is_initialized():
        return [value]
    values: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values
