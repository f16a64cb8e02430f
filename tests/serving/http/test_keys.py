"""Keys: who may ask, how much, and that nobody is starved."""

from __future__ import annotations

import http.client
import os
import signal
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path

import pytest

from robustfeat import FeatureExtractor
from robustfeat.errors import InputError
from robustfeat.serving.http.admission import Admission, forget_worker
from robustfeat.serving.http.bodies import Buffered
from robustfeat.serving.http.keys import ANYONE, Key, KeyRing, parse_keys
from robustfeat.serving.http.limits import Limits
from robustfeat.serving.http.process.metrics import Metrics
from robustfeat.serving.http.service import ServedModel
from robustfeat.serving.http.watched import read_text
from robustfeat.serving.online.batching import FairQueue
from robustfeat.serving.online.errors import ApiError
from tests.serving.http.conftest import Server, alive, children, serving, wait_until

LIMITS = Limits(
    max_body_bytes=1000,
    max_pixels=1000,
    max_items=8,
    max_queue=16,
    timeout_s=1,
    decode_timeout_s=1,
    max_connections=10,
)


def test_keys_are_told_apart(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(
        "# old and new of one team\na old-key-1 rate=5\na new-key-1 rate=5\n\nb other-key#1 concurrency=3\n"
    )
    ring = KeyRing(file)
    assert ring.names == {"a", "b"}
    for value, name in {"old-key-1": "a", "new-key-1": "a", "other-key#1": "b"}.items():
        found = ring.find(f"Bearer {value}")
        assert found is not None
        assert found.name == name
    assert ring.find("bearer old-key-1") is not None
    for wrong in (
        None,
        "",
        "Bearer",
        "Bearer ",
        "Bearer old-key-2",
        "Basic old-key-1",
        "old-key-1",
        "Bearer old-key-1x",
    ):
        assert ring.find(wrong) is None


def test_without_keys_anyone_may_ask() -> None:
    for header in (None, "Bearer whatever", "Basic x"):
        assert KeyRing().find(header) is ANYONE


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("a", "expected NAME KEY"),
        ("a short", "expected NAME KEY"),
        ("a b/c long-enough", "expected NAME KEY"),
        ("a/b long-enough", "expected NAME KEY"),
        ("a long-enough rat=5", "rate=N and concurrency=N"),
        ("a team-alpha long-enough", "rate=N and concurrency=N"),
        ("a long-enough rate=x", "must be numbers"),
        ("a long-enough rate=0", "must be positive"),
        ("a long-enough rate=inf", "must be positive"),
        ("a long-enough rate=nan", "must be positive"),
        ("a long-enough concurrency=-1", "must be positive"),
    ],
)
def test_a_line_that_is_no_key_is_named_and_its_key_is_not(line: str, said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        parse_keys(["# first", line], Path("keys"))
    assert str(caught.value).startswith("keys=keys: line 2: ")
    assert "long-enough" not in str(caught.value)


def test_what_is_no_file_of_keys_is_refused_without_waiting(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("a long-enough\n")
    ring = KeyRing(file)
    for make, said in (
        (lambda: os.mkfifo(file), "not a regular file"),
        (lambda: file.symlink_to("/dev/zero"), "not a regular file"),
        (file.mkdir, "Is a directory"),
        (lambda: file.write_bytes(b"a" * 2**21), "larger than 1,048,576 bytes"),
        (lambda: file.symlink_to(tmp_path / "keys"), "symbolic links"),
    ):
        if file.is_symlink() or file.exists():
            file.unlink()
        make()
        with pytest.raises(InputError, match=said):
            ring.refresh() or ring.refresh()
        with pytest.raises(InputError, match=said):
            KeyRing(file)
        assert ring.names == {"a"}
        if file.is_dir():
            file.rmdir()


def test_a_file_of_keys_that_is_still_being_written_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("a the-first-key\n")
    ring = KeyRing(file)
    assert not ring.refresh()
    with file.open("w") as writing:
        for part in ("a the-next-", "key-of-a\nb the-", "key-of-b\n"):
            writing.write(part)
            writing.flush()
            assert not ring.refresh()
            assert ring.find("Bearer the-first-key") is not None
            assert ring.find("Bearer the-next-") is None
    assert ring.refresh()
    assert ring.names == {"a", "b"}
    assert ring.find("Bearer the-next-key-of-a") is not None
    assert ring.find("Bearer the-first-key") is None
    assert not ring.refresh()


def test_a_file_of_keys_that_changes_while_it_is_read_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "keys"
    file.write_text("a the-first-key\n")
    ring = KeyRing(file)

    def read_early(path: Path) -> str:
        text = read_text(path)
        monkeypatch.setattr("robustfeat.serving.http.keys.read_text", read_text)
        path.write_text("a the-next-key-of-a\n")
        return text

    file.write_text("a the-next-\n")
    assert not ring.refresh()
    monkeypatch.setattr("robustfeat.serving.http.keys.read_text", read_early)
    assert not ring.refresh()
    assert ring.find("Bearer the-first-key") is not None
    assert not ring.refresh()
    assert ring.refresh()
    assert ring.find("Bearer the-next-key-of-a") is not None


def test_one_key_may_not_have_two_names() -> None:
    with pytest.raises(InputError, match="the key of b is also that of a"):
        parse_keys(["a same-key-1", "b same-key-1"], Path("keys"))


def test_the_environment_is_named_where_its_line_is_no_key() -> None:
    with pytest.raises(InputError, match=r"^ROBUSTFEAT_API_KEYS: line 2: expected NAME KEY"):
        KeyRing(text="a long-enough,b")


def test_a_queue_that_holds_no_whole_request_is_refused() -> None:
    with pytest.raises(InputError) as caught:
        replace(LIMITS, max_items=17)
    assert caught.value.fix == "raise `max_queue`, or lower `max_items`"
    with pytest.raises(InputError, match=r"^timeout_s=0: expected more than 0"):
        replace(LIMITS, timeout_s=0)


def test_keys_take_turns() -> None:
    queue: FairQueue[str, str] = FairQueue()
    for name in ("a1", "a2", "a3", "b1", "c1", "c2", "a4"):
        queue.put(name[0], name)
    assert [queue.take() for _ in range(len(queue))] == ["a1", "b1", "c1", "a2", "c2", "a3", "a4"]


def test_a_key_that_used_more_than_its_turns_waits_for_the_others() -> None:
    queue: FairQueue[str, str] = FairQueue()
    for name in ("a1", "a2", "a3", "b1", "b2", "b3"):
        queue.put(name[0], name)
    taken = [queue.take()]
    queue.charge("a", 2.0)
    queue.put("a", taken[0], first=True)
    taken += [queue.take() for _ in range(len(queue))]
    assert taken == ["a1", "b1", "b2", "b3", "a1", "a2", "a3"]
    queue.put("a", "a4")
    queue.put("c", "c1")  # who comes later has neither saved turns nor a debt
    queue.put("c", "c2")
    assert [queue.take() for _ in range(3)] == ["c1", "a4", "c2"]


@pytest.mark.parametrize("shared", [False, True])
def test_a_decoder_is_left_for_the_other_keys(
    extractor: FeatureExtractor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared: bool
) -> None:
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    before = len(children(os.getpid()))
    with ServedModel("m", extractor, LIMITS, Metrics(0), decoders=1, shared=shared):
        assert len(children(os.getpid())) - before == 1 + shared


def test_a_key_without_bodies_is_not_kept_out_by_those_who_hold_them_all() -> None:
    buffered, whole = Buffered(LIMITS), LIMITS.max_body_bytes
    buffered.share_among(2)
    a, b = Key("a", b""), Key("b", b"")
    with ExitStack() as stack:
        for _ in range(16):
            stack.enter_context(buffered.body(a)).grow(whole)
        with pytest.raises(ApiError, match="too much is being uploaded"), buffered.body(a) as held:
            held.grow(1)
        with pytest.raises(ApiError, match="too much is being uploaded"), buffered.body(ANYONE) as held:
            held.grow(1)
        for _ in range(8):
            stack.enter_context(buffered.body(b)).grow(whole)
        with pytest.raises(ApiError, match="too much is being uploaded"), buffered.body(b) as held:
            held.grow(1)
    assert buffered.bytes == 0
    with buffered.body(ANYONE) as held:
        held.grow(whole)


@pytest.fixture
def doors() -> Iterator[list[Admission]]:
    """Of two workers."""
    with tempfile.TemporaryFile() as memory:
        yield [Admission(LIMITS, memory.fileno(), number, 2) for number in range(2)]


def refused(door: Admission, key: Key, items: int) -> str | None:
    try:
        with door.enter(key, items):
            return None
    except ApiError as exc:
        return exc.code


def test_the_queue_ends(doors: list[Admission]) -> None:
    assert refused(doors[0], ANYONE, 9) == "too_many_images"
    with doors[0].enter(ANYONE, 8), doors[0].enter(ANYONE, 7):
        assert refused(doors[0], ANYONE, 2) == "queue_full"
        with pytest.raises(ApiError) as caught, doors[0].enter(ANYONE, 2):
            pass
        assert (caught.value.status, caught.value.headers["retry-after"]) == (503, "1")
        assert refused(doors[0], ANYONE, 1) is None
        with doors[0].enter(ANYONE, 1), pytest.raises(ApiError):
            doors[0].check(ANYONE)
        assert refused(doors[1], ANYONE, 8) is None
    assert refused(doors[0], ANYONE, 8) is None


def test_a_share_counts_over_all_workers() -> None:
    with tempfile.TemporaryFile() as memory:
        doors = [Admission(LIMITS, memory.fileno(), number, 2) for number in range(2)]
        key = Key("a", b"", concurrency=4)
        with doors[0].enter(key, 2), doors[1].enter(key, 2):
            assert refused(doors[0], key, 1) == "share_exceeded"
        assert refused(doors[0], key, 8) is None  # larger than the share, but alone
        with doors[0].enter(key, 1):
            assert refused(doors[1], key, 8) == "share_exceeded"
            # Worker 0 is killed, and another takes its place.
            Admission(LIMITS, memory.fileno(), 0, 2)
            assert refused(doors[1], key, 4) is None


def test_images_of_a_dead_worker_do_not_count() -> None:
    with tempfile.TemporaryFile() as memory:
        forget_worker(memory.fileno(), 0, 3)  # it died before it made the counts
        doors = [Admission(LIMITS, memory.fileno(), number, 2, 3) for number in range(3)]
        key, other = Key("a", b"", concurrency=4), Key("b", b"", concurrency=4)
        with doors[0].enter(key, 2), doors[2].enter(other, 3), doors[2].enter(key, 2):
            assert refused(doors[1], key, 1) == "share_exceeded"
            forget_worker(memory.fileno(), 2, 3)
            assert refused(doors[1], key, 2) is None
            assert refused(doors[1], key, 3) == "share_exceeded"
            assert refused(doors[1], other, 4) is None


def test_images_of_a_killed_worker_do_not_count_against_their_key(tmp_path: Path, photos: list[bytes]) -> None:
    """A worker that hangs at a reload is killed, and no other gets its number for a long time."""
    keys = tmp_path / "keys"
    keys.write_text("a the-key-of-a concurrency=1\n")
    at_once = {"robustfeat.cli.serve_command._RETIRE_S": 0.0}
    with serving("--keys", keys, "--timeout", 5, constants=at_once) as server, ThreadPoolExecutor(1) as pool:

        def embed(photo: bytes) -> int:
            with suppress(OSError, http.client.HTTPException):
                return server.post("/embed", photo, authorization="Bearer the-key-of-a").status
            return 0

        (worker,) = server.workers()
        for decoder in children(worker):
            os.kill(decoder, signal.SIGSTOP)
        lost = pool.submit(embed, photos[0])
        wait_until(lambda: embed(b"") == 429)  # without an image it takes no share itself
        os.kill(worker, signal.SIGSTOP)
        server.process.send_signal(signal.SIGHUP)
        wait_until(lambda: not alive(worker), 60)
        assert lost.result() == 0
        wait_until(lambda: embed(photos[0]) == 200)


def test_a_key_without_images_is_not_kept_out_by_those_who_fill_the_queue() -> None:
    with tempfile.TemporaryFile() as memory:
        door = Admission(LIMITS, memory.fileno(), 0, 1)
        door.share_among(2)
        a, b = Key("a", b""), Key("b", b"")
        with door.enter(a, 8):
            assert refused(door, a, 1) == "share_exceeded"  # half of 16
            with door.enter(b, 8):
                assert refused(door, Key("c", b""), 1) is None
                assert refused(door, b, 1) == "share_exceeded"


def test_a_rate_is_kept_over_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("robustfeat.serving.http.admission.time.monotonic", lambda: now)
    with tempfile.TemporaryFile() as memory:
        doors = [Admission(LIMITS, memory.fileno(), number, 2) for number in range(2)]
        key = Key("a", b"", rate=50.0)
        taken = 0
        for step in range(1000):
            now = 1000.0 + step / 500
            taken += refused(doors[step % 2], key, 1) is None
        assert taken == 112  # 100 in two seconds, and those of a quarter of a second that were kept
        assert refused(doors[0], key, 1) == "rate_exceeded"


def test_a_request_beyond_the_rate_leaves_a_debt() -> None:
    with tempfile.TemporaryFile() as memory:
        door = Admission(LIMITS, memory.fileno(), 0, 1)
        key = Key("a", b"", rate=4.0)
        assert refused(door, key, 8) is None
        with pytest.raises(ApiError) as caught, door.enter(key, 1):
            pass
        assert caught.value.headers["retry-after"] == "2"


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Path]]:
    file = tmp_path_factory.mktemp("keys") / "keys"
    file.write_text("team team-key-1\nslow slow-key-1 rate=0.01\n")
    with serving("--keys", file, "--log-requests", ROBUSTFEAT_API_KEYS="env env-key-1") as server:
        yield server, file


