"""What a running server serves: the same in all workers, pinned where asked, and changed without a lost request."""

from __future__ import annotations

import http.client
import os
import pty
import re
import shutil
import signal
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from robustfeat import FeatureExtractor, Head, InputError
from robustfeat.hub.folder import ModelFolder, seal_folder
from robustfeat.hub.place import Place
from robustfeat.serving.http.manifest import Manifest, read_manifest
from tests.conftest import ROOT, Run, Share, files_of
from tests.hub_server import FakeHub, Fault
from tests.serving.http.conftest import Load, Server, anonymous_mib, serving, wait_until
from tests.serving.http.test_life import AT_ONCE


@pytest.fixture(scope="session")
def others(clothes: Path, share: Share) -> Path:
    """The head of `clothes` with other scores, and so with another hash."""
    return share("others", lambda out: replace(Head.load(clothes), scores={"accuracy": 0.5}).save(out))


@pytest.fixture
def online(hub: FakeHub, tmp_path: Path) -> dict[str, Any]:
    """The environment of a server that speaks to `hub`."""
    home = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_CACHE": str(tmp_path / "home" / "hub")}
    return {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", **home}


def sha256(folder: Path) -> str:
    return str(Head.load(folder).sha256)


def served_head(server: Server) -> str:
    """The hash of the only head; each call reaches any of the workers."""
    (head,) = server.get("/info").json["heads"]
    return str(head["sha256"])


def write(file: Path, *lines: str) -> None:
    """Replaces a manifest as a whole, as configuration tools do."""
    new = file.with_suffix(".new")
    new.write_text("\n".join(lines) + "\n")
    new.replace(file)


def events(server: Server, name: str) -> list[dict[str, object]]:
    return [line for line in server.logged() if line["event"] == name]


def reload(server: Server) -> None:
    """SIGHUP, and all workers have been replaced."""
    done = len(events(server, "reloaded"))
    server.process.send_signal(signal.SIGHUP)
    wait_for_event(server, "reloaded", done + 1)


def wait_for_event(server: Server, name: str, count: int = 1) -> None:
    wait_until(lambda: len(events(server, name)) >= count, 60)


def wait_until_gone(server: Server, pid: int) -> None:
    wait_until(lambda: pid not in server.workers())


class KeptConnection:
    """A client that keeps its connection for as long as the server lets it, and asks without a pause."""

    def __init__(self, server: Server, path: str, photo: bytes) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        self._path, self._photo = path, photo
        self.good, self.failures = 0, list[str]()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> KeptConnection:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._connection.close()

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self._connection.request("POST", self._path, self._photo)  # connects again after a last answer
                answer = self._connection.getresponse()
                answer.read()
            except (OSError, http.client.HTTPException) as exc:
                self.failures.append(repr(exc))
                self._connection.close()
                continue
            if answer.status == 200:
                self.good += 1
            else:
                self.failures.append(str(answer.status))


def test_a_push_between_two_starts_gives_no_second_head(
    hub: FakeHub, clothes: Path, others: Path, online: dict[str, Any]
) -> None:
    repo = hub.add("org/clothes", files_of(clothes))
    commit = repo.branches["main"]
    # The push comes when the first worker has its head, before the second worker starts.
    place = f"/org/clothes/resolve/{commit}/head.json"
    hub.after[place] = lambda: hub.commit(repo, "main", files_of(others))
    with serving("--head", "org/clothes", "--workers", 2, constants=AT_ONCE, **online) as server:
        wait_until(lambda: server.metric("robustfeat_ready_workers") == 2)
        assert repo.branches["main"] != commit
        assert {served_head(server) for _ in range(30)} == {sha256(clothes)}
        first, second = server.workers()
        for pid in (first, second):  # nor does one that takes a place later look it up again
            os.kill(pid, signal.SIGKILL)
            wait_until_gone(server, pid)
            wait_until(lambda: server.metric("robustfeat_ready_workers") == 2)
            assert {served_head(server) for _ in range(30)} == {sha256(clothes)}


def test_a_folder_that_changed_is_not_mixed_with_what_others_serve(clothes: Path, others: Path, tmp_path: Path) -> None:
    folder = tmp_path / "clothes"
    shutil.copytree(clothes, folder)
    with serving("--head", folder, "--workers", 2, constants=AT_ONCE) as server:
        wait_until(lambda: server.metric("robustfeat_ready_workers") == 2)
        assert {served_head(server) for _ in range(10)} == {sha256(clothes)}
        shutil.rmtree(folder)
        shutil.copytree(others, folder)
        os.kill(server.workers()[0], signal.SIGKILL)
        wait_until(lambda: any("error" in line for line in events(server, "worker ended")))
        (said, *_) = (line["error"] for line in events(server, "worker ended") if "error" in line)
        assert f"the sha256 must be {sha256(clothes)[:12]}..., got {sha256(others)[:12]}" in str(said)
        assert {served_head(server) for _ in range(10)} == {sha256(clothes)}
        # Without anybody who serves the old one, the new one is better than nothing.
        os.kill(server.workers()[0], signal.SIGKILL)
        wait_until(lambda: served_head(server) == sha256(others))


@pytest.mark.slow
def test_places_are_pinned_by_their_hashes(
    robustfeat: Run, hub: FakeHub, clothes: Path, others: Path, small_fp32: Path, online: dict[str, Any]
) -> None:
    repo = hub.add("org/clothes", files_of(clothes))
    pinned = f"org/clothes@{repo.branches['main']}#{sha256(clothes)}"
    hub.commit(repo, "main", files_of(others))
    model = ModelFolder(small_fp32).config_hash
    models = ["--model", "builtin", "--model", f"small={small_fp32}#{model}"]
    with serving(*models, "--head", f"wear={pinned}", "--head", "latest=org/clothes", **online) as server:
        told = server.get("/info").json
        assert [head["sha256"] for head in told["heads"]] == [sha256(clothes), sha256(others)]
        assert told["models"][1]["config_hash"] == model
    for options, said in {
        ("--head", f"org/clothes#{sha256(clothes)}"): f"must be {sha256(clothes)[:12]}..., got {sha256(others)[:12]}",
        ("--head", f"{clothes}#12ab"): "the sha256 of a head has 64 hex digits; got '12ab'",
        ("--model", f"a={small_fp32}#{sha256(clothes)}"): "not the requested model",
        ("--model", f"{small_fp32}#{model}", "--config-hash", model): "small-fp32 has another one; leave --config-hash",
        ("--model", "builtin", "--model", str(small_fp32), "--revision", "v1"): "--revision: is for one model",
    }.items():
        result = robustfeat("serve", "--port", 0, *options, env={**os.environ, **online})
        assert (result.returncode, result.stderr.count("\n")) == (1, 1), result.stderr
        assert said in result.stderr


def test_a_changed_manifest_is_served_without_a_lost_request(
    clothes: Path, others: Path, small_fp32: Path, photos: list[bytes], extractor: FeatureExtractor, tmp_path: Path
) -> None:
    manifest = tmp_path / "served.toml"
    relative = os.path.relpath(clothes, ROOT)  # from the server's working directory, not from the manifest's folder
    write(manifest, "[models]", 'robustfeat = "builtin"', "[heads]", f'clothes = "{relative}"')
    with serving("--manifest", manifest, "--workers", 2) as server:
        wait_until(lambda: server.metric("robustfeat_ready_workers") == 2)
        first = set(server.workers())
        with (
            Load(server, photos, extractor) as load,
            KeptConnection(server, "/embed", photos[0]) as embedding,
            KeptConnection(server, "/predict/clothes", photos[1]) as predicting,
        ):
            write(
                manifest,
                "[models]",
                'robustfeat = "builtin"',
                f'small = "{small_fp32}#{ModelFolder(small_fp32).config_hash}"',
                "[heads]",
                f'clothes = "{others}#{sha256(others)}"',
            )
            wait_for_event(server, "reloaded")
            load.goes_on()
            wait_until(lambda: not first & set(server.workers()))  # their memory is given back
            load.goes_on()
        assert (load.wrong, sum(load.lost)) == ([], 0)
        assert (embedding.failures, predicting.failures) == ([], [])
        assert min(embedding.good, predicting.good) > 10
        assert {served_head(server) for _ in range(10)} == {sha256(others)}
        assert server.post("/embed?model=small", photos[0]).status == 200
        (reloaded,) = events(server, "reloaded")
        assert reloaded["heads"] == {"clothes": {"name": str(others), "revision": None, "sha256": sha256(others)}}
        # Nothing of the old workers is counted among what is there now, and nothing they did is forgotten.
        wait_until(lambda: server.metric("robustfeat_in_flight_requests") == 1)  # clients have answers before they end
        answered = sum(load.good) + embedding.good + predicting.good
        wait_until(lambda: server.metric("robustfeat_images_total") >= answered)


def test_a_reload_that_fails_changes_nothing(
    clothes: Path, others: Path, small_fp32: Path, photos: list[bytes], extractor: FeatureExtractor, tmp_path: Path
) -> None:
    manifest, wrong = tmp_path / "served.toml", tmp_path / "wrong"
    shutil.copytree(small_fp32, wrong)  # a model whose golden images have other features
    golden = np.load(wrong / "golden" / "features.npy")
    golden[-1] *= -1
    np.save(wrong / "golden" / "features.npy", golden)
    seal_folder(wrong, ModelFolder(small_fp32).config, (wrong / "README.md").read_text("utf-8"))
    bad = {
        f'[heads]\nclothes = "{others}#{sha256(clothes)}"': "not the requested head",
        f'[models]\na = "{small_fp32}"\n[heads]\nclothes = "{clothes}"': "the head clothes: needs features of",
        f'[models]\nrobustfeat = "builtin"\na = "{wrong}"': "a: the cosine to a golden image's features must be ",
        "[heads": f"--manifest {manifest}: not valid TOML (",
        '[head]\nclothes = "a"': "expected the tables models, heads, collections; got head",
        '[heads]\n"a/b" = "a"': "[heads] a/b: expected NAME = ",
    }
    write(manifest, "[heads]", f'clothes = "{clothes}"')
    with serving("--manifest", manifest) as server:
        pids = server.workers()
        with Load(server, photos, extractor) as load:
            for number, (text, said) in enumerate(bad.items()):
                write(manifest, text)
                wait_for_event(server, "reload refused", number + 1)
                assert said in str(events(server, "reload refused")[-1]["error"])
            load.goes_on()
        assert (load.wrong, sum(load.lost)) == ([], 0)
        assert served_head(server) == sha256(clothes)
        assert server.workers() == pids
        manifest.unlink()  # as a tool does that writes it anew
        wait_until(lambda: "No such file" in str(events(server, "reload refused")[-1]["error"]))
        write(manifest, "[heads]", f'clothes = "{others}"')
        wait_for_event(server, "reloaded")
        assert served_head(server) == sha256(others)


def test_sighup_looks_names_up_again_and_the_newest_one_counts(
    hub: FakeHub, clothes: Path, others: Path, online: dict[str, Any], photos: list[bytes]
) -> None:
    repo = hub.add("org/clothes", files_of(clothes))
    with serving("--head", "org/clothes", **online) as server:
        (old,) = server.workers()
        hub.commit(repo, "main", files_of(others))
        hub.faults.append(Fault("head.safetensors", "slow", times=2))
        server.process.send_signal(signal.SIGHUP)
        wait_until(lambda: len(server.workers()) == 2)
        (tried,) = set(server.workers()) - {old}
        os.kill(tried, signal.SIGKILL)  # as where memory runs out
        wait_for_event(server, "reload refused")
        assert "ended by signal 9" in str(events(server, "reload refused")[0]["error"])
        assert (server.workers(), served_head(server)) == ([old], sha256(clothes))
        reload(server)
        assert served_head(server) == sha256(others)
        wait_until_gone(server, old)
        server.process.send_signal(signal.SIGHUP)
        assert server.stop() == 0


@pytest.mark.slow
def test_reloads_leave_no_memory_behind(photos: list[bytes]) -> None:
    with serving() as server:
        server.form("/embed", photos[:8])
        before = anonymous_mib(server.process.pid)
        for _ in range(4):
            (old,) = server.workers()
            reload(server)
            wait_until_gone(server, old)
        server.form("/embed", photos[:8])
        assert anonymous_mib(server.process.pid) < 1.15 * before + 5


@pytest.mark.parametrize("pin", ["", "#" + "a" * 64])
def test_the_builtin_model_has_its_name_with_and_without_a_pin(pin: str) -> None:
    assert list(Manifest.of_options([f"builtin{pin}"], [], []).models) == ["robustfeat"]


def test_the_documented_manifest_is_read(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "serving.md").read_text("utf-8")
    (block,) = re.findall(r"<!-- manifest of names -->\n```toml\n(.*?)```", page, re.S)
    file = tmp_path / "served.toml"
    file.write_text(block)
    assert read_manifest(file) == Manifest(
        {"robustfeat": Place("builtin")},
        {"clothes": Place("org/clothes", "v3")},
        {"photos": Place("/data/photos.npy")},
    )


def test_a_closed_terminal_ends_the_server() -> None:
    pid, terminal = pty.fork()
    if not pid:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup leaves it ignored, and the server then stays
        os.chdir(ROOT)
        os.execv(sys.executable, [sys.executable, "-m", "robustfeat", "serve", "--port", "0"])
    said = ""
    while "serving at" not in said:
        said += os.read(terminal, 4096).decode()
    os.kill(pid, signal.SIGHUP)  # of somebody else: the terminal is still there
    while "reloaded" not in said:
        said += os.read(terminal, 4096).decode()
    assert re.search(r'"event":"reload started"', said), said
    os.close(terminal)
    ended, status = os.waitpid(pid, 0)
    assert (ended, os.waitstatus_to_exitcode(status)) == (pid, 0)


@pytest.mark.parametrize("text", ["", "# nothing is left\n"])
def test_an_emptied_manifest_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "served.toml"
    file.write_text(text)
    with pytest.raises(InputError, match=r"manifest=.*served\.toml: names no model, head or collection"):
        read_manifest(file)
    for kept in ('[collections]\na = "a.npy"\n', "[heads]\n"):
        file.write_text(f"{text}\n{kept}")
        assert list(read_manifest(file).models) == ["robustfeat"]
