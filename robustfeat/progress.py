"""Progress on stderr: one line redrawn on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import json
import re
import sys
import time
from typing import Any, TextIO

__all__ = ["Progress", "clock", "json_line", "remark", "visible"]

_REDRAW_S = 0.1
_PLAIN_LINE_S = 10.0
_PASSWORD = re.compile(r"(://[^\s/@:]{1,200}):[^\s/@]{1,500}@")
_CONTROLS = re.compile("[\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""DEL and the C1 controls, other ends of lines, what turns the direction of text, and halves of characters."""


class Progress:
    """Counts `done` of `total` and says how fast it goes and how long is left.

    Args:
        label: what is being done.
        total: how many there are.
        unit: what is counted, in the plural.
        start: how many were done before (a resumed run); they do not count for the speed.
        quiet: print nothing.
        stream: where to print; stderr by default.
    """

    def __init__(
        self,
        label: str,
        total: int,
        unit: str = "images",
        *,
        start: int = 0,
        quiet: bool = False,
        stream: TextIO | None = None,
    ) -> None:
        # A process without a terminal may have no stderr at all.
        self.label, self.total, self.unit, self.quiet = label, total, unit, quiet or (stream or sys.stderr) is None
        self.done = self._start = start
        self._stream = stream or sys.stderr
        self._terminal = not self.quiet and self._stream.isatty()
        self._began = self._shown = time.monotonic()
        self._width = 0

    def advance(self, count: int, note: str = "") -> None:
        """`count` more are done; `note` is shown behind the numbers."""
        self.done += count
        now = time.monotonic()
        pause = _REDRAW_S if self._terminal else _PLAIN_LINE_S
        if not self.quiet and now - self._shown >= pause:
            self._shown = now
            self._print(self._line(now, note), last=False)

    def finish(self, note: str = "") -> None:
        """Prints the closing line."""
        if not self.quiet:
            self._print(self._line(time.monotonic(), note), last=True)

    def say(self, text: str) -> None:
        """A line of its own, printed above the bar."""
        if not self.quiet:
            self._print(visible(text), last=True)

    def _line(self, now: float, note: str) -> str:
        fresh, elapsed = self.done - self._start, max(now - self._began, 1e-9)
        speed = fresh / elapsed
        parts = [f"{self.label} {self.done:,}/{self.total:,} {self.unit}", f"{speed:,.1f}/s"]
        if self.done < self.total and speed > 0:
            parts.append(f"{clock((self.total - self.done) / speed)} left")
        else:
            parts.append(clock(elapsed))
        return ", ".join([*parts, note] if note else parts)

    def _print(self, line: str, *, last: bool) -> None:
        if self._terminal:
            self._stream.write("\r" + line.ljust(self._width) + ("\n" if last else ""))
            self._width = 0 if last else len(line)
        else:
            self._stream.write(line + "\n")
        self._stream.flush()


def remark(text: str, *, quiet: bool = False) -> None:
    """Prints a line on stderr, where no bar is being drawn.

    Args:
        text: the line.
        quiet: print nothing.
    """
    if not quiet and sys.stderr is not None:
        print(visible(text), file=sys.stderr, flush=True)


def visible(text: str) -> str:
    r"""The text as one line: characters that would move a terminal's cursor, or hide, are written as escapes.

    Names of models, files and classes come from strangers. Passwords in URLs are left out: such lines are kept in logs.

    >>> visible("a\x1b[2Jb\nc")
    'a\\x1b[2Jb\\nc'
    """
    text = _PASSWORD.sub(r"\1:***@", text)
    return text if text.isprintable() else "".join(part if part.isprintable() else repr(part)[1:-1] for part in text)


def json_line(content: Any, *, compact: bool = False) -> str:
    r"""JSON in one line that names of strangers cannot make a terminal obey: control characters are escapes.

    JSON itself writes those below 32 so, and leaves DEL, the C1 ones and marks of direction as they are.

    >>> json_line({"é": "\x1b\x9b2J"})
    '{"é": "\\u001b\\u009b2J"}'
    """
    text = json.dumps(content, ensure_ascii=False, default=str, separators=(",", ":") if compact else None)
    return _CONTROLS.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def clock(seconds: float) -> str:
    """`1:02:03` or `2:03`."""
    whole = round(seconds)
    hours, rest = divmod(whole, 3600)
    minutes, seconds_left = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{seconds_left:02}" if hours else f"{minutes}:{seconds_left:02}"
