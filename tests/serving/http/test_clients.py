"""The request forms of common clients, proxies and probes, byte for byte as they send them."""

from __future__ import annotations

import base64
import http.client
import json
import socket
from typing import Any

import pytest

from robustfeat.serving.http.bodies import images_of
from robustfeat.serving.online.content import base64_bytes, data_of_uri
from tests.serving.http.conftest import Server, serving

IMAGE = bytes(range(256)) * 3 + b"\r\n--bound\r\n"
"""Not an image: these tests compare bytes."""


def part(head: bytes, end: bytes = b"--bound--\r\n") -> bytes:
    return b"--bound\r\n" + head + b"\r\n\r\n" + IMAGE + b"\r\n" + end


@pytest.mark.parametrize(
    "head",
    [
        b'Content-Disposition: form-data; name="images"; filename="hat.jpg"\r\nContent-Type: image/jpeg',  # curl, fetch
        b'Content-Disposition: form-data; name="images"; filename="hat.jpg"',  # requests
        b'Content-Disposition: form-data; name="images[]"; filename="hat.jpg"\r\nContent-Type: image/jpeg',  # jQuery
        b'Content-Disposition: form-data; name="images[]"\r\nContent-Length: 779',  # Guzzle, of contents
        b"Content-Type: image/jpeg\r\nContent-Disposition: form-data; name=images; filename=hat.jpg; "
        b"filename*=utf-8''hat.jpg",  # .NET
        b"Content-Disposition: form-data; name=file",  # .NET, of an array of bytes
        b"Content-Disposition: form-data; name=\"upload\"; filename*=UTF-8''%E5%B8%BD.jpg",  # aiohttp, Java
        b"content-disposition: Form-Data; Name=\"upload\"; FILENAME*=utf-8''a.jpg",
        b'Content-Disposition: form-data; name="image"\r\nContent-Type: application/octet-stream\r\n'
        b"Content-Transfer-Encoding: binary\r\nContent-Length: 779",  # OkHttp, Apache HttpClient
        b'Content-Disposition: form-data; name="upload"\r\nContent-Type: image/png',  # Go, by CreatePart
        b'Content-Disposition: form-data; name="files"; filename=""\r\nContent-Type: application/octet-stream',
        b'Content-Disposition: form-data; filename="hat.jpg"',
        b'Content-Disposition: form-data; name="f"; filename="C:\\x\\\xe5\xb8\xbd.jpg"',
    ],
    ids=range(13),
)
@pytest.mark.parametrize("boundary", [b"bound", b'"bound"', b"bound; charset=utf-8"])
def test_a_part_that_is_a_file_is_an_image(head: bytes, boundary: bytes) -> None:
    image = IMAGE.replace(b"--bound", b"")
    body = part(head).replace(IMAGE, image) + b"epilogue"
    text = b'--bound\r\nContent-Disposition: form-data; name="model"\r\nContent-Type: text/plain\r\n\r\nsmall\r\n'
    images, fields = images_of(f"Multipart/Form-Data; boundary={boundary.decode()}", text + body, 64)
    assert images == [image]
    assert fields == {"model": "small"}


@pytest.mark.parametrize("data", [b"", b"a", b"ab", b"abc", bytes(range(256)) * 9, b"\xfb\xff\xfe" * 40])
def test_base64_is_read_in_every_form_that_it_has(data: bytes) -> None:
    plain = base64.b64encode(data).decode()
    forms = [
        plain,
        base64.encodebytes(data).decode(),
        plain + "\n",
        "\r\n".join(plain[at : at + 64] for at in range(0, len(plain), 64)),
        plain.rstrip("="),
        base64.urlsafe_b64encode(data).decode(),
        base64.urlsafe_b64encode(data).decode().rstrip("="),
    ]
    assert [base64_bytes(form) for form in forms] == [data] * len(forms)
    escaped = plain.replace("+", "%2B").replace("/", "%2f").replace("=", "%3D")
    assert data_of_uri(f"data:image/jpeg;charset=utf-8;base64,{escaped}") == data


@pytest.mark.parametrize("text", ["a", "abcde", "ab=c", "a===", "ab*d", "abcdé", "abc%3", "ab=\n=c"])
def test_what_is_not_base64_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not base64"):
        base64_bytes(text)


def ask(server: Server, said: bytes) -> tuple[int, bytes]:
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as client:
        client.sendall(said)
        answer = http.client.HTTPResponse(client, method=said.split()[0].decode())
        answer.begin()
        while answer.status == 100:
            answer = http.client.HTTPResponse(client)
            answer.begin()
        return answer.status, answer.read()


