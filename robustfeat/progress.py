"""Prints progress on stderr: one redrawn line on a terminal, else a plain line at intervals."""

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
"""DEL and C1 controls, other line ends, controls of text direction, and surrogates."""


class Progress:
    """Shows `done` of `total`, the rate and the time left.

    Args:
        label: name of the work.
        total: number of items.
        unit: name of the items, in the plural.
        start: items that an earlier run finished. They do not count for the rate.
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
        # A process without a terminal may have no stderr.
        self.label, self.total, self.unit, self.quiet = label, total, unit, quiet or (stream or sys.stderr) is None
        self.done = self._start = start
        self._stream = stream or sys.stderr
        self._terminal = not self.quiet and self._stream.isatty()
        self._began = self._shown = time.monotonic()
        self._width = 0

    def advance(self, count: int, note: str = "") -> None:
        """Adds `count` finished items, and shows `note` after the numbers."""
        self.done += count
        now = time.monotonic()
        pause = _REDRAW_S if self._terminal else _PLAIN_LINE_S
        if not self.quiet and now - self._shown >= pause:
            self._shown = now
            self._print(self._line(now, note), last=False)

    def finish(self, note: str = "") -> None:
        """Prints the last line."""
        if not self.quiet:
            self._print(self._line(time.monotonic(), note), last=True)

    def say(self, text: str) -> None:
        """Prints a line above the bar."""
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
    """Prints a line on stderr while no bar is shown.

    Args:
        text: the line.
        quiet: print nothing.
    """
    if not quiet and sys.stderr is not None:
        print(visible(text), file=sys.stderr, flush=True)


def visible(text: str) -> str:
    r"""Makes a text one safe line: control and invisible characters become escapes, and passwords in URLs are removed.

    Names of models, files and classes come from strangers, and lines may be kept in logs.

    >>> visible("a\x1b[2Jb\nc")
    'a\\x1b[2Jb\\nc'
    """
    text = _PASSWORD.sub(r"\1:***@", text)
    return text if text.isprintable() else "".join(part if part.isprintable() else repr(part)[1:-1] for part in text)


def json_line(content: Any, *, compact: bool = False) -> str:
    r"""Renders JSON as one line that is safe on a terminal: all control characters are escapes.

    JSON itself escapes characters below 32, but not DEL, C1 controls and controls of text direction.

    >>> json_line({"é": "\x1b\x9b2J"})
    '{"é": "\\u001b\\u009b2J"}'
    """
    text = json.dumps(content, ensure_ascii=False, default=str, separators=(",", ":") if compact else None)
    return _CONTROLS.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def clock(seconds: float) -> str:
    """Formats a duration in seconds as `1:02:03` or `2:03`."""
    whole = round(seconds)
    hours, rest = divmod(whole, 3600)
    minutes, seconds_left = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{seconds_left:02}" if hours else f"{minutes}:{seconds_left:02}"
