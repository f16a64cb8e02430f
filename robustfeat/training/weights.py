"""Weights as people save them: found in a file, under whatever names, and named as a network names them."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, nn

from robustfeat.training.tensors import NotTensorsError, load_tensors

__all__ = [
    "OPTIONAL",
    "Found",
    "classifier_names",
    "describe_tensors",
    "fill_network",
    "find_weights",
    "misfit",
    "name_by_order",
    "read_state",
    "split_classifier",
]

_DEEPEST = 16
"""Dictionaries within each other; programs nest three."""

_TEACHERS, _STUDENTS = {"teacher", "encoder_q", "online"}, {"student", "encoder_k"}
_WRAPPERS = (
    *("state_dict_ema", "model_ema", "ema_state_dict", "model_ema_state_dict", "ema", "teacher"),
    *("state_dict", "model_state_dict", "model_state", "model", "student", "module", "_orig_mod"),
    *("backbone", "encoder", "encoder_q", "network", "net", "trunk"),
)
"""Names under which programs keep a network, the best first. timm also prefers averaged weights."""

OPTIONAL = "num_batches_tracked"
"""A counter of BatchNorm that old files lack and that no feature depends on."""


@dataclass(frozen=True)
class Found:
    """Tensors of a file that may be a network's.

    Attributes:
        place: where they were, such as `teacher.backbone`; empty for the whole file.
        tensors: by name, without the place.
    """

    place: str
    tensors: dict[str, Tensor]


def read_state(file: Path) -> dict[str, Tensor]:
    """The tensors in a .safetensors file or a file of `torch.save`, by name.

    Nested dictionaries give names with dots. A dictionary with all tensors of the file stands for the file.

    Raises:
        ValueError: it cannot be read, holds something that would run code, or has no tensors.
    """
    try:
        held: Any = load_file(file) if file.suffix == ".safetensors" else load_tensors(file)
    except NotTensorsError:
        raise
    except Exception as exc:  # what the readers raise on damaged files has no common base
        raise ValueError("damaged, or not a file of tensors alone") from exc
    if not isinstance(held, dict):
        raise ValueError(f"holds a {type(held).__name__}, not tensors by name")
    tensors = dict(_named(_unwrapped(held)))
    if not tensors:
        entries = ", ".join(f"{name} ({type(value).__name__})" for name, value in list(held.items())[:4])
        raise ValueError(f"holds no tensors by name; found: {entries or 'nothing'}")
    return tensors


def _named(held: dict[Any, Any]) -> Iterator[tuple[str, Tensor]]:
    waiting = deque([("", held, 0)])
    seen = {id(held)}
    while waiting:
        prefix, entries, depth = waiting.popleft()
        for name, value in entries.items():
            if isinstance(value, Tensor):
                yield f"{prefix}{name}", value
            elif isinstance(value, dict) and id(value) not in seen and depth < _DEEPEST:
                seen.add(id(value))
                waiting.append((f"{prefix}{name}.", value, depth + 1))


def _unwrapped(held: dict[Any, Any]) -> dict[Any, Any]:
    for _ in range(_DEEPEST):
        holders = [value for value in held.values() if isinstance(value, Tensor) or _holds_tensors(value)]
        if len(holders) != 1 or isinstance(holders[0], Tensor):
            break
        held = holders[0]
    return held


def _holds_tensors(value: Any) -> bool:
    return isinstance(value, dict) and next(_named(value), None) is not None


def find_weights(own: Mapping[str, Tensor], state: Mapping[str, Tensor], classifiers: Sequence[str]) -> list[Found]:
    """The parts of a state that may be a network's weights, the likeliest first.

    A part that has all the network's names, whatever stands before them, comes first. Then follow the state itself and
    what remains of it without the names that programs put around a network.

    Args:
        own: the network's parameters, by name.
        state: tensors from `read_state`.
        classifiers: names of the network's classifiers, whose tensors a part need not have.

    Raises:
        ValueError: several parts have all the names, and nothing says which is meant.
    """
    needed = [name for name in own if not _of(name, classifiers) and not name.endswith(OPTIONAL)]
    anchor = needed[0] if needed else ""
    prefixes = {name.removesuffix(anchor) for name in state if name == anchor or name.endswith(f".{anchor}")}
    whole = sorted(
        (prefix for prefix in prefixes if all(f"{prefix}{name}" in state for name in needed)),
        key=lambda prefix: (_rank(prefix), len(prefix), prefix),
    )
    for other in whole[1:2]:
        same = all(state[whole[0] + name].data_ptr() == state[other + name].data_ptr() for name in needed)
        if _rank(whole[0]) == _rank(other) and not same:
            raise ValueError(
                f"holds these weights more than once, under {whole[0] or 'no name'!r} and under {other!r}: save one"
            )
    parts = {prefix: _part(state, prefix) for prefix in whole[:1]}
    prefix, part = "", dict(state)
    while part:
        parts.setdefault(prefix, part)
        heads = {name.partition(".")[0] for name in part if "." in name}
        wrapper = next((name for name in _WRAPPERS if name in heads), None)
        if wrapper is None:
            break
        prefix += f"{wrapper}."
        part = _part(state, prefix)
    return [Found(prefix.rstrip("."), part) for prefix, part in parts.items()]


def _part(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _rank(prefix: str) -> int:
    """Averaged weights before a teacher's, and these before others; a student's come last."""
    words = set(prefix.split("."))
    if any("ema" in word.split("_") for word in words):
        return 0
    return 1 if words & _TEACHERS else 3 if words & _STUDENTS else 2


def _of(name: str, modules: Sequence[str]) -> bool:
    return any(name.startswith(f"{module}.") for module in modules)


def classifier_names(classifier: Any) -> tuple[str, ...]:
    """The names of classifiers in timm's settings (a name, several or none)."""
    return (classifier,) if isinstance(classifier, str) else tuple(classifier or ())


