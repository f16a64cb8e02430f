"""Weights that timm and torchvision download by themselves: no server keeps an import waiting without end."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from robustfeat.errors import HubError, InputError
from robustfeat.hub.folder import WEIGHTS
from robustfeat.hub.remote import HubAccess

__all__ = ["limited_silence", "require_download"]

_SILENCE_S = 30.0


def require_download(source: str, settings: Mapping[str, Any]) -> None:
    """Requests weights of timm that are not cached once from the Hub, since its client would retry for a minute.

    Args:
        source: names the network in messages.
        settings: timm's `pretrained_cfg` of the network.

    Raises:
        InputError: the Hub does not answer within seconds, or refuses.
    """
    access, repo = HubAccess(), settings.get("hf_hub_id")
    names = [settings.get("hf_hub_filename") or WEIGHTS, "pytorch_model.bin"]
    if not repo or access.offline or any(access.cached(repo, name, None) for name in names):
        return
    try:
        access.look(repo, None)
    except HubError as exc:
        raise InputError(f"{source}: its weights cannot be downloaded ({exc.what})", fix="pass `weights=FILE`") from exc


@contextmanager
def limited_silence() -> Iterator[None]:
    """A connection that is opened in the block and silent for half a minute fails by `TimeoutError`, an `OSError`."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_SILENCE_S)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
