"""/embed and /predict: vectors, errors and limits."""

from __future__ import annotations

import base64
import contextlib
import http.client
import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pillow_heif
import pytest
from PIL import Image

from robustfeat import FeatureExtractor
from robustfeat.serving import Head
from tests.serving.http.conftest import Server, assert_close, serving


def bomb(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def test_a_body_gives_the_vector_of_the_extractor(
    server: Server, photos: list[bytes], extractor: FeatureExtractor
) -> None:
    expected = extractor.embed(photos)
    for photo, row in zip(photos, expected, strict=True):
        answer = server.post("/embed", photo)
        assert answer.status == 200
        found = answer.json
        assert {key: found[key] for key in ("model", "revision", "precision")} == {
            "model": "robustfeat",
            "revision": None,
            "precision": "fp32",
        }
        assert [item["index"] for item in found["data"]] == [0]
        assert_close(found["data"][0]["embedding"], row)


def test_json_gives_back_each_float_exactly(server: Server, photos: list[bytes]) -> None:
    raw = server.post("/embed", photos[0], accept="application/octet-stream")
    text = server.post("/embed", photos[0]).json["data"][0]["embedding"]
    assert np.array(text, np.float32).tobytes() == raw.body


def test_a_form_gives_an_answer_for_each_image_good_or_not(
    server: Server, photos: list[bytes], extractor: FeatureExtractor
) -> None:
    images = [photos[0], b"no image", photos[1], photos[2][:500], photos[3]]
    answer = server.form("/embed", images)
    assert answer.status == 200
    data = answer.json["data"]
    assert [item["index"] for item in data] == [0, 1, 2, 3, 4]
    assert [sorted(item)[0] for item in data] == ["embedding", "error", "embedding", "error", "embedding"]
    assert "not an image of these formats" in data[1]["error"]["message"]
    assert data[3]["error"]["code"] == "unreadable_image"
    found = [data[at]["embedding"] for at in (0, 2, 4)]
    assert_close(found, extractor.embed([photos[0], photos[1], photos[3]]))


def test_any_file_of_a_form_is_an_image_in_order(server: Server, photos: list[bytes]) -> None:
    parts = [
        b'Content-Disposition: form-data; name="model"\r\n\r\nsmall',
        b'Content-Disposition: form-data; name="b"; filename="b.jpg"\r\nContent-Type: image/jpeg\r\n\r\n' + photos[0],
        b'Content-Disposition: form-data; name="images"\r\n\r\n' + photos[1],
    ]
    body = b"".join(b"--x\r\n" + part + b"\r\n" for part in parts) + b"--x--\r\n"
    found = server.post("/embed", body, content_type="multipart/form-data; boundary=x").json
    assert found["model"] == "small"
    for photo, item in zip(photos[:2], found["data"], strict=True):
        alone = server.post("/embed?model=small", photo).json["data"][0]["embedding"]
        assert_close(item["embedding"], alone)


def test_binary_answers_hold_all_rows_and_say_which_failed(
    server: Server, photos: list[bytes], extractor: FeatureExtractor
) -> None:
    images = [photos[0], b"no image", photos[1]]
    npy = server.form("/embed", images, accept="application/x-npy")
    raw = server.form("/embed", images, accept="application/octet-stream")
    found = np.load(io.BytesIO(npy.body))
    np.testing.assert_array_equal(found, np.frombuffer(raw.body, "<f4").reshape(3, 512))
    assert np.isnan(found[1]).all()
    assert_close(found[[0, 2]], extractor.embed(photos[:2]))
    for answer, kind in ((npy, "application/x-npy"), (raw, "application/octet-stream")):
        told = {name: value for name, value in answer.headers.items() if name.startswith("x-robustfeat")}
        assert told == {
            "x-robustfeat-model": "robustfeat",
            "x-robustfeat-precision": "fp32",
            "x-robustfeat-shape": "3,512",
            "x-robustfeat-failed": "1",
        }
        assert answer.headers["content-type"] == kind


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        ("*/*", "application/json"),
        ("application/*;q=0.5, application/x-npy", "application/x-npy"),
        ("text/html, application/octet-stream;q=0.1", "application/octet-stream"),
        ("application/json;q=0, */*", "application/x-npy"),
    ],
)
def test_the_accept_header_chooses(server: Server, photos: list[bytes], accept: str, kind: str) -> None:
    assert server.post("/embed", photos[0], accept=accept).headers["content-type"] == kind


