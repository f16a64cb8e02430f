"""What operators see of a server: its log from start to end, its requests, and its metrics."""

from __future__ import annotations

import json
import re
import signal
import socket
from pathlib import Path
from typing import Any

import pytest

import robustfeat
from robustfeat import Head
from robustfeat.errors import InputError
from robustfeat.hub.catalog import builtin_model
from robustfeat.serving.http.options import parse_proxies
from robustfeat.serving.http.process.metrics import MOST_KEYS
from tests.conftest import Run
from tests.serving.http.conftest import Server, anonymous_mib, serving, wait_until


def lines_of(text: str) -> list[dict[str, Any]]:
    """Every line is one JSON object with a time, a level, who writes, and an event."""
    lines = [json.loads(line) for line in text.splitlines()]
    assert all({"time", "level", "worker", "event"} <= set(line) for line in lines)
    return lines


def sample(server: Server, name: str) -> dict[str, float]:
    """The samples of a metric by their labels."""
    text = server.get("/metrics").body.decode()
    return {labels: float(value) for labels, value in re.findall(rf"^{name}(?:\{{(.*)\}})? (\S+)$", text, re.M)}


class JsonServer(Server):
    """A server whose first line that names its address is JSON."""

    arguments = ("serve", "--port", "0", "--log-format", "json")

    def _read(self) -> None:
        with self._stderr:
            for line in self._stderr:
                self.said.append(line)
                if '"event":"serving"' in line:
                    self._ready.set()
        self._ready.set()


def test_every_line_is_json_from_start_to_end(clothes: Path, photos: list[bytes]) -> None:
    server = JsonServer("--head", f"clothes={clothes}", "--workers", 2, "--log-requests")
    assert server.post("/predict/clothes", photos[0], x_request_id="mine").status == 200
    server.process.send_signal(signal.SIGHUP)
    wait_until(lambda: "reloaded" in "".join(server.said))
    wait_until(lambda: sum(line["event"] == "loaded" for line in lines_of("".join(server.said))) == 4)
    assert server.stop() == 0
    lines = lines_of("".join(server.said))
    of_server = [line for line in lines if line["worker"] == "supervisor"]
    stages = ["starting", "serving", "reload started", "reloaded", "draining", "drained"]
    assert [line["event"] for line in of_server] == stages
    assert of_server[0]["version"] == robustfeat.__version__
    assert of_server[-1]["exit_code"] == 0
    for served in (of_server[1], of_server[3]):
        assert served["models"]["robustfeat"]["sha256"] == builtin_model().config_hash
        assert served["heads"]["clothes"]["sha256"] == Head.load(clothes).sha256
    loaded = [line for line in lines if line["event"] == "loaded"]
    assert len(loaded) == 4
    (request,) = [line for line in lines if line["event"] == "request"]
    expected = {"request_id": "mine", "status": 200, "model": "robustfeat", "head": "clothes", "images": 1}
    assert expected.items() <= request.items()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--head", "nowhere"], "nowhere: not a head"),
        (["--keys", "nowhere"], "--keys nowhere: No such file"),
        (["--max-queue", "1"], "raise --max-queue"),
        (["--manifest", "nowhere"], "--manifest nowhere: No such file"),
        (["--forwarded-allow-ips", "proxy"], "--forwarded-allow-ips: expected addresses and networks such as"),
    ],
)
def test_a_start_that_fails_ends_with_a_line_of_json(robustfeat: Run, options: list[str], said: str) -> None:
    result = robustfeat("serve", "--port", 0, "--log-format", "json", *options)
    assert result.returncode == 1
    *_, failed = lines_of(result.stderr)
    assert (failed["event"], failed["exit_code"]) == ("failed", 1)
    assert said in failed["error"]
    assert result.stderr.count(said) == 1


