"""Whatever a body of the largest size holds, taking it apart takes less than a second."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable

import pytest

from robustfeat import FeatureExtractor
from robustfeat.serving.http.bodies import images_of
from robustfeat.serving.http.openai import _parse
from robustfeat.serving.online.answers import JSON, NamedModel, choose_type
from robustfeat.serving.online.content import data_of_uri
from robustfeat.serving.online.errors import ApiError
from robustfeat.serving.online.infer import infer_images, parse_infer
from tests import built_in

SIZE = 32 * 2**20
MOST = 64

Build = Callable[[], bytes]


def refusal(take: Callable[[], object]) -> ApiError | None:
    """How a body is refused, within a second of processor time."""
    began, error = time.process_time(), None
    try:
        take()
    except ApiError as exc:
        error = exc
    assert time.process_time() - began < 1
    return error


def filled(head: bytes, unit: bytes, tail: bytes) -> bytes:
    return head + unit * ((SIZE - len(head) - len(tail)) // len(unit)) + tail


FILE = b'--cut\r\nContent-Disposition: form-data; name="images"; filename="a"\r\n\r\n'
NAMED = b'--cut\r\nContent-Disposition: form-data; name="model"\r\n\r\n\r\n'
END = b"\r\n--cut--\r\n"


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (lambda: filled(b"", b"--cut\r\n\r\n\r\n", END), 400),
        (lambda: filled(b"", b"--cut\r\n\r\n", END), 400),
        (lambda: filled(b"", NAMED, END), 400),
        (lambda: filled(FILE, b"\r\n--cutx", END), 400),
        (lambda: NAMED * 9000 + END[2:], 422),
        (lambda: b"--cut\r\n\r\n\r\n" * 9000 + END[2:], 422),
        (lambda: FILE * 3 + (b"--cut\r\n" + b"a:" + b"b" * 4000 + b"\r\n\r\n\r\n") * 8000 + END[2:], 422),
        (lambda: filled(FILE, b"\r", END), None),
        (lambda: filled(FILE, b"\r\n--cu", END), None),
        (lambda: filled(FILE, b"-", END), None),
        (lambda: b"".join(FILE + b"x\r\n" for _ in range(MOST)) + END[2:], None),
    ],
    ids=range(11),
)
def test_forms_are_taken_apart_in_bounded_time(body: Build, status: int | None) -> None:
    data = body()
    error = refusal(lambda: images_of("multipart/form-data; boundary=cut", data, MOST))
    assert (error.status if error else None) == status


@pytest.mark.parametrize(
    ("kind", "head"),
    [
        ("image/jpeg" + ";" * 60_000, b""),
        ("multipart/form-data; boundary=cut" + ";" * 60_000, b""),
        ('multipart/form-data; boundary=cut; x="' + ";" * 60_000, b""),
        ("multipart/form-data; boundary=cut", b"Content-Disposition: " + b"; " * 2000),
        ("multipart/form-data; boundary=cut", b"Content-Disposition: form-data" + b"; filename*" * 290),
        ("multipart/form-data; boundary=cut", b'Content-Disposition: form-data; name="' + b";" * 290 + b'"'),
    ],
    ids=range(6),
)
def test_headers_are_taken_apart_in_bounded_time(kind: str, head: bytes) -> None:
    body = (b"--cut\r\n" + head + b"\r\n\r\n\r\n") * MOST + END[2:]
    began = time.process_time()
    refusal(lambda: images_of(kind, body, MOST))
    assert time.process_time() - began < 0.1


def test_an_accept_header_is_read_in_bounded_time() -> None:
    began = time.process_time()
    refusal(lambda: choose_type("a;q=1," * 10_000, (JSON,)))
    assert time.process_time() - began < 0.02


@pytest.mark.parametrize("unit", ["%", "%2B", "\n", "=", "A", "-", "a,", "\u00e9"])
def test_data_uris_are_read_in_bounded_time(unit: str) -> None:
    text = "data:;base64," + unit * (SIZE // len(unit))
    began = time.process_time()
    with contextlib.suppress(ValueError):
        data_of_uri(text)
    assert time.process_time() - began < 1


def given(name: str, kind: str, shape: str, unit: bytes) -> Build:
    head = f'{{"inputs":[{{"name":"{name}","datatype":"{kind}","shape":{shape},"data":['.encode()
    return lambda: filled(head + unit, b"," + unit, b"]}]}")


BINARY = json.dumps(
    {
        "inputs": [
            {"name": "images", "datatype": "BYTES", "shape": [1], "parameters": {"binary_data_size": SIZE - 2**10}}
        ]
    }
).encode()


@pytest.mark.parametrize(
    ("body", "head", "said"),
    [
        (given("images", "BYTES", "[1]", b'""'), None, "values"),
        (given("images", "BYTES", "[1]", b'"%s"' % (b"A" * 40)), None, "the shape promises 1, there are"),
        (given("pixel_values", "FP32", str(built_in.SHAPE), b'""'), None, "values"),
        (given("pixel_values", "FP32", str(built_in.SHAPE), b"0"), None, f"{built_in.COUNT:,} numbers"),
        (given("pixel_values", "FP32", str(built_in.SHAPE), b"1e9"), None, f"{built_in.COUNT:,} numbers"),
        (given("pixel_values", "FP32", str(built_in.SHAPE), b"[]"), None, f"{built_in.COUNT:,} numbers"),
        (given("pixel_values", "FP32", str(built_in.SHAPE), b" "), None, f"{built_in.COUNT:,} numbers"),
        (given("images", "BYTES", "[1]", b"0"), None, "images[0]: expected base64 text"),
        (lambda: filled(b'{"data":[0', b',"data":[0', b"]}"), None, "lists and objects"),
        (lambda: filled(b'{"data":', b" ", b"[0]}"), None, "inputs: Field required"),
        (lambda: filled(b'{"parameters":{"data":[0', b",0", b"]}}"), None, "inputs: Field required"),
        (lambda: filled(b'{"inputs":[],', b'"":0,', b'"a":0}'), None, "values"),
        (lambda: filled(b'{"inputs":[{"shape":[1', b",1", b"]}]}"), None, "values"),
        (lambda: BINARY + bytes(SIZE - 2**10), len(BINARY), "images has more than 64 images"),
    ],
    ids=range(14),
)
def test_requests_of_the_inference_protocol_are_taken_apart_in_bounded_time(
    extractor: FeatureExtractor, body: Build, head: int | None, said: str
) -> None:
    data, model = body(), NamedModel("robustfeat", extractor)

    def take() -> object:
        asked, rest = parse_infer(data, None if head is None else str(head))
        return infer_images(asked.inputs[0], rest, model, MOST)

    error = refusal(take)
    assert error is not None
    assert said in error.message


@pytest.mark.parametrize("unit", [b'""', b"0", b"{}", b'"":0'], ids=range(4))
def test_requests_of_openai_are_taken_apart_in_bounded_time(unit: bytes) -> None:
    opening, closing = (b'{"input":{', b"}}") if b":" in unit else (b'{"input":[', b"]}")
    data = filled(opening + unit, b"," + unit, closing)
    error = refusal(lambda: _parse(data, MOST))
    assert error is not None
    assert error.status == 422
