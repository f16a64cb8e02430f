"""Inputs that are changed at random, and what a parser may do with them: accept or refuse, soon and in little memory.

Inputs that reach a new line of robustfeat join those that are changed next, so that one change leads to another.
"""

from __future__ import annotations

import random
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import robustfeat

__all__ = ["Finding", "Parser", "attempt", "fuzz"]

_HERE = str(Path(robustfeat.__file__).parent)
_NUMBERS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1)
_HANGS_S = 20
_LARGEST = 2**17
_TRACED = 2**13
"""Of larger inputs, no lines are noted, which would take ten times as long."""


@dataclass(frozen=True)
class Parser:
    """What is tried.

    Attributes:
        run: takes the bytes of an input.
        seeds: inputs that it accepts.
        refuses: its errors for damaged inputs; any other is a finding.
        tokens: what inputs are made of.
        repair: makes checksums fit again.
        seconds: of processor time that one input may take.
    """

    run: Callable[[bytes], object]
    seeds: Sequence[bytes]
    refuses: tuple[type[Exception], ...]
    tokens: Sequence[bytes] = ()
    repair: Callable[[bytes], bytes] = field(default=lambda data: data)
    seconds: float = 1.0


@dataclass(frozen=True)
class Finding:
    """An input that a parser neither accepts nor refuses."""

    data: bytes
    what: str


class _Hangs(BaseException):
    pass


def attempt(parser: Parser, data: bytes) -> str | None:
    """What is wrong with how a parser takes an input; None if nothing is."""
    began = time.process_time()
    try:
        with _alarm(), suppress(*parser.refuses):
            parser.run(data)
    except _Hangs:
        return f"hangs for {_HANGS_S} s"
    except (Exception, SystemExit) as exc:
        trace = exc.__traceback__
        while trace and trace.tb_next:
            trace = trace.tb_next
        where = f" in {Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}" if trace else ""
        return f"{type(exc).__name__}: {str(exc)[:200]}{where}"
    took = time.process_time() - began
    return f"takes {took:.1f} s" if took > parser.seconds else None


def fuzz(
    parser: Parser, *, seed: int, inputs: int | None = None, seconds: float = 0, note: Callable[[bytes], None]
) -> Iterator[Finding]:
    """Tries so many inputs, or so many seconds.

    Args:
        parser: what is tried.
        seed: of the changes.
        inputs: how many.
        seconds: how long, where `inputs` is None.
        note: gets each input before it is tried, which may end the process.
    """
    dice = random.Random(seed)
    lines: set[Any] = set()
    pool: list[bytes] = list(parser.seeds)
    for data in pool:
        note(data)
        with _tracing(lines):
            wrong = attempt(parser, data)
        if wrong:
            yield Finding(data, wrong)
    ends, count = time.monotonic() + seconds, 0
    while count < inputs if inputs is not None else time.monotonic() < ends:
        count += 1
        data = parser.repair(_changed(dice, dice.choice(pool), pool, parser.tokens))
        note(data)
        known = len(lines)
        with _tracing(lines) if len(data) < _TRACED else nullcontext():
            wrong = attempt(parser, data)
        if wrong and "takes" in wrong:
            wrong = attempt(parser, data)  # without counting lines
        if wrong:
            yield Finding(data, wrong)
        elif len(lines) > known:
            pool.append(data)


def _changed(dice: random.Random, data: bytes, pool: Sequence[bytes], tokens: Sequence[bytes]) -> bytes:
    changed = bytearray(data)
    for _ in range(dice.choice((1, 1, 1, 2, 3, 5, 8))):
        at, size = dice.randrange(len(changed) + 1), dice.choice((1, 2, 4, 8, 16, 64, 512, 2048))
        match dice.randrange(9 if tokens else 8):
            case 0 if changed:
                changed[at % len(changed)] ^= 1 << dice.randrange(8)
            case 1 if changed:
                changed[at % len(changed)] = dice.randrange(256)
            case 2:
                changed[at : at + size] = b""
            case 3:
                changed[at:at] = dice.randbytes(min(size, 16))
            case 4:
                width = dice.choice((1, 2, 4, 8))
                number = dice.choice(_NUMBERS) + dice.choice((-1, 0, 1))
                changed[at : at + width] = (number % 256**width).to_bytes(width, dice.choice(("little", "big")))
            case 5:
                source = dice.choice(pool)
                start = dice.randrange(len(source) + 1)
                changed[at : at + dice.choice((0, size))] = source[start : start + size]
            case 6:
                changed[at:at] = changed[at : at + size] * dice.choice((1, 2, 10, 1000))
            case 7:
                digits = str(dice.choice(_NUMBERS) * dice.choice((1, -1))).encode() * dice.choice((1, 1, 1, 300))
                changed[at : at + dice.choice((0, 1, 3))] = digits
            case _:
                token = dice.choice(tokens) * dice.choice((1, 1, 1, 2, 1000)) if tokens else b""
                changed[at : at + dice.choice((0, len(token)))] = token
        del changed[_LARGEST:]
    return bytes(changed)


@contextmanager
def _alarm() -> Iterator[None]:
    def ring(_: int, __: FrameType | None) -> None:
        raise _Hangs

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, _HANGS_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def _tracing(lines: set[Any]) -> Iterator[None]:
    """Adds the pairs of a line of robustfeat and the one before it that are run in this thread."""

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        if not frame.f_code.co_filename.startswith(_HERE):
            return None
        code, before = frame.f_code, 0

        def trace_line(frame: FrameType, event: str, _: Any) -> Any:
            nonlocal before
            if event == "line":
                lines.add((code, before, frame.f_lineno))
                before = frame.f_lineno
            return trace_line

        return trace_line

    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(None)
