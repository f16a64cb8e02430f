"""What the arguments of a command name, and where its bytes come from."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from robustfeat.serving.inputs.listing import list_inputs

__all__ = ["list_inputs"]


def __getattr__(name: str) -> Any:
    # Decoders import a module beside it, and need none of what lists inputs.
    if name != "list_inputs":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from robustfeat.serving.inputs.listing import list_inputs

    return list_inputs
