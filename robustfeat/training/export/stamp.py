"""Stamps ONNX files of model folders with the preprocessing hash, and removes traces of their making."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import onnx

from robustfeat.hub.preprocessing import Preprocessing
from robustfeat.serving.engines.engine import HASH_KEY

__all__ = ["INPUT", "OUTPUT", "quiet", "raise_of_the_system", "stamp_onnx"]

INPUT, OUTPUT = "pixel_values", "features"
"""Input, (N, 3, S, S) float32, and output, (N, D) float32, of a model folder's ONNX files."""


def stamp_onnx(model: onnx.ModelProto, contract: Preprocessing) -> None:
    """Keeps the preprocessing hash, and drops the traces of the exporting machine (paths, stack traces)."""
    del model.metadata_props[:]
    model.metadata_props.add(key=HASH_KEY, value=contract.hash)
    model.graph.doc_string = model.doc_string = ""
    for node in model.graph.node:
        node.doc_string = ""
        del node.metadata_props[:]
    for value in (*model.graph.value_info, *model.graph.input, *model.graph.output):
        del value.metadata_props[:]


def raise_of_the_system(exc: BaseException) -> None:
    """Raises the system's error behind another one, such as a full disk, for which no network is to blame.

    Raises:
        OSError: if there is one.
    """
    cause: BaseException | None = exc
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno is not None:
            raise cause
        cause = cause.__cause__ or cause.__context__


@contextmanager
def quiet() -> Iterator[None]:
    """The exporters' chatter is about their own internals; what matters is checked afterwards."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
