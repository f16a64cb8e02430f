"""The program of the process that fits heads for the page. It turns labelled rows into a head and keeps nothing.

`fitter` starts it. A fit that takes too long or too much memory only fails itself.
"""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, BinaryIO

import numpy as np

from robustfeat.errors import RobustFeatError
from robustfeat.serving.heads.fitting.few import fit_few
from robustfeat.serving.heads.head import Head
from robustfeat.serving.identity import ModelIdentity
from robustfeat.system import die_with_parent, offer_to_die_first

__all__ = ["DONE", "HEADER_BYTES", "REFUSED", "answer", "head_answer", "serve", "zip_head"]

HEADER_BYTES = 8
"""Two lengths of 4 bytes precede each request, of its JSON and its rows. A state and a length precede each response.
An empty first response means that the process takes requests."""

DONE, REFUSED = 0, 1

_MEMORY_BYTES = 3 * 2**30
_EPOCH = (2020, 1, 1, 0, 0, 0)
"""Fixed time of files in the archive, so the same head gives the same archive."""


def serve(parent: int) -> None:
    """Handles requests from stdin on stdout, until the parent has ended."""
    import resource  # not available on Windows

    die_with_parent(signal.SIGKILL, parent)
    offer_to_die_first()
    os.nice(5)  # images have priority
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    source, sink = os.fdopen(0, "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # output of libraries must not mix with responses
    _answer(sink, DONE, b"")
    while True:
        header = source.read(HEADER_BYTES)
        if len(header) < HEADER_BYTES:
            return
        sizes = [int.from_bytes(header[at : at + 4], "little") for at in (0, 4)]
        text, rows = (source.read(size) for size in sizes)
        if len(rows) < sizes[1]:
            return
        _answer(sink, *answer(text, rows))


def answer(text: bytes, rows: bytes) -> tuple[int, bytes]:
    """A request's state and response.

    Args:
        text: the request as JSON.
        rows: its features as float32.
    """
    try:
        return DONE, _fit(json.loads(text), rows)
    except RobustFeatError as exc:
        return REFUSED, str(exc).encode()
    except MemoryError:
        return REFUSED, b"the fit takes too much memory; send fewer rows"


def _answer(sink: BinaryIO, state: int, data: bytes) -> None:
    sink.write(state.to_bytes(4, "little") + len(data).to_bytes(4, "little") + data)
    sink.flush()


def _fit(asked: Mapping[str, Any], rows: bytes) -> bytes:
    values = np.frombuffer(rows, "<f4").reshape(len(asked["labels"]), -1)
    with np.errstate(all="ignore"):  # absurd features are refused below, not reported
        head = fit_few(values, asked["labels"], asked["classes"], ModelIdentity.of_head(asked["model"]))
    if asked["archive"]:
        return zip_head(head, asked["name"])
    return json.dumps(head_answer(head, len(values))).encode()


def head_answer(head: Head, rows: int) -> dict[str, Any]:
    """A head in the format of `TaughtHead`, without the model."""
    held_out = head.scores.get("held_out", {})
    calibration = {name: head.arrays[f"calibration.{name}"].tolist() for name in ("scale", "offset") if head.calibrated}
    return {
        "classes": list(head.classes),
        "rows": rows,
        "kind": head.kind,
        "scaling": head.scaling,
        **{name: _base64(head.arrays[name]) for name in ("coefficients", "intercepts")},
        "calibration": calibration or None,
        "accuracy": held_out.get("accuracy"),
        "rows_scored": held_out.get("rows", 0),
    }


def zip_head(head: Head, name: str) -> bytes:
    """A zip file of the head's folder, `name`, for `serve`."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for part, data in sorted(head.to_files().items()):
            archive.writestr(zipfile.ZipInfo(f"{name}/{part}", _EPOCH), data)
    return file.getvalue()


def _base64(values: np.ndarray[Any, np.dtype[np.float64]]) -> str:
    return base64.b64encode(values.astype("<f8", copy=False).tobytes()).decode()
