"""What the arguments of a command name, and where its bytes come from."""

from robustfeat.serving.inputs.listing import list_inputs

__all__ = ["list_inputs"]
