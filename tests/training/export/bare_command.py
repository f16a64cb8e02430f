"""The command line where PyTorch is not installed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping

from tests.conftest import ROOT

__all__ = ["run_without_torch"]

WITHOUT_TORCH = """
import sys
for name in ("onnxscript", "timm", "torch", "torchvision", "transformers", *sys.argv[1].split()):
    sys.modules[name] = None
from robustfeat.cli import main
sys.argv[1:] = sys.argv[2:]
main()
"""


def run_without_torch(
    *arguments: object, missing: str = "", env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs it in a process that cannot import PyTorch, nor what `missing` names."""
    command = [sys.executable, "-c", WITHOUT_TORCH, missing, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=env)
