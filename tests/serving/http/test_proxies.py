"""The server behind nginx and HAProxy, the real ones, as they are configured first and as docs/deploy.md has them."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import socket
import subprocess
import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.command_server import CommandServer
from tests.conftest import ROOT
from tests.serving.http.conftest import Answer, Server

DEPLOY = (ROOT / "docs" / "deploy.md").read_text("utf-8")

FIRST_NGINX = """
upstream features { server 127.0.0.1:PORT; }
server { listen 127.0.0.1:NAMED; location / { proxy_pass http://features; } }
server { listen 127.0.0.1:PLAIN; location / { proxy_pass http://127.0.0.1:PORT; } }
"""
NGINX = """
worker_processes 1;
daemon off;
pid nginx.pid;
error_log stderr;
events { worker_connections 1024; }
http {
    access_log off;
    client_body_temp_path a; proxy_temp_path b; fastcgi_temp_path c; uwsgi_temp_path d; scgi_temp_path e;
    BODY
}
"""
FIRST_HAPROXY = """
defaults
    mode http
    timeout client 30s
    timeout server 30s
    timeout connect 5s
listen checked
    bind 127.0.0.1:PLAIN
    option httpchk
    server one 127.0.0.1:PORT check inter 100
"""


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def ask(port: int, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None) -> Answer:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request(method, path, body, headers or {})
    return Answer(connection.getresponse())


@pytest.fixture(scope="module")
def server(commands: CommandServer) -> Iterator[Server]:
    started = Server("--allowed-host", "features.example", "--log-requests", forked_from=commands)
    yield started
    assert started.stop() == 0


class Proxy:
    """A proxy in the foreground, until it is stopped."""

    def __init__(self, command: list[str], folder: Path, port: int) -> None:
        self.process = subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE)
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                return
            except ConnectionRefusedError:
                time.sleep(0.02)
        self.process.kill()
        raise AssertionError((self.process.stderr.read() if self.process.stderr else b"").decode())

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.communicate()


def nginx(folder: Path, body: str, port: int) -> Proxy:
    program = shutil.which("nginx") or "/usr/sbin/nginx"
    if not Path(program).exists():
        pytest.skip("nginx is not installed")
    user = "user root;" if os.geteuid() == 0 else ""  # whose worker writes bodies to its folder
    (folder / "nginx.conf").write_text(user + NGINX.replace("BODY", body))
    return Proxy([program, "-p", str(folder), "-c", "nginx.conf", "-e", "stderr"], folder, port)


def haproxy(folder: Path, text: str, port: int) -> Proxy:
    program = shutil.which("haproxy") or "/usr/sbin/haproxy"
    if not Path(program).exists():
        pytest.skip("HAProxy is not installed")
    (folder / "haproxy.cfg").write_text(text)
    return Proxy([program, "-db", "-f", "haproxy.cfg"], folder, port)


def block_of(name: str) -> str:
    """A configuration in docs/deploy.md."""
    found = re.search(rf"<!-- {name} -->\n```\w*\n(.*?)```", DEPLOY, re.S)
    assert found, name
    return found[1]


def test_nginx_works_first_or_the_answer_names_the_line(server: Server, photos: list[bytes], tmp_path: Path) -> None:
    named, plain = free_port(), free_port()
    text = FIRST_NGINX.replace("PORT", str(server.port)).replace("NAMED", str(named)).replace("PLAIN", str(plain))
    with nginx(tmp_path, text, plain):
        assert ask(plain, "GET", "/health/ready").status == 200
        assert ask(plain, "POST", "/embed", photos[0]).body == server.post("/embed", photos[0]).body
        refused = ask(named, "GET", "/health/ready")
        assert refused.status == 400
        assert "Host 'features' is not served" in refused.body.decode()
        assert "nginx: proxy_set_header Host $host" in refused.body.decode()


def test_the_documented_nginx_passes_large_bodies_and_the_clients_address(
    server: Server, photos: list[bytes], tmp_path: Path
) -> None:
    port = free_port()
    text = block_of("nginx").replace("127.0.0.1:8000", f"127.0.0.1:{server.port}")
    text = text.replace("listen 80;", f"listen {port};")
    assert str(port) in text
    assert str(server.port) in text
    with nginx(tmp_path, text, port):
        host = {"Host": "features.example"}
        padded = photos[0] + bytes(20 * 2**20)  # over nginx's own limit of 1 MiB
        assert ask(port, "POST", "/embed", padded, host).body == server.post("/embed", photos[0]).body
        too_large = ask(port, "POST", "/embed", bytes(2**25 + 1), host)
        assert too_large.status == 413
        assert "at most 33,554,432 bytes" in too_large.json["error"]["message"]  # ours, not nginx's page
        assert ask(port, "GET", "/features/health/ready", headers=host).status == 200
        (told,) = ask(port, "GET", "/features/openapi.json", headers=host).json["servers"]
        place = urllib.parse.urljoin("/features/openapi.json", told["url"]) + "embed"
        assert ask(port, "POST", place, photos[0], host).status == 200  # as /docs asks
        answer = ask(port, "GET", "/health/ready", headers={**host, "X-Request-ID": "of-the-client"})
        assert answer.headers["x-request-id"] == "of-the-client"
        server.get("/info", **{"X-Forwarded-For": "203.0.113.7", "X-Request-ID": "last"})
        deadline = time.monotonic() + 10
        while not any('"last"' in line for line in list(server.said)) and time.monotonic() < deadline:
            time.sleep(0.01)
        clients = [json.loads(line)["client"] for line in list(server.said) if '"request_id"' in line]
        assert clients[-1] == "203.0.113.7"  # this machine is trusted
        assert set(clients[:-1]) == {"127.0.0.1"}


def test_the_documented_nginx_shows_the_metrics_to_one_network(server: Server, tmp_path: Path) -> None:
    text = block_of("nginx").replace("127.0.0.1:8000", f"127.0.0.1:{server.port}")
    paths = ["/metrics", "/metrics/", "//metrics", "/%6detrics", "/features/metrics", "/features//metrics"]
    for network, expected in ("10.0.0.0/8", {403}), ("127.0.0.0/8", {200}):
        port = free_port()
        written = text.replace("listen 80;", f"listen {port};").replace("10.0.0.0/8", network)
        with nginx(tmp_path, written, port):
            asked = paths if network == "10.0.0.0/8" else paths[:1]
            host = {"Host": "features.example"}
            assert {ask(port, "GET", path, headers=host).status for path in asked} == expected
            assert ask(port, "GET", "/health/ready", headers=host).status == 200


def test_haproxys_own_check_and_the_documented_one_find_the_server(
    server: Server, photos: list[bytes], tmp_path: Path
) -> None:
    first, documented = FIRST_HAPROXY.replace("PORT", "8000"), block_of("haproxy")
    for text in (first, documented):
        port = free_port()
        written = re.sub(r"bind \S+", f"bind 127.0.0.1:{port}", text)
        with haproxy(tmp_path, written.replace("127.0.0.1:8000", f"127.0.0.1:{server.port}"), port):
            time.sleep(1.5)  # several checks
            answer = ask(port, "POST", "/embed", photos[0], {"Host": "features.example"})
            assert answer.status == 200
            assert answer.body == server.post("/embed", photos[0]).body


def test_options_tells_the_methods(server: Server) -> None:
    of_server = "GET, HEAD, OPTIONS, POST"
    known = {"/": of_server, "*": of_server, "/embed": "POST, OPTIONS", "/info": "GET, HEAD, OPTIONS"}
    for path, allowed in known.items():
        answer = server.ask("OPTIONS", path)
        assert (answer.status, answer.headers["allow"], answer.body) == (204, allowed, b"")
        assert "access-control-allow-origin" not in answer.headers
    assert server.ask("OPTIONS", "/nothing").status == 404
