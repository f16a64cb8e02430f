"""All errors that robustfeat raises on purpose.

    RobustFeatError
    ├── DecodeError         an image cannot be decoded
    ├── InputError          an input (file, folder, option value) is missing or unusable
    ├── ModelFolderError    a model folder is incomplete, altered, or from a newer version
    ├── HubError            the Hub refuses
    │   └── UnreachableError    the Hub fails or does not answer
    ├── HeadError           a head is incomplete, altered, or from a newer version
    ├── EngineError         the inference engine is missing or cannot run as requested
    │   └── NotFiniteError  a model's features are NaN or infinite
    ├── DataError           a training set or concept map cannot be used
    ├── TrainingError       training cannot continue
    │   ├── DivergedError       the loss is no longer finite
    │   └── StoppedError        a signal stopped training
    ├── CheckpointError     a checkpoint is missing, damaged, or belongs to another run
    └── ExportError         an exported file disagrees with its network

Each message is one line: the subject, what was expected, what arrived, and how to fix it. The parts are data. Messages
name parameters as in Python; the command line prints them as options and exits with the error's `exit_code`. Wrong
arguments of a function raise `ValueError` or `TypeError`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import ClassVar

__all__ = [
    "CheckpointError",
    "DataError",
    "DecodeError",
    "DivergedError",
    "EngineError",
    "ExportError",
    "HeadError",
    "HubError",
    "InputError",
    "ModelFolderError",
    "NotFiniteError",
    "RobustFeatError",
    "StoppedError",
    "TrainingError",
    "UnreachableError",
    "first_line",
    "respell",
]


_REFERENCE = re.compile(r"`([A-Za-z_]\w*)(?:=([^`]*))?`")


def respell(text: str, spell: Callable[[str, str | None], str | None]) -> str:
    """Spells the parameters in a text's backticks by `spell`; see `RobustFeatError.render`."""
    return _REFERENCE.sub(lambda match: spell(match[1], match[2]) or match[0], text)


class RobustFeatError(Exception):
    """Base class of all errors above.

    Args:
        what: what was expected and what arrived. Without `argument`, it starts with the subject.
        argument: the wrong parameter, which becomes the subject.
        value: the parameter's value, if it helps.
        fix: what to do. Parameters of the caller are in backticks, as a name or with a value: "pass `resume=True` to
            resume it, or choose another `out`".

    Attributes:
        exit_code: exit code of a command that ends with this error.

    >>> str(InputError("expected 1 or more", argument="batch_size", value=0, fix="leave `batch_size` out"))
    'batch_size=0: expected 1 or more; leave `batch_size` out'
    """

    exit_code: ClassVar[int] = 1

    def __init__(
        self, what: str = "", *, argument: str | None = None, value: object = None, fix: str | None = None
    ) -> None:
        super().__init__(what)
        self.what, self.argument, self.value, self.fix = what, argument, value, fix

    def render(self, spell: Callable[[str, str | None], str | None]) -> str:
        """The message with parameters spelled by `spell`.

        Args:
            spell: returns the spelling of a parameter and its value, if any. None keeps Python's spelling.
        """
        value = None if self.value is None else str(self.value)
        parts = []
        if self.argument is not None:
            parts.append(f"{spell(self.argument, value) or self._subject}: ")
        parts.append(respell(self.what, spell))
        if self.fix is not None:
            parts.append(f"; {respell(self.fix, spell)}")
        return "".join(parts)

    @property
    def problem(self) -> str:
        """The message without the fix. The argument is in backticks, as in `fix`."""
        return self.what if self.argument is None else f"`{self._subject}`: {self.what}"

    @property
    def fix_parameters(self) -> set[str]:
        """Names of the parameters in the fix."""
        return {match[1] for match in _REFERENCE.finditer(self.fix or "")}

    @property
    def _subject(self) -> str:
        return f"{self.argument}" if self.value is None else f"{self.argument}={self.value}"

    def __str__(self) -> str:
        return self.render(lambda name, value: None)


class DecodeError(RobustFeatError):
    """An image cannot be decoded."""


class InputError(RobustFeatError):
    """An input is missing or unusable."""


class ModelFolderError(RobustFeatError):
    """A model folder is incomplete, altered, or from a newer version."""


class HubError(RobustFeatError):
    """The Hugging Face Hub refuses, fails or cannot be reached."""


class UnreachableError(HubError):
    """The Hub fails or does not answer, so only the cache is available."""


class HeadError(RobustFeatError):
    """A head is incomplete, altered, or from a newer version."""


class EngineError(RobustFeatError):
    """The inference engine is missing or cannot run as requested."""


class NotFiniteError(EngineError):
    """A model's features are NaN or infinite."""


class DataError(RobustFeatError):
    """A training set or concept map cannot be used."""


class TrainingError(RobustFeatError):
    """Training cannot continue."""


class DivergedError(TrainingError):
    """The loss is no longer finite."""


class StoppedError(TrainingError):
    """A signal stopped training after it saved a checkpoint.

    The exit code is EX_TEMPFAIL of sysexits.h: nothing is wrong, and training can be resumed.
    """

    exit_code = 75


class CheckpointError(RobustFeatError):
    """A checkpoint is missing, damaged, or belongs to another run."""


class ExportError(RobustFeatError):
    """An exported file disagrees with its network."""


def first_line(exc: BaseException) -> str:
    """The message of a library's exception, as one line."""
    return (str(exc).strip() or type(exc).__name__).splitlines()[0]