def split_classifier(
    own: Mapping[str, Tensor], tensors: dict[str, Tensor], classifiers: Sequence[str]
) -> tuple[int, dict[str, Tensor]]:
    """For how many classes the classifier in these tensors is, and the tensors.

    Without the network's classifier, or with another kind of it, these are 0 and the tensors without it.
    """
    names = [name for name in own if _of(name, classifiers)]
    if not names or any(name not in tensors or not tensors[name].ndim for name in names):
        return 0, {name: value for name, value in tensors.items() if not _of(name, classifiers)}
    return len(tensors[names[0]]), tensors


def misfit(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> str | None:
    """The first difference between the names and shapes of the network and the tensors, as text."""
    for name, value in own.items():
        given = tensors.get(name)
        if given is None and not name.endswith(OPTIONAL):
            return f"it has no {name} {tuple(value.shape)}"
        if given is not None and given.shape != value.shape:
            return f"{name}: expected {tuple(value.shape)}, got {tuple(given.shape)}"
    extra = next((name for name in tensors if name not in own), None)
    return f"the network has no {extra}" if extra else None


def fill_network(network: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Gives the network these weights, whose names are its own.

    Raises:
        RuntimeError: they are not.
    """
    own: Any = network.state_dict()
    counters = {name: value for name, value in own.items() if name.endswith(OPTIONAL)}
    given: Any = OrderedDict(counters | dict(tensors))
    given._metadata = own._metadata  # versions of layers, which some ask for
    network.load_state_dict(given)


def name_by_order(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """The tensors under the network's own names, where they are another implementation's of the same network."""
    if own.keys() & tensors.keys() or len(own) != len(tensors):
        return None
    pairs = list(zip(own.items(), tensors.items(), strict=True))
    same = all(
        mine.shape == other.shape and name.rpartition(".")[2] == other_name.rpartition(".")[2]
        for (name, mine), (other_name, other) in pairs
    )
    return {name: other for (name, _), (_, other) in pairs} if same else None


def describe_tensors(tensors: Mapping[str, Tensor]) -> str:
    """A few of the names, with shapes."""
    few = ", ".join(f"{name} {tuple(value.shape)}" for name, value in list(tensors.items())[:3])
    return f"{len(tensors)} tensors: {few}" + (", ..." if len(tensors) > 3 else "")