@pytest.mark.parametrize(
    "head",
    [
        b"OPTIONS / HTTP/1.0",  # HAProxy, option httpchk
        b"GET /health/ready HTTP/1.0",  # HAProxy
        b"HEAD /health/live HTTP/1.0",
        b"GET /metrics HTTP/1.0\r\nConnection: close",
        b"GET /health/ready HTTP/1.0\r\nHost: 10.0.0.5:8000",  # nginx, of an upstream's address
        b"GET /health/ready HTTP/1.1\r\nHost: 10.1.2.3:8000\r\nUser-Agent: kube-probe/1.30\r\nAccept: */*",
        b"GET /health/ready HTTP/1.1\r\nHost: 10.0.0.5\r\nUser-Agent: ELB-HealthChecker/2.0\r\nConnection: close",
        b"GET /health/ready HTTP/1.1\r\nHost: [fd00::5]:8000\r\nUser-Agent: Consul Health Check",
        b"GET http://127.0.0.1/health/live HTTP/1.1\r\nHost: 127.0.0.1\r\nProxy-Connection: keep-alive",
        b"GET /info HTTP/1.1\r\nHost: LOCALHOST.\r\nConnection: Upgrade\r\nUPGRADE: websocket",
    ],
    ids=range(10),
)
def test_probes_are_answered(server: Server, head: bytes) -> None:
    status, body = ask(server, head + b"\r\n\r\n")
    assert status == (204 if head.startswith(b"OPTIONS") else 200)
    assert body or head.startswith((b"HEAD", b"OPTIONS"))


@pytest.mark.parametrize(
    "head",
    [
        b"",
        b"Content-Type: application/x-www-form-urlencoded",  # curl --data-binary
        b"Content-Type: application/json",  # a client's default
        b"Content-Type: image/jpeg\r\nExpect: 100-continue",  # .NET, curl above 1 MiB
        b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABk",  # Java
        b"X-Forwarded-For: 1.2.3.4\r\nX-Forwarded-Host: a.example\r\nForwarded: for=1.2.3.4",
        b"X-Envoy-Expected-Rq-Timeout-Ms: 15000\r\nX-Request-Id: 0123\r\nTE: trailers",  # Envoy
        b"Accept: application/json, text/plain, */*\r\nAccept-Encoding: gzip, deflate, br, zstd",  # axios
        b"Accept: text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8\r\nContent-Encoding: identity",
    ],
    ids=range(9),
)
@pytest.mark.parametrize("version", [b"1.0", b"1.1"])
@pytest.mark.parametrize("chunked", [False, True])
def test_an_image_is_taken_however_it_comes(
    server: Server, photos: list[bytes], head: bytes, version: bytes, chunked: bool
) -> None:
    if chunked and version == b"1.0":
        return
    image = photos[0]
    length = b"Transfer-Encoding: chunked" if chunked else b"Content-Length: %d" % len(image)
    lines = [b"POST /embed HTTP/%s" % version, b"Host: 127.0.0.1:8000", length, *([head] if head else []), b"", b""]
    body = b"%x\r\n%s\r\n0\r\n\r\n" % (len(image), image) if chunked else image
    assert ask(server, b"\r\n".join(lines) + body)[0] == 200


def test_a_request_has_one_host(server: Server) -> None:
    status, body = ask(server, b"GET /info HTTP/1.1\r\nHost: a.example\r\nHost: localhost\r\n\r\n")
    assert (status, json.loads(body)["error"]["code"]) == (400, "host")
    assert ask(server, b"GET /info HTTP/1.1\r\n\r\n")[0] == 400


@pytest.mark.parametrize(
    "body", [b'{"image": "aGF0"}', b' [{"b64": "aGF0"}]', b'"aGF0"', b"data:image/png;base64,aGF0"]
)
def test_json_in_place_of_an_image_is_told_where_to_go(server: Server, body: bytes) -> None:
    for kind in ("application/json", "application/octet-stream"):
        answer = server.post("/embed", body, content_type=kind)
        assert (answer.status, answer.json["error"]["code"]) == (422, "unreadable_image")
        assert "JSON to /v1/embeddings" in answer.json["error"]["message"]


@pytest.mark.parametrize(
    "more",
    [
        {"encoding_format": None, "dimensions": None, "user": None, "model": None},  # LiteLLM, Dify
        {"encoding_format": "float", "input_type": "image", "truncate": "END", "modality": None},
        {"encoding_format": "base64", "extra_body": {}, "dimensions": 512},
    ],
)
def test_fields_that_are_null_or_unknown_count_as_left_out(
    server: Server, photos: list[bytes], more: dict[str, Any]
) -> None:
    text = base64.b64encode(photos[0]).decode()
    answer = server.post("/v1/embeddings", {"input": f"data:image/jpeg;base64,{text}", **more})
    assert answer.status == 200
    assert isinstance(answer.json["data"][0]["embedding"], str) == (more["encoding_format"] == "base64")
    given = {"name": "images", "datatype": "BYTES", "shape": [1], "data": [text], "parameters": None}
    request = {"id": None, "parameters": None, "outputs": None, "inputs": [given]}
    assert server.post("/v2/models/robustfeat/infer", request).status == 200
    request["outputs"] = [{"name": "features", "parameters": None}]
    assert server.post("/v2/models/robustfeat/infer", request).status == 200


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="the system has no IPv6")
def test_every_address_is_of_both_families_and_deserves_a_word(tmp_path_factory: pytest.TempPathFactory) -> None:
    with serving("--host", "::") as server:
        assert server.get("/health/live").status == 200  # by IPv4
        with socket.create_connection(("::1", server.port), timeout=20) as client:
            client.sendall(b"GET /health/live HTTP/1.1\r\nHost: [::1]\r\n\r\n")
            assert client.recv(4096).startswith(b"HTTP/1.1 200 ")
    assert any("--keys FILE restricts it" in line for line in server.said)
