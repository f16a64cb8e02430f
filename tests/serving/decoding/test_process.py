"""One decoder process: its handshake, its answers, its deadline and its end."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from robustfeat import FeatureExtractor
from robustfeat.errors import EngineError
from robustfeat.serving.decoding.process import Decoder, DecoderLostError, Decoders
from robustfeat.serving.decoding.worker import LARGE, Images
from tests.serving.http.conftest import blank_webp, wait_until

START_S = 60
BEYOND_THE_MAILBOX = bytes(8 * 2**20)


@pytest.fixture
def decoders() -> Iterator[Decoders]:
    contract = FeatureExtractor.from_pretrained(threads=1).config.preprocessing
    made = Decoders(contract, scaled=False, workers=1, places=2)
    yield made
    made.close()


@pytest.fixture
def decoder(decoders: Decoders) -> Decoder:
    started = decoders.start(0)
    assert not started.ready
    assert started.poll(START_S)
    assert started.receive() is None
    assert started.ready
    return started


def process_of(decoder: Decoder) -> subprocess.Popen[bytes]:
    assert isinstance(decoder.process, subprocess.Popen)
    return decoder.process


def test_a_task_is_answered_with_the_error_of_each_image(decoder: Decoder, example_files: list[Path]) -> None:
    photo = example_files[0].read_bytes()
    decoder.send(Images([photo, b"no image"], [len(photo), 8], [0, 1], 10**8))
    assert decoder.poll(START_S)
    good, bad = decoder.receive()
    assert good is None
    assert "not an image" in bad


def test_what_takes_long_is_given_back(decoder: Decoder, example_files: list[Path]) -> None:
    photo, medium, large = example_files[0].read_bytes(), blank_webp(3000, 2000), blank_webp(5500, 5500)

    def ask(*images: bytes, alone: bool = False) -> object:
        decoder.send(Images(images, [len(image) for image in images], [0, 1, 1][: len(images)], 10**8, alone))
        assert decoder.poll(START_S)
        return decoder.receive()

    assert ask(photo, photo, photo) == (None, None, None)
    assert ask(photo, medium, photo) == (None,)
    assert ask(medium) == (None,)
    assert ask(large, photo) == (LARGE, None)
    assert ask(photo, large) == (None,)
    assert ask(large, alone=True) == (None,)


@pytest.mark.skipif(not Path("/proc/self/oom_score_adj").exists(), reason="Linux alone has such a score")
def test_the_system_kills_a_decoder_before_its_parent(decoder: Decoder) -> None:
    scores = [int(Path(f"/proc/{pid}/oom_score_adj").read_text()) for pid in (process_of(decoder).pid, os.getpid())]
    assert scores[0] == 1000 > scores[1]


def test_an_image_gets_a_second_try_after_a_crash(decoder: Decoder) -> None:
    os.kill(process_of(decoder).pid, signal.SIGKILL)
    decoder.send(Images([b"x"], [1], [0], 10**8))
    assert decoder.poll(START_S)
    with pytest.raises(DecoderLostError) as lost:
        decoder.receive()
    assert lost.value.reason == "the decoder crashed (signal 9)"
    assert [lost.value.gives_up(crashes) for crashes in (1, 2)] == [False, True]


@pytest.mark.parametrize("stopped", [False, True])
def test_an_image_at_its_deadline_gets_no_second_try_unless_its_decoder_was_stopped(
    decoder: Decoder, stopped: bool
) -> None:
    image = blank_webp(5500, 5500)  # which takes long enough for these calls
    if stopped:
        os.kill(process_of(decoder).pid, signal.SIGSTOP)
    decoder.send(Images([image], [len(image)], [0], 10**8, large=True))
    wait_until(lambda: decoder._stopped() if stopped else decoder._progress[1] == 1)
    for _ in range(3):  # the first call notes the progress, the others count
        decoder.check(1.0, 3.0)
    with pytest.raises(DecoderLostError) as lost:
        decoder.check(1.0, 3.0)
    assert lost.value.reason == "took longer than 3 s to read and decode"
    assert [lost.value.gives_up(crashes) for crashes in (1, 2, 9)] == [not stopped] * 3
    assert decoder.process.returncode == -signal.SIGKILL


def test_a_decoder_is_closed_while_a_thread_writes_to_it(decoder: Decoder) -> None:
    os.kill(process_of(decoder).pid, signal.SIGSTOP)
    with ThreadPoolExecutor(1) as writer:
        decoder.send(Images([BEYOND_THE_MAILBOX], [len(BEYOND_THE_MAILBOX)], [0], 10**8), writer)
        decoder.close()
    with pytest.raises(OSError, match="closed"):
        decoder.fileno()


@pytest.mark.parametrize(
    ("number", "fix"),
    [
        (errno.ENOMEM, "free memory"),
        (errno.EAGAIN, "limit of processes"),
        (errno.EMFILE, "limit of open files"),
        (errno.EACCES, "can run"),
        (errno.ENOENT, "can run"),
    ],
)
def test_a_refused_process_is_told_with_what_helps(
    decoders: Decoders, monkeypatch: pytest.MonkeyPatch, number: int, fix: str
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("subprocess.Popen", refuse)
    with pytest.raises(EngineError) as error:
        decoders.start(0)
    assert os.strerror(number) in str(error.value)
    assert fix in str(error.value.fix)
