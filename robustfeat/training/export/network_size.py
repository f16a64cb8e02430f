"""How large a network that a config.json describes may become, before it is made.

A config of a few bytes can describe a network that takes hours to make. The numbers of layers are looked at before the
library sees them, and modules and parameters are counted while it makes them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from robustfeat.errors import InputError
from robustfeat.hub.external_data import MAX_BYTES

__all__ = ["limited_size", "require_moderate"]

_COUNTS = re.compile(r".*(layers?|depths?|blocks?|stages?|repeats?)")
"""Entries of a config that count parts of a network, such as num_hidden_layers and depths."""

_MOST_LAYERS = 1000
_MOST_MODULES = 2**15
_MOST_PARAMETERS = MAX_BYTES // 4


def require_moderate(config: Mapping[str, Any], source: str) -> None:
    """Refuses a config that asks for more layers than any network has.

    Raises:
        InputError: naming the entry.
    """
    for name, value in config.items():
        if isinstance(value, Mapping):
            require_moderate(value, source)
        elif _COUNTS.fullmatch(name):
            counts = [one for one in (value if isinstance(value, list) else [value]) if isinstance(one, int)]
            if sum(counts) > _MOST_LAYERS:
                raise InputError(
                    f"{source}: {name} in its config.json must be at most {_MOST_LAYERS}; got {sum(counts)}",
                    fix="download or save the model again",
                )


@contextmanager
def limited_size(source: str) -> Iterator[None]:
    """Counts modules and parameters that are made in the block.

    Raises:
        InputError: they are more than an ONNX file can hold.
    """
    modules = parameters = 0

    def count_module(module: nn.Module, name: str, made: nn.Module | None) -> None:
        nonlocal modules
        modules += 1
        if modules > _MOST_MODULES:
            raise InputError(
                f"{source}: its config.json describes a network of more than {_MOST_MODULES:,} modules",
                fix="use a smaller network",
            )

    def count_parameter(module: nn.Module, name: str, made: Tensor | None) -> None:
        nonlocal parameters
        parameters += made.numel() if made is not None else 0
        if parameters > _MOST_PARAMETERS:
            raise InputError(
                f"{source}: its config.json describes a network of more than 2 GB of weights, which engines cannot "
                "read from one ONNX file",
                fix="use a smaller network",
            )

    hooks = [
        register_module_module_registration_hook(count_module),
        register_module_parameter_registration_hook(count_parameter),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
