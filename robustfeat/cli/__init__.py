"""The `robustfeat` command. Each subcommand has one module, which parses, calls and prints.

This file and the head of each module import little besides click, so `--help` answers at once.
"""

from __future__ import annotations

import importlib
import io
import os
import sys
import warnings

import click

from robustfeat import __version__
from robustfeat.cli.rendering import Failure
from robustfeat.errors import RobustFeatError
from robustfeat.system import open_standard_streams

__all__ = ["cli", "main"]

_COMMANDS = (
    "compare",
    "doctor",
    "drift",
    "duplicates",
    "embed",
    "evaluate",
    "export",
    "import",
    "info",
    "join",
    "map",
    "models",
    "paper",
    "pull",
    "push",
    "serve",
    "similar",
    "svm",
    "torchserve",
    "train",
    "triton",
    "verify",
)
_EXTRAS = {
    "onnxruntime": "cpu",
    "ray": "ray",
    "pyarrow": "parquet",
    "faiss": "index",
    "onnx": "onnx",
    **dict.fromkeys(("onnxscript", "safetensors", "timm", "torch", "torchvision"), "train"),
    "transformers": "transformers",
}


class _LazyGroup(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"robustfeat.cli.{cmd_name}_command").command
        return command


@click.group(
    cls=_LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="The exit code is 0 for success, 1 for an error, 2 for wrong usage, 3 if only some inputs or checks failed, "
    "and 75 if a signal stopped training after it saved a checkpoint.",
)
@click.version_option(__version__, prog_name="robustfeat")
def cli() -> None:
    """Trains, exports, publishes, embeds and serves robust image features.

    A MODEL is a model folder, ORG/NAME on the Hugging Face Hub, or `builtin` for the model inside the package.
    """


def main() -> None:
    """Runs the command line and prints each error of robustfeat as one line on stderr."""
    open_standard_streams()
    # Pillow warns of large images and odd metadata. We raise errors for all that matters.
    warnings.filterwarnings("ignore", module="PIL")
    warnings.filterwarnings("ignore", module="huggingface_hub")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # the terminal's encoding may lack a character
    # The Hub's client shows its bars only on a terminal. Its warnings repeat errors that we raise.
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if "HF_DEBUG" not in os.environ:
        os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    try:
        code = cli.main(standalone_mode=False)
    except click.ClickException as exc:
        exc.show()
        code = exc.exit_code
    except RobustFeatError as exc:  # raised outside a `Command`, which renders its errors itself
        Failure(str(exc)).show()
        code = exc.exit_code
    except click.Abort:
        click.echo("robustfeat: interrupted", err=True)
        # `sys.exit` would wait for threads, and a solver may compute for minutes. All cleanup is done by now.
        os._exit(1)
    except BrokenPipeError:  # the reader of our output has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except OSError as exc:  # for example a full disk behind stdout
        place = "" if exc.filename else "the output cannot be written: "
        click.echo(f"robustfeat: {place}{' '.join(str(exc).split())}", err=True)
        code = 1
    except ModuleNotFoundError as exc:
        extra = _EXTRAS.get((exc.name or "").partition(".")[0])
        if extra is None:
            raise
        click.echo(
            f"robustfeat: this needs {str(exc.name).partition('.')[0]}: pip install 'robustfeat[{extra}]'", err=True
        )
        code = 1
    sys.exit(code or 0)
