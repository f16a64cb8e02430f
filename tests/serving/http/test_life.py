"""Starting, stopping, and dying in parts: what is lost, and what goes on."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from robustfeat import FeatureExtractor
from tests import built_in
from tests.conftest import ROOT, Run
from tests.serving.http.conftest import Load, alive, children, head_of, serving, slow_picture, wait_until

# A worker that ends is replaced without a pause, as one that has worked for long.
AT_ONCE = {"robustfeat.serving.http.process.supervisor._STEADY_S": 0.0}


def test_a_worker_that_still_loads_ends_with_its_supervisor() -> None:
    code = """if True:
        import os, socket, time
        from robustfeat.serving.http.process.log import Log
        from robustfeat.serving.http.process.reloads import Reloads
        from robustfeat.serving.http.process.supervisor import Supervisor

        def run(start):
            print(os.getpid(), flush=True)
            time.sleep(60)

        calls = dict(announce=print, refresh=lambda: False, explain=str, forget=id)
        calls |= dict(reloads=Reloads(), log=Log("supervisor"))
        listener = socket.create_server(("127.0.0.1", 0))
        Supervisor(listener, run, workers=1, drain_s=1, retire_s=1, **calls).serve()
    """
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout
        worker = int(process.stdout.readline())
        process.kill()
        wait_until(lambda: not alive(worker), 10)


def test_a_fork_that_fails_is_tried_again() -> None:
    """The system may have no process or memory for a worker at its start, in place of another, and at a reload."""
    code = """if True:
        import errno, os, signal, socket, time
        from robustfeat.serving.http.process import supervisor as module
        from robustfeat.serving.http.process.log import Log
        from robustfeat.serving.http.process.reloads import Reloads

        module._LONGEST_PAUSE_S = 0.1
        fork, calls = os.fork, []
        failures = {1: errno.EAGAIN, 2: errno.ENOMEM, 4: errno.EAGAIN, 6: errno.ENOMEM}

        def fork_sometimes():
            calls.append(None)
            if len(calls) in failures:
                raise OSError(failures[len(calls)], os.strerror(failures[len(calls)]))
            return fork()

        os.fork = fork_sometimes

        def run(start):
            for kind in (module.LOADED, module.HEALTHY):
                os.write(start.report, module.report_line(kind, "a"))
            signal.signal(module.RETIRE, lambda *_: os._exit(0))
            print(os.getpid(), flush=True)
            time.sleep(600)

        forgotten = []
        about = dict(announce=print, refresh=lambda: False, explain=str, forget=forgotten.append)
        about |= dict(reloads=Reloads(), log=Log("supervisor"))
        listener = socket.create_server(("127.0.0.1", 0))
        code = module.Supervisor(listener, run, workers=1, drain_s=1, retire_s=1, **about).serve()
        print("end", code, len(calls), forgotten, flush=True)
    """
    command, pipe = [sys.executable, "-c", code], subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, cwd=ROOT) as process:
        assert process.stdout
        pids = (int(line) for line in process.stdout if line.strip().isdigit())
        first = next(pids)
        os.kill(first, signal.SIGKILL)
        second = next(pids)
        assert alive(second)
        process.send_signal(signal.SIGHUP)
        third = next(pids)
        wait_until(lambda: not alive(second))
        assert alive(third)
        process.send_signal(signal.SIGTERM)
        out, log = process.communicate(timeout=60)
    ended, status, forks, forgotten = out.splitlines()[-1].split(maxsplit=3)
    assert (ended, status) == ("end", "0")
    assert int(forks) >= 7, log  # three starts and four failures
    assert forgotten.startswith("[0, 0, 1")
    told = [line for line in map(json.loads, log.splitlines()) if line["event"] == "worker not started"]
    assert [line["error"] for line in told] == [
        "Resource temporarily unavailable",
        "Cannot allocate memory",
        "Resource temporarily unavailable",
        "Cannot allocate memory",
    ]


def test_a_killed_worker_costs_its_requests_and_another_comes(photos: list[bytes], extractor: FeatureExtractor) -> None:
    with serving("--workers", 2, constants=AT_ONCE) as server:
        wait_until(lambda: len(server.workers()) == 2)
        with Load(server, photos, extractor) as load:
            wait_until(lambda: sum(load.good) > 150)
            first = server.workers()
            orphans = children(first[0])
            os.kill(first[0], signal.SIGKILL)
            wait_until(lambda: len(set(server.workers()) - {first[0]}) == 2)
            load.goes_on()
        assert not load.wrong
        assert sum(load.lost) <= 4  # what each client had on its way at that moment
        wait_until(lambda: not any(alive(pid) for pid in orphans))
        assert server.get("/health/ready").status == 200
        assert "signal 9" in next(line for line in server.said if "worker ended" in line)
        # Its counts are kept, but for those of its last tenth of a second: about half of all were its.
        assert server.metric("robustfeat_images_total") >= sum(load.good) - 40


def test_the_only_worker_is_replaced_too(photos: list[bytes]) -> None:
    with serving() as server:
        (worker,) = server.workers()
        os.kill(worker, signal.SIGKILL)
        # The next request waits at the door until there is somebody.
        assert server.post("/embed", photos[0]).status == 200
        assert server.workers() != [worker]


def kill_decoder(worker: int) -> None:
    """Returns once another one has taken its place."""
    seen = children(worker)
    os.kill(seen[0], signal.SIGKILL)
    wait_until(lambda: len(set(children(worker)) - {seen[0]}) == len(seen))


def test_a_killed_decoder_costs_nothing(photos: list[bytes], extractor: FeatureExtractor) -> None:
    with serving() as server:
        (worker,) = server.workers()
        with Load(server, photos, extractor) as load:
            for _ in range(3):
                kill_decoder(worker)
                load.goes_on()
        assert (load.wrong, sum(load.lost)) == ([], 0)


def test_a_decoder_that_somebody_stopped_costs_no_image(photos: list[bytes]) -> None:
    with serving("--decode-timeout", 0.5) as server:
        (worker,) = server.workers()
        for decoder in children(worker):
            os.kill(decoder, signal.SIGSTOP)
        assert server.form("/embed", photos[:3]).status == 200
        assert server.post("/embed", photos[0]).status == 200


def test_a_killed_supervisor_takes_its_workers_along(photos: list[bytes]) -> None:
    with serving() as server:
        (worker,) = server.workers()
        pids = [worker, *children(worker)]
        assert server.stop(signal.SIGKILL) == -signal.SIGKILL
        wait_until(lambda: not any(alive(pid) for pid in pids))


def test_a_signal_to_the_whole_group_drains_too(photos: list[bytes]) -> None:
    with serving() as server:
        slow = socket.create_connection(("127.0.0.1", server.port))
        slow.sendall(head_of(photos[0]) + photos[0][:100])
        wait_until(lambda: server.metric("robustfeat_in_flight_requests") >= 2)
        os.killpg(server.process.pid, signal.SIGTERM)
        time.sleep(0.5)
        slow.sendall(photos[0][100:])
        answer = http.client.HTTPResponse(slow)
        answer.begin()
        assert answer.status == 200
        slow.close()
        assert server.process.wait(20) == 0


@pytest.mark.slow
def test_a_revoked_key_stays_revoked_after_a_worker_died(tmp_path: Path, photos: list[bytes]) -> None:
    file = tmp_path / "keys"
    file.write_text("team first-key-1\n")
    with serving("--keys", file) as server:
        file.write_text("team other-key-1\n")

        def status(key: str) -> int:
            return server.post("/embed", photos[0], authorization=f"Bearer {key}").status

        wait_until(lambda: status("first-key-1") == 401)
        time.sleep(2)  # the supervisor looks twice a second
        file.write_text("broken\n")
        os.kill(server.workers()[0], signal.SIGKILL)
        assert [status("first-key-1"), status("other-key-1")] == [401, 200]


def test_a_decoder_at_work_dies_with_its_worker() -> None:
    picture = slow_picture()
    with serving() as server:
        (worker,) = server.workers()
        decoders = children(worker)
        with socket.create_connection(("127.0.0.1", server.port)) as client:
            wait_until(lambda: not any(busy(pid) for pid in decoders))
            client.sendall(head_of(picture) + picture)
            wait_until(lambda: any(busy(pid) for pid in decoders))
            os.kill(worker, signal.SIGKILL)
            wait_until(lambda: not any(alive(pid) for pid in decoders), 2)


def busy(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "R"


def test_a_decoder_that_does_not_read_stops_nobody(photos: list[bytes]) -> None:
    with serving("--decode-timeout", 1) as server:
        (worker,) = server.workers()
        for decoder in children(worker):
            os.kill(decoder, signal.SIGSTOP)
        with ThreadPoolExecutor(2) as pool:
            large = [pool.submit(server.post, "/embed", photos[0] + bytes(size)) for size in (900_000, 9_000_000)]
            while not all(answer.done() for answer in large):
                began = time.monotonic()
                assert server.get("/health/live").status == 200
                assert time.monotonic() - began < 0.9
            assert {answer.result().status for answer in large} <= {200, 422}
        wait_until(lambda: server.post("/embed", photos[0]).status == 200)


def test_a_swept_metrics_folder_does_not_keep_a_worker_out(photos: list[bytes]) -> None:
    with serving(constants=AT_ONCE) as server:
        (worker,) = server.workers()
        variables = Path(f"/proc/{worker}/environ").read_bytes()
        assert b"PROMETHEUS" not in variables  # set after the start: found by its name
        for folder in Path(tempfile.gettempdir()).glob("robustfeat-metrics-*"):
            if str(folder) in Path(f"/proc/{worker}/maps").read_text():
                shutil.rmtree(folder)
        os.kill(worker, signal.SIGKILL)
        assert server.post("/embed", photos[0]).status == 200


def refuses(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1):
            return False
    except OSError:
        return True


@pytest.mark.parametrize("name", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains(photos: list[bytes], name: signal.Signals) -> None:
    with serving("--workers", 2) as server, ThreadPoolExecutor(1) as pool:
        # A request whose body is on its way when the signal comes, and one that is being embedded.
        late = socket.create_connection(("127.0.0.1", server.port))
        late.sendall(head_of(photos[0]) + photos[0][:100])
        many = pool.submit(server.form, "/embed", [photos[1]] * 64)
        wait_until(lambda: server.metric("robustfeat_in_flight_requests") >= 2)
        pids = server.workers()
        pids += [child for pid in pids for child in children(pid)]
        server.process.send_signal(name)

        wait_until(lambda: refuses(server.port))
        late.sendall(photos[0][100:])
        answer = http.client.HTTPResponse(late)
        answer.begin()
        assert answer.status == 200
        assert answer.getheader("connection") == "close"
        assert many.result().status == 200
        late.close()
        assert server.process.wait(20) == 0
        assert not any(alive(pid) for pid in pids)


def test_a_request_on_its_way_when_the_signal_comes_is_answered(photos: list[bytes]) -> None:
    patient = {"robustfeat.serving.http.process.connection._LINGER_S": 15.0}
    with serving(constants=patient) as server:
        kept = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        kept.request("GET", "/health/live")
        assert kept.getresponse().read()
        fresh = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        fresh.connect()
        wait_until(lambda: server.get("/health/ready").status == 200)  # and both connections are accepted
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: refuses(server.port))
        for connection in (kept, fresh):
            connection.request("POST", "/embed", photos[0])
            answer = connection.getresponse()
            assert (answer.status, answer.getheader("connection")) == (200, "close")
            connection.close()
        assert server.process.wait(20) == 0  # as soon as nobody is left


def test_it_ends_in_the_time_given_even_if_a_client_does_not(photos: list[bytes]) -> None:
    with serving("--drain", 0.3) as server, socket.create_connection(("127.0.0.1", server.port)) as slow:
        slow.sendall(b"POST /embed HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\nabc")
        wait_until(lambda: server.metric("robustfeat_in_flight_requests") >= 2)
        began = time.monotonic()
        assert server.stop() == 0
        assert time.monotonic() - began < 10


def test_answers_come_in_time_or_503(photos: list[bytes]) -> None:
    with serving("--timeout", 0.5) as server:
        (worker,) = server.workers()
        for decoder in children(worker):
            os.kill(decoder, signal.SIGSTOP)
        answer = server.post("/embed", photos[0])
        assert (answer.status, answer.json["error"]["code"]) == (503, "timeout")
        assert answer.headers["retry-after"] == "1"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--model", "nowhere/at/all"], "nowhere/at/all"),
        (["--model", "a=builtin", "--model", "a=builtin"], "each name once"),
        (["--model", "a/b=builtin"], "expected NAME=PLACE"),
        (["--head", "nowhere"], "nowhere"),
        (["--keys", "nowhere"], "--keys nowhere: No such file"),
        (["--host", "256.1.1.1"], "--host 256.1.1.1"),
        (["--max-queue", "1"], "raise --max-queue"),
        (["--host", "\udcff"], "no host name"),
        (["--precision", "int8", "--device", "cuda"], "int8 runs on processors, not on cuda; pass --precision fp16"),
        (["--engine", "tensorrt", "--precision", "fp16"], "TensorRT"),
    ],
)
def test_what_cannot_be_served_is_one_line(robustfeat: Run, options: list[str], said: str) -> None:
    result = robustfeat("serve", "--port", "0", *options)
    assert result.returncode == 1
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert said in result.stderr


@pytest.mark.parametrize("option", ["--max-body", "--timeout", "--decode-timeout", "--drain"])
@pytest.mark.parametrize("value", ["inf", "nan", "0", "-1"])
def test_limits_are_finite(robustfeat: Run, option: str, value: str) -> None:
    result = robustfeat("serve", "--port", "0", option, value)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr


def test_a_head_of_another_model_is_refused_at_the_start(robustfeat: Run, clothes: Path, model: Path) -> None:
    result = robustfeat("serve", "--port", "0", "--head", clothes, "--model", model)
    assert result.returncode == 1
    assert f"the head clothes: needs features of {built_in.NAME}" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_port_that_is_taken_is_one_line(robustfeat: Run) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = robustfeat("serve", "--port", port)
    assert result.returncode == 1
    assert f"--port {port}: Address already in use" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_scikit_learn_is_not_loaded_without_a_head() -> None:
    with serving(new=True) as server:
        (worker,) = server.workers()
        assert "sklearn" not in Path(f"/proc/{worker}/maps").read_text()
        supervisor = Path(f"/proc/{server.process.pid}/maps").read_text()
        assert "numpy" not in supervisor
