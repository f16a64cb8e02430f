"""Every error that robustfeat raises on purpose.

    RobustFeatError
    ├── DecodeError         an image cannot be turned into pixels
    ├── InputError          an input (file, folder, option value) is missing or unusable
    ├── ModelFolderError    a model folder is incomplete, altered, or from a newer version
    ├── HubError            the Hub refuses
    │   └── UnreachableError    it gives no answer, or fails
    ├── HeadError           a head is incomplete, altered, or from a newer version
    ├── EngineError         the inference engine is missing, or is not what was asked for
    ├── DataError           a training set or concept map cannot be used
    ├── TrainingError       training cannot go on
    │   ├── DivergedError       its loss is no longer finite
    │   └── StoppedError        a signal stopped it
    ├── CheckpointError     a checkpoint is missing, damaged, or belongs to another run
    └── ExportError         an exported file disagrees with the network that it came from

Each message is one line: the subject, what was expected, what arrived, and what to do. The command line
prints it and exits with 1. Wrong arguments to a function raise `ValueError` or `TypeError`.
"""

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
    "RobustFeatError",
    "StoppedError",
    "TrainingError",
    "UnreachableError",
    "first_line",
]


class RobustFeatError(Exception):
    """Base of all errors above."""


class DecodeError(RobustFeatError):
    """An image cannot be turned into pixels."""


class InputError(RobustFeatError):
    """An input is missing or unusable."""


class ModelFolderError(RobustFeatError):
    """A model folder is incomplete, altered, or from a newer version."""


class HubError(RobustFeatError):
    """The Hugging Face Hub refuses, fails or cannot be reached."""


class UnreachableError(HubError):
    """The Hub gives no answer, or fails: what the cache holds is the best there is."""


class HeadError(RobustFeatError):
    """A head is incomplete, altered, or from a newer version."""


class EngineError(RobustFeatError):
    """The inference engine is missing, or is not what was asked for."""


class DataError(RobustFeatError):
    """A training set or concept map cannot be used."""


class TrainingError(RobustFeatError):
    """Training cannot go on."""


class DivergedError(TrainingError):
    """The loss is no longer finite."""


class StoppedError(TrainingError):
    """A signal stopped it, and what it had is saved."""


class CheckpointError(RobustFeatError):
    """A checkpoint is missing, damaged, or belongs to another run."""


class ExportError(RobustFeatError):
    """An exported file disagrees with the network that it came from."""


def first_line(exc: BaseException) -> str:
    """What a library's exception says, in one line."""
    return (str(exc).strip() or type(exc).__name__).splitlines()[0]
