"""A decoder as a thread of this process, for Windows, where processes inherit no open files.

An image that crashes it ends the whole run, and an image that hangs it holds it up.
"""

from __future__ import annotations

import threading
from multiprocessing.connection import Connection

from robustfeat.serving.decoding.worker import ImageDecoder, answer_tasks

__all__ = ["DecoderThread"]


class DecoderThread:
    """Answers tasks as a decoder process does; it has the methods of `subprocess.Popen` that `Decoder` calls.

    Args:
        connection: its end of the pipe.
        decoder: decodes the images.

    Attributes:
        returncode: None until `kill`.
    """

    def __init__(self, connection: Connection, decoder: ImageDecoder) -> None:
        self.returncode: int | None = None
        self._connection, self._decoder = connection, decoder
        threading.Thread(target=self._run, name="decoder", daemon=True).start()

    def kill(self) -> None:
        """Marks it as ended. The thread ends after its image, when the other end of the pipe is closed."""
        self.returncode = 0

    def wait(self) -> int:
        """The exit code; does not wait."""
        return 0

    def _run(self) -> None:
        with self._connection:
            answer_tasks(self._connection, self._decoder)