def test_a_request_id_is_kept_returned_and_logged_whatever_is_answered(photos: list[bytes]) -> None:
    with serving("--log-requests", "--forwarded-allow-ips", "10.0.0.0/8, 127.0.0.1", "--host", "::") as server:
        answers = {
            "good": server.post("/embed", photos[0], x_request_id="good"),
            "none": server.post("/embed", b"none", x_request_id="none"),
            "gone": server.get("/gone", **{"x-request-id": "gone", "x-forwarded-for": "203.0.113.7, 10.1.2.3"}),
        }
        assert {name: answer.headers["x-request-id"] for name, answer in answers.items()} == {
            name: name for name in answers
        }
        made = server.get("/info", **{"x-request-id": "no spaces"}).headers["x-request-id"]
        assert re.fullmatch("[0-9a-f]{32}", made)
        with socket.create_connection(("127.0.0.1", server.port)) as client:  # what is no HTTP is logged, too
            client.sendall(b"nonsense\r\n\r\n")
            said = client.recv(4096).decode()
        (refused,) = re.findall("x-request-id: (.*)\r", said)
        wait_until(lambda: sum(line["event"] == "request" for line in server.logged()) >= 5)
        logged = {line["request_id"]: line for line in server.logged() if line["event"] == "request"}
        assert {name: (line["status"], line["code"]) for name, line in logged.items()} == {
            "good": (200, None),
            "none": (422, "unreadable_image"),
            "gone": (404, "not_found"),
            made: (200, None),
            refused: (400, "bad_http"),
        }
        assert logged["gone"]["client"] == "203.0.113.7"
        assert {logged[name]["client"] for name in ("good", refused)} == {"127.0.0.1"}  # though the socket is of IPv6


def test_metrics_say_what_is_served_and_who_asks(clothes: Path, photos: list[bytes], tmp_path: Path) -> None:
    manifest, keys = tmp_path / "served.toml", tmp_path / "keys"
    manifest.write_text(f'[heads]\nclothes = "{clothes}"\n')
    keys.write_text("".join(f"team{number} key-number-{number}\n" for number in range(MOST_KEYS + 2)))
    with serving("--manifest", manifest, "--keys", keys) as server:
        for number in range(MOST_KEYS + 2):
            server.get("/info", authorization=f"Bearer key-number-{number}")
        server.headers["authorization"] = "Bearer key-number-0"
        assert server.form("/predict/clothes", [photos[0], b"none", photos[1]]).status == 200
        assert sample(server, "robustfeat_head_images_total") == {'head="clothes"': 2}
        assert sample(server, "robustfeat_key_images_total") == {'key="team0"': 3}
        by_key = sample(server, "robustfeat_key_requests_total")
        assert by_key['key="team0",status="200"'] == by_key['key="other",status="200"'] == 2
        assert len(by_key) == MOST_KEYS + 1
        assert sample(server, "robustfeat_batch_capacity_images") == {'model="robustfeat"': 8}  # with keys
        (build,) = sample(server, "robustfeat_build_info")
        assert f'version="{robustfeat.__version__}"' in build
        (model,) = sample(server, "robustfeat_model_info")
        assert f'config_hash="{builtin_model().config_hash}"' in model
        (head,) = sample(server, "robustfeat_head_info")
        assert f'sha256="{Head.load(clothes).sha256}"' in head
        wait_until(lambda: len(sample(server, "robustfeat_memory_bytes")) == 2)
        told = sum(sample(server, "robustfeat_memory_bytes").values()) / 2**20
        assert told == pytest.approx(anonymous_mib(server.workers()[0]), rel=0.2)
        # What is gone after a reload is not told any more, and a reload that was refused is.
        manifest.write_text("[heads]\n")
        wait_until(lambda: not sample(server, "robustfeat_head_info"))
        assert sample(server, "robustfeat_last_reload_refused") == {"": 0}
        manifest.write_text("[nothing]\n")
        wait_until(lambda: sample(server, "robustfeat_last_reload_refused") == {"": 1})
        assert sample(server, "robustfeat_head_images_total") == {'head="clothes"': 2}


def test_proxies_are_addresses_and_networks() -> None:
    assert parse_proxies("127.0.0.1, ::1,10.0.0.0/8,fd00::/8") == ["127.0.0.1", "::1", "10.0.0.0/8", "fd00::/8"]
    assert (parse_proxies("*"), parse_proxies("")) == (["*"], [])
    for wrong in ("proxy", "10.0.0.1/8", "10.0.0.0/33", "127.0.0.1;::1"):
        with pytest.raises(InputError, match="forwarded_allow_ips: expected addresses and networks"):
            parse_proxies(wrong)
