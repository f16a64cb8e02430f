"""Tries libraries that may crash or hang in a separate process, which reports the result as JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from robustfeat.errors import EngineError, RobustFeatError, first_line
from robustfeat.serving.engines.options import RunOptions
from robustfeat.system import python_command

__all__ = ["TRIAL_S", "Trial", "report", "try_engine", "try_torch"]

TRIAL_S = 120.0


def try_engine(model: str, options: str) -> dict[str, Any]:
    """Runs a model's golden images; `options` are `RunOptions` as JSON.

    Returns:
        The `Check`, with the engine and the device that ran.
    """
    from robustfeat.serving.extractor import FeatureExtractor
    from robustfeat.serving.verify import check_golden

    extractor = FeatureExtractor.load(model, RunOptions(**json.loads(options)))
    engine = extractor.engine
    check = check_golden(extractor, timed=True)
    return {
        **asdict(check),
        "short": check.short,
        "version": engine.version.partition("-")[0],
        "device": engine.device,
        "threads": engine.threads,
        "model": extractor.config.name,
    }


def try_torch() -> dict[str, Any]:
    """Imports PyTorch.

    Returns:
        The versions, as text.
    """
    import torch
    import torchvision

    cuda = f"CUDA {torch.version.cuda}, {torch.cuda.device_count()} GPUs" if torch.cuda.is_available() else "no CUDA"
    return {"found": f"torch {torch.__version__}, torchvision {torchvision.__version__}, {cuda}"}


def report(function: Callable[..., dict[str, Any]]) -> None:
    """Runs in the trial's process and prints the function's result or error."""
    try:
        answer = {"result": function(*sys.argv[1:])}
    except RobustFeatError as exc:
        value = None if exc.value is None else str(exc.value)
        answer = {"error": {"what": exc.what, "argument": exc.argument, "value": value, "fix": exc.fix}}
    except Exception as exc:  # a broken library may raise anything
        answer = {"error": {"what": first_line(exc)}}
    print(json.dumps(answer))


class Trial:
    """A running trial.

    Args:
        function: `try_engine` or `try_torch`.
        arguments: the function's arguments.
        limit_s: time limit in seconds.
    """

    def __init__(self, function: Callable[..., dict[str, Any]], *arguments: str, limit_s: float = TRIAL_S) -> None:
        self._limit_s = limit_s
        name = function.__name__
        self._process = subprocess.Popen(
            python_command(f"from robustfeat.trial import {name}, report; report({name})", *arguments),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env={**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "1"},
        )

    def result(self) -> dict[str, Any]:
        """The function's result.

        Raises:
            EngineError: the function failed, crashed, or exceeded the time limit.
        """
        try:
            said, errors = self._process.communicate(timeout=self._limit_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()
            raise EngineError(f"did not answer within {self._limit_s:g} s") from None
        code = self._process.returncode
        if code < 0:
            raise EngineError(f"crashed (signal {-code})")
        with suppress(ValueError, IndexError):
            answer: dict[str, Any] = json.loads(said.strip().splitlines()[-1])
            if "error" in answer:
                raise EngineError(**answer["error"])
            result: dict[str, Any] = answer["result"]
            return result
        raise EngineError((errors.strip().splitlines() or [f"exit code {code}"])[-1])
