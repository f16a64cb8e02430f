"""The files of the pages: how they are served, and that they need nothing else."""

from __future__ import annotations

import gzip
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import robustfeat
from tests.serving.http.conftest import Server, serving

HERE = Path(robustfeat.__file__).parent / "serving" / "http"
PAGE, SWAGGER = HERE / "page", HERE / "swagger"
FILES = ["/", "/docs", *(f"/page/{file.name}" for file in PAGE.iterdir() if file.name != "index.html")]
FILES += [f"/docs/{name}" for name in ("start.js", "swagger-ui.css", "swagger-ui-bundle.js")]


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text("one some-key-or-other\n")
    with serving("--keys", keys) as server:
        yield server


@pytest.mark.parametrize("path", FILES)
def test_a_file_needs_no_key_and_is_asked_for_once(keyed: Server, path: str) -> None:
    answer = keyed.get(path)
    assert answer.status == 200
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["cache-control"] == "no-cache"
    again = keyed.get(path, **{"if-none-match": f'"other", {answer.headers["etag"]}'})
    assert (again.status, again.body) == (304, b"")
    assert again.headers["etag"] == answer.headers["etag"]
    assert keyed.get(path, **{"if-none-match": '"other"'}).status == 200
    assert keyed.ask("HEAD", path).headers["etag"] == answer.headers["etag"]


@pytest.mark.parametrize("path", FILES)
def test_the_policy_admits_only_this_server(keyed: Server, path: str) -> None:
    policy = dict(
        part.strip().partition(" ")[::2] for part in keyed.get(path).headers["content-security-policy"].split(";")
    )
    assert policy["default-src"] == policy["base-uri"] == policy["form-action"] == policy["frame-ancestors"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert policy["img-src"] == "'self' blob: data:"
    if not path.startswith("/docs"):
        assert policy["require-trusted-types-for"] == "'script'"


def test_the_page_names_no_other_host_and_holds_no_script_or_style() -> None:
    for file in PAGE.iterdir():
        text = file.read_text("utf-8")
        assert not re.findall(r"https?://(?!www\.w3\.org/2000/svg)\S+", text), file
    index = (PAGE / "index.html").read_text("utf-8")
    assert not re.findall(r"<style|\sstyle=|\son\w+=|<script(?![^>]* src=)", index)
    scripts = "".join(file.read_text("utf-8") for file in PAGE.glob("*.js"))
    assert not re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", scripts)


def test_compressed_files_are_those_of_swagger_ui(keyed: Server) -> None:
    told = dict(re.findall(r"\| `([\w.-]+)` \| `([0-9a-f]{64})` \|", (SWAGGER / "README.md").read_text("utf-8")))
    assert len(told) == 2
    for name, digest in told.items():
        plain = keyed.get(f"/docs/{name}")
        assert "content-encoding" not in plain.headers
        assert hashlib.sha256(plain.body).hexdigest() == digest
        small = keyed.get(f"/docs/{name}", **{"accept-encoding": "br, gzip;q=0.5"})
        assert small.headers["content-encoding"] == "gzip"
        assert gzip.decompress(small.body) == plain.body
        assert "content-encoding" not in keyed.get(f"/docs/{name}", **{"accept-encoding": "gzip;q=0"}).headers


@pytest.mark.parametrize(
    "path", ["/page/", "/page/none.js", "/page/..%2Fapp.py", "/page/%2e%2e/app.py", "/docs/README.md"]
)
def test_other_files_are_not_served(keyed: Server, path: str) -> None:
    assert keyed.get(path).status == 404


def test_a_server_without_the_page_has_its_documentation_only() -> None:
    with serving("--no-page") as server:
        assert {path: server.get(path).status for path in ("/", "/page/app.js", "/docs", "/openapi.json")} == {
            "/": 404,
            "/page/app.js": 404,
            "/docs": 200,
            "/openapi.json": 200,
        }
        assert server.post("/teach", {}).status == 404
        assert "/teach" not in server.get("/openapi.json").json["paths"]
