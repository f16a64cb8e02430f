"""Checks models and tasks before slow work. Loads no PyTorch."""

from __future__ import annotations

from pathlib import Path

from robustfeat.errors import DataError, InputError
from robustfeat.hub.catalog import resolve_model
from robustfeat.hub.remote import is_hub_name
from robustfeat.serving.bulk.formats import FORMATS
from robustfeat.training.data.opening import require_place
from robustfeat.training.loop.run_folder import CHECKPOINT_NAME

__all__ = ["model_kind", "parse_task", "require_model", "require_task"]


def parse_task(text: str, argument: str = "tasks") -> tuple[str, str]:
    """`NAME=DATA` to its parts; without a name, the last part of DATA.

    Raises:
        InputError: a part is empty.
    """
    name, equals, place = text.partition("=")
    if not equals:
        name, place = Path(text).name, text
    if not name.strip() or not place.strip():
        raise InputError("expected NAME=DATA, such as pets=data/pets", argument=argument, value=repr(text))
    return name.strip(), place.strip()


def require_task(name: str, place: str) -> None:
    """A task's DATA is a folder, or a dataset of the Hub.

    Raises:
        DataError: it is neither.
    """
    if Path(place).suffix in FORMATS and Path(place).is_file():
        raise DataError(
            "is a file, expected a folder of images with labels; features of another model cannot be compared, so they "
            "are computed here",
            argument="tasks",
            value=f"{name}={place}",
            fix="score features that you have with `robustfeat svm`",
        )
    require_place(place)


def model_kind(model: str) -> str:
    """The kind of a MODEL: `run`, `code` or `folder`."""
    path = Path(model)
    if path.is_file() or (path / CHECKPOINT_NAME).is_file():
        return "run"
    module_name, colon, _ = model.partition(":")
    is_code = colon and not path.exists() and all(part.isidentifier() for part in module_name.split("."))
    return "code" if is_code else "folder"


def require_model(model: str, image_size: int | None = None, crop_pct: float | None = None) -> None:
    """Checks that a MODEL can be one, without looking at the Hub.

    Raises:
        InputError: it is a file of features, or a model folder, which has its own preprocessing.
        ModelFolderError: it is no model folder.
    """
    if Path(model).is_file() and Path(model).suffix in FORMATS:
        raise InputError(f"{model}: is a {Path(model).suffix} file; expected a model folder, ORG/NAME, or a run")
    if model_kind(model) == "folder":
        if image_size is not None or crop_pct is not None:
            raise InputError(
                f"{model}: a model folder has its own preprocessing", fix="leave `image_size` and `crop_pct` out"
            )
        if not is_hub_name(model) or Path(model).exists():
            resolve_model(model)