@pytest.mark.parametrize("path", ["/embed", "/v1/embeddings"])
def test_avif_and_heic_get_answers(server: Server, extractor: FeatureExtractor, photos: list[bytes], path: str) -> None:
    image = Image.open(io.BytesIO(photos[0]))
    bodies = [io.BytesIO(), io.BytesIO()]
    image.save(bodies[0], "AVIF")
    pillow_heif.from_pillow(image).save(bodies[1])
    for body in bodies:
        data = body.getvalue()
        if path == "/embed":
            answer = server.post(path, data)
        else:
            uri = f"data:image/heic;base64,{base64.b64encode(data).decode()}"
            answer = server.post(path, {"input": uri, "model": "robustfeat", "encoding_format": "float"})
        assert_close(answer.json["data"][0]["embedding"], extractor.embed([data])[0])


def test_several_models_answer_under_their_names(server: Server, photos: list[bytes], model: Path) -> None:
    found = server.post("/embed?model=small", photos[0]).json
    assert found["model"] == "small"
    assert_close(found["data"][0]["embedding"], FeatureExtractor.from_pretrained(model).embed(photos[:1])[0])


def test_predict_gives_the_answers_of_the_head(
    server: Server, photos: list[bytes], clothes: Path, extractor: FeatureExtractor
) -> None:
    head = Head.load(clothes)
    answer = server.form("/predict/clothes", [photos[0], b"no image", *photos[1:]])
    assert (answer.status, answer.json["head"], answer.json["model"]) == (200, "clothes", "robustfeat")
    data = answer.json["data"]
    assert data.pop(1)["error"]["code"] == "unreadable_image"
    features = extractor.embed(photos)
    margins, usual = head.margins(features), head.typicality(features)
    for row, item in enumerate(data):
        assert item["prediction"] == head.decide(margins)[row]
        assert item["margins"] == pytest.approx(dict(zip(head.classes, margins[row], strict=True)), abs=1e-4)
        assert sum(item["probabilities"].values()) == pytest.approx(1)
        assert item["typicality"] == pytest.approx(usual[row], abs=0.03)  # a neighbour of 40, where bits differ


