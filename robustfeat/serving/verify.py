"""Whether a model gives on this machine the answers that its folder holds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from robustfeat.errors import EngineError
from robustfeat.hub.folder import ModelFolder
from robustfeat.serving.extractor import FeatureExtractor
from robustfeat.serving.options import ENGINES, PRECISIONS, RunOptions

__all__ = ["MIN_COSINE", "Check", "verify_model"]

MIN_COSINE = {"fp32": 0.9999, "bf16": 0.99, "int8": 0.99}
"""What an engine must reach against PyTorch's features on every golden image."""


@dataclass(frozen=True)
class Check:
    """How one way to run a model fared.

    Attributes:
        engine, precision: the way.
        cosine: the smallest one over the golden images; None where it was not run.
        needed: what it must reach.
        reason: why it was not run.
    """

    engine: str
    precision: str
    cosine: float | None
    needed: float
    reason: str | None = None

    @property
    def short(self) -> bool:
        """Whether it was run and falls short."""
        return self.cosine is not None and not self.cosine >= self.needed

    def __str__(self) -> str:
        way = f"{self.engine:12}{self.precision:6}"
        if self.cosine is None:
            return f"{way}not run: {self.reason}"
        return f"{way}cosine {self.cosine:.7f}" + (f", which is below {self.needed}" if self.short else "")


def verify_model(folder: ModelFolder) -> Iterator[Check]:
    """Runs the golden images through every engine and precision of this machine, one after the other.

    Raises:
        ModelFolderError: a file was altered, or an engine cannot read it.
    """
    for engine in ENGINES:
        for precision in PRECISIONS:
            if precision == "bf16" and engine != "openvino":
                continue
            if precision == "int8" and "int8" not in folder.precisions:
                continue
            cosine, reason = None, None
            try:
                cosine = FeatureExtractor.open(folder, RunOptions(precision, engine, "cpu")).golden_cosine()
            except EngineError as exc:
                reason = str(exc)
            yield Check(engine, precision, cosine, MIN_COSINE[precision], reason)