def test_a_request_needs_a_key(guarded: tuple[Server, Path], photos: list[bytes]) -> None:
    server, _ = guarded
    for key in ("team-key-1", "env-key-1"):
        assert server.post("/embed", photos[0], authorization=f"Bearer {key}").status == 200
    for path in ("/embed", "/v1/embeddings", "/predict/x", "/nothing"):
        answer = server.post(path, photos[0])
        assert (answer.status, answer.json["error"]["code"]) == (401, "missing_api_key")
        assert answer.headers["www-authenticate"] == "Bearer"
    answer = server.post("/embed", photos[0], authorization="Bearer team-key-2")
    assert (answer.status, answer.json["error"]["code"]) == (401, "invalid_api_key")
    assert "error" in server.post("/v2/models/robustfeat/infer", b"{}").json
    assert server.get("/info").status == 401
    for path in ("/health/live", "/health/ready", "/v2/health/ready", "/metrics", "/docs", "/openapi.json"):
        assert server.get(path).status == 200
    assert server.get("/openapi.json").json["components"]["securitySchemes"]


def test_a_rate_is_429_with_the_time_to_wait(guarded: tuple[Server, Path], photos: list[bytes]) -> None:
    server, _ = guarded
    answers = [server.post("/embed", photos[0], authorization="Bearer slow-key-1") for _ in range(3)]
    assert [answer.status for answer in answers] == [200, 429, 429]
    assert 90 <= int(answers[1].headers["retry-after"]) <= 100
    assert answers[1].json["error"]["code"] == "rate_exceeded"