@pytest.mark.parametrize(
    ("path", "body", "headers", "status", "code", "said"),
    [
        ("/embed", b"no image", {}, 422, "unreadable_image", "no image that can be read"),
        ("/embed", b"", {}, 422, "no_image", "the body is empty"),
        ("/embed", bomb(30_000, 30_000), {}, 422, "unreadable_image", "over the limit of 100,000,000 pixels"),
        ("/embed?model=big", b"x", {}, 404, "model_not_found", "there is robustfeat, small"),
        ("/predict/shoes", b"x", {}, 404, "head_not_found", "there is clothes"),
        ("/predict/clothes", b"no image", {}, 422, "unreadable_image", "no image that can be read"),
        ("/nothing", b"x", {}, 404, "not_found", "/nothing is not served"),
        ("/health/live", b"x", {}, 405, "method_not_allowed", "takes GET; got POST"),
        ("/embed", b"x", {"accept": "image/png"}, 406, "not_acceptable", "application/x-npy"),
        ("/embed", b"x", {"content_encoding": "gzip"}, 415, "content_encoding", "send the body as it is"),
        ("/embed", b"x", {"content_type": "multipart/form-data"}, 400, "bad_multipart", "without a boundary"),
        ("/embed", b"x", {"content_type": "multipart/form-data; boundary=y"}, 400, "bad_multipart", "cannot be read"),
        (
            "/embed",
            b"x",
            {"content_type": f"multipart/form-data; boundary={'y' * 300}"},
            400,
            "bad_multipart",
            "cannot be read",
        ),
        ("/embed", b"x" * (33 * 2**20), {}, 413, "body_too_large", "at most 33,554,432 bytes"),
        ("/embed", b"x", {"host": "elsewhere.example"}, 400, "host", "--allowed-host"),
    ],
)
def test_what_cannot_be_served_gets_its_code_and_one_sentence(
    server: Server, path: str, body: bytes, headers: dict[str, str], status: int, code: str, said: str
) -> None:
    try:
        answer = server.post(path, body, **headers)
    except (BrokenPipeError, ConnectionResetError):
        assert status == 413  # it hung up while the body was still on its way
        return
    assert answer.status == status
    assert answer.headers["content-type"] == "application/json"
    error = answer.json["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == code
    assert said in error["message"]
    assert "\n" not in error["message"]
    assert answer.headers["x-request-id"]


def test_too_many_images_are_refused(server: Server, photos: list[bytes]) -> None:
    answer = server.form("/embed", [b"x"] * 10_000)
    assert (answer.status, answer.json["error"]["code"]) == (413, "too_many_images")
    assert "more than 64 images" in answer.json["error"]["message"]
    assert server.form("/embed", [photos[0]] * 64).status == 200


def test_where_no_image_of_many_is_good_each_has_its_reason(server: Server) -> None:
    answer = server.form("/embed", [b"a", b""])
    assert answer.status == 422
    assert [item["index"] for item in answer.json["data"]] == [0, 1]
    assert "the file is empty" in answer.json["data"][1]["error"]["message"]


def test_limits_are_set_by_options(photos: list[bytes]) -> None:
    large = io.BytesIO()
    Image.new("RGB", (200, 200)).save(large, "PNG")
    with serving("--max-pixels", 39_999, "--max-items", 2, "--max-body", 0.05, "--max-queue", 2) as small:
        answer = small.post("/embed", large.getvalue())
        assert (answer.status, "39,999 pixels" in answer.json["error"]["message"]) == (422, True)
        assert small.form("/embed", [b"x"] * 3).json["error"]["code"] == "too_many_images"
        assert small.post("/embed", bytes(60_000)).status == 413
        limits = small.get("/info").json["limits"]
        assert (limits["pixels"], limits["items"], limits["body_bytes"]) == (39_999, 2, 52_428)


def test_the_default_limit_of_pixels_is_that_of_embed(server: Server) -> None:
    from robustfeat.hub.preprocessing import MAX_PIXELS

    assert server.get("/info").json["limits"]["pixels"] == MAX_PIXELS


def test_a_request_id_is_kept_or_made(server: Server, photos: list[bytes]) -> None:
    assert server.post("/embed", photos[0], x_request_id="mine-1").headers["x-request-id"] == "mine-1"
    made = [server.post("/embed", photos[0], x_request_id="a b").headers["x-request-id"] for _ in range(2)]
    assert len(set(made)) == 2
    assert "a b" not in made


def test_it_lives_is_ready_and_describes_itself(server: Server, extractor: FeatureExtractor) -> None:
    assert server.get("/health/live").json == {"status": "live"}
    assert server.get("/health/ready").json == {"status": "ready"}
    info = server.get("/info").json
    assert [model["name"] for model in info["models"]] == ["robustfeat", "small"]
    assert info["models"][0]["config_hash"] == extractor.folder.config_hash
    assert info["models"][0]["weights_sha256"] == extractor.config.files["model.safetensors"]
    assert info["heads"][0]["name"] == "clothes"


def test_head_is_get_without_its_body(server: Server) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    with contextlib.closing(connection):
        for path, status in (("/health/live", 200), ("/health/ready", 200), ("/v2/health/ready", 200), ("/docs", 200),
                             ("/nothing", 404), ("/embed", 405)):  # fmt: skip
            heads = []
            for method in ("HEAD", "GET"):  # on one connection: a body too many would be read as an answer
                connection.request(method, path)
                answer = connection.getresponse()
                heads.append((answer.status, answer.getheader("content-type"), answer.getheader("content-length")))
                assert bool(answer.read()) == (method == "GET")
            assert heads[0][:2] == heads[1][:2]
            assert status != 200 or heads[0] == heads[1]  # errors name the method, in so many letters
            assert heads[0][0] == status


def test_metrics_count_requests_images_and_reasons(server: Server, photos: list[bytes]) -> None:
    names = ("robustfeat_images_total", "robustfeat_requests_total", "robustfeat_errors_total")
    before = [server.metric(name) for name in names]
    server.form("/embed", [photos[0], b"no image", photos[1]])
    server.get("/nothing")
    images, requests, errors = (server.metric(name) - old for name, old in zip(names, before, strict=True))
    assert (images, errors) == (3, 2)
    assert requests >= 2
    text = server.get("/metrics").body.decode()
    for name in ("queue_seconds", "decode_seconds", "model_seconds", "batch_images", "request_seconds"):
        assert f"robustfeat_{name}_bucket" in text
    assert 'robustfeat_queue_images{model="robustfeat"} 0.0' in text
    assert "/nothing" not in text
