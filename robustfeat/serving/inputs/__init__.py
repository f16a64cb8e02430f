"""Lists the images that a command's arguments name, and reads their bytes."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from robustfeat.serving.inputs.listing import list_inputs

__all__ = ["list_inputs"]


def __getattr__(name: str) -> Any:
    # Import on first use, since decoders import this package without listing inputs.
    if name != "list_inputs":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from robustfeat.serving.inputs.listing import list_inputs

    return list_inputs