def test_keys_are_rotated_without_a_restart(guarded: tuple[Server, Path], photos: list[bytes]) -> None:
    server, file = guarded
    file.write_text("team team-key-9\n")

    def status(key: str) -> int:
        return server.post("/embed", photos[0], authorization=f"Bearer {key}").status

    wait_until(lambda: (status("team-key-1"), status("team-key-9"), status("env-key-1")) == (401, 200, 200))
    file.write_text("team\n")
    wait_until(lambda: any("left as they were" in line for line in server.said))
    assert status("team-key-9") == 200


def test_logs_name_the_request_and_never_the_key(guarded: tuple[Server, Path], photos: list[bytes]) -> None:
    server, _ = guarded
    server.post("/embed", photos[0], authorization="Bearer env-key-1", x_request_id="seen-1")
    wait_until(lambda: any(line.get("request_id") == "seen-1" for line in server.logged()))
    (line,) = [line for line in server.logged() if line.get("request_id") == "seen-1"]
    assert (line["event"], line["status"], line["key"], line["path"]) == ("request", 200, "env", "/embed")
    assert "key-1" not in "".join(server.said)
    server.get("/%C2%9B2J%E2%80%AE%7F%1B", authorization="Bearer env-key-1", **{"x-request-id": "seen-2"})
    wait_until(lambda: any(line.get("request_id") == "seen-2" for line in server.logged()))
    (line,) = [line for line in server.logged() if line.get("request_id") == "seen-2"]
    assert line["path"] == "/\x9b2J\u202e\x7f\x1b"
    assert all(said.strip().isprintable() for said in server.said)  # whoever reads a log on a terminal is safe
    assert "key-9" not in "".join(server.said)
