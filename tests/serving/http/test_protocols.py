"""/v1 and /v2, asked by the clients that people use."""

from __future__ import annotations

import base64
import json
import struct
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import tritonclient.http as triton

from robustfeat import FeatureExtractor
from robustfeat.hub.preprocessing import normalise
from tests import built_in
from tests.serving.http.conftest import Answer, Server, assert_close, serving

if TYPE_CHECKING:
    import openai  # a second of a core, which each worker would need


def uri(photo: bytes) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(photo).decode()


@pytest.fixture
def client(server: Server) -> openai.OpenAI:
    import openai

    return openai.OpenAI(base_url=f"{server.address}/v1", api_key="none", max_retries=0)


@pytest.mark.parametrize("form", ["default", "float", "base64"])
def test_the_openai_client_gets_the_vectors(
    client: openai.OpenAI, photos: list[bytes], extractor: FeatureExtractor, form: str
) -> None:
    options: dict[str, Any] = {} if form == "default" else {"encoding_format": form}
    answer = client.embeddings.create(model="robustfeat", input=[uri(photo) for photo in photos], **options)
    assert [entry.index for entry in answer.data] == list(range(len(photos)))
    rows: list[Any] = [entry.embedding for entry in answer.data]
    if form == "base64":
        rows = [np.frombuffer(base64.b64decode(row), "<f4") for row in rows]
    assert_close(rows, extractor.embed(photos))
    assert answer.model == "robustfeat"


def test_the_openai_client_lists_the_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["robustfeat", "small"]


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ({"input": ["GOOD", "data:image/jpeg;base64,bm8gaW1hZ2U="]}, 422, "input[1]: not an image of these formats"),
        ({"input": ["GOOD", "https://example.com/a.jpg"]}, 422, "input[1]: URLs are not fetched"),
        ({"input": "data:image/png,abc"}, 422, "input[0]: the data URI must be base64"),
        ({"input": "data:image/png;base64,a"}, 422, "input[0]: not base64"),
        ({"input": "a photo"}, 422, "input[0]: expected a data URI"),
        ({"input": []}, 422, "input is empty"),
        ({"input": 5}, 422, "input"),
        ({"input": ["GOOD", 5]}, 422, "input[1]: expected a data URI"),
        ({"input": [1] * 1_000_000}, 413, "1,000,000 images; send at most 64"),
        ({"input": [[]] * 200_000}, 422, "more than 100,000 lists"),
        ([], 422, "the request"),
        ({}, 422, "input: Field required"),
        ({"input": ["GOOD"] * 65}, 413, "65 images; send at most 64"),
        ({"input": "GOOD", "model": "gpt"}, 404, "there is robustfeat, small"),
        ({"input": "GOOD", "dimensions": 64}, 422, "the model gives 512 dimensions"),
        ({"input": "GOOD", "encoding_format": "hex"}, 422, "encoding_format"),
    ],
)
def test_what_the_openai_endpoint_refuses(
    server: Server, photos: list[bytes], body: Any, status: int, said: str
) -> None:
    filled = json.loads(json.dumps(body).replace("GOOD", uri(photos[0])))
    answer = server.post("/v1/embeddings", filled)
    assert answer.status == status
    assert said in answer.json["error"]["message"]


@pytest.mark.parametrize("body", [b"{", b"", b"\xff", b"[" * 100_000])
def test_what_is_not_json_is_400(server: Server, body: bytes) -> None:
    for path in ("/v1/embeddings", "/v2/models/robustfeat/infer"):
        answer = server.post(path, body)
        assert answer.status == 400
        assert "not JSON" in str(answer.json["error"])


@pytest.fixture
def tritons(server: Server) -> triton.InferenceServerClient:
    return triton.InferenceServerClient(f"127.0.0.1:{server.port}")


def test_tritonclient_reads_the_metadata(server: Server, tritons: triton.InferenceServerClient) -> None:
    assert tritons.is_server_live()
    assert tritons.is_server_ready()
    assert tritons.is_model_ready("robustfeat")
    assert tritons.get_server_metadata()["extensions"] == ["binary_tensor_data"]
    about = tritons.get_model_metadata("robustfeat")
    assert [entry["name"] for entry in about["inputs"]] == ["images", "pixel_values"]
    assert about["outputs"] == [{"name": "features", "datatype": "FP32", "shape": [-1, 512]}]
    (version,) = about["versions"]
    assert tritons.is_model_ready("robustfeat", version)
    assert tritons.get_model_metadata("robustfeat", version) == about
    with pytest.raises(triton.InferenceServerException, match="no version"):
        tritons.get_model_metadata("robustfeat", "7")
    with pytest.raises(triton.InferenceServerException, match="no model 'other' is served"):
        tritons.get_model_metadata("other")


@pytest.mark.parametrize("binary_in", [True, False])
@pytest.mark.parametrize("binary_out", [True, False])
def test_tritonclient_gets_the_vectors_of_images(
    tritons: triton.InferenceServerClient,
    photos: list[bytes],
    extractor: FeatureExtractor,
    binary_in: bool,
    binary_out: bool,
) -> None:
    given = triton.InferInput("images", [len(photos)], "BYTES")
    encoded = photos if binary_in else [base64.b64encode(photo) for photo in photos]
    given.set_data_from_numpy(np.array(encoded, object), binary_data=binary_in)
    wanted = triton.InferRequestedOutput("features", binary_data=binary_out)
    answer = tritons.infer("robustfeat", [given], outputs=[wanted], request_id="mine")
    assert_close(answer.as_numpy("features"), extractor.embed(photos))
    response = answer.get_response()
    assert (response["id"], response["model_name"]) == ("mine", "robustfeat")
    assert response["parameters"]["precision"] == "fp32"


@pytest.mark.parametrize("binary", [True, False])
def test_tritonclient_gets_the_vectors_of_prepared_tensors(
    tritons: triton.InferenceServerClient, photos: list[bytes], extractor: FeatureExtractor, binary: bool
) -> None:
    squares = np.stack([extractor.prepare(photo) for photo in photos])
    values = normalise(squares, extractor.config.preprocessing)
    given = triton.InferInput("pixel_values", list(values.shape), "FP32")
    given.set_data_from_numpy(values, binary_data=binary)
    found = tritons.infer("robustfeat", [given]).as_numpy("features")
    assert_close(found, extractor.embed(photos))


def infer(server: Server, given: dict[str, Any], rest: bytes = b"", **more: Any) -> Answer:
    head = json.dumps({"inputs": [given], **more}).encode()
    headers = {"inference_header_content_length": str(len(head))} if rest else {}
    return server.post("/v2/models/robustfeat/infer", head + rest, **headers)


NUMBERS = {"name": "pixel_values", "datatype": "FP32", "shape": built_in.SHAPE}
IMAGES = {"name": "images", "datatype": "BYTES"}


@pytest.mark.parametrize(
    ("given", "rest", "status", "said"),
    [
        ({**IMAGES, "shape": [2], "data": ["GOOD", "bm8gaW1hZ2U="]}, b"", 422, "images[1]: not an image"),
        ({**IMAGES, "shape": [1], "data": ["*"]}, b"", 422, "images[0]: not base64"),
        ({**IMAGES, "shape": [1], "data": [5]}, b"", 422, "images[0]: expected base64 text"),
        ({**IMAGES, "shape": [2], "data": [["GOOD"], 5]}, b"", 422, "images[1]: expected base64 text"),
        ({**IMAGES, "shape": [2], "data": ["GOOD"]}, b"", 422, "the shape promises 2, there are 1"),
        ({**IMAGES, "shape": [0], "data": []}, b"", 422, "the shape [0] holds nothing"),
        ({**IMAGES, "shape": [-1], "data": ["GOOD"]}, b"", 422, "the shape [-1] holds nothing"),
        ({**IMAGES, "shape": [2**40, 2**40], "data": ["GOOD"]}, b"", 413, "send at most 64"),
        ({**IMAGES, "shape": [1]}, b"", 422, "neither data nor binary_data_size"),
        ({**IMAGES, "shape": [1], "parameters": {"binary_data_size": 9}}, b"abc", 422, "3 bytes follow"),
        ({**IMAGES, "shape": [1], "parameters": {"binary_data_size": 3}}, b"abc", 422, "ends before its length"),
        (
            {**IMAGES, "shape": [1], "parameters": {"binary_data_size": 7}},
            struct.pack("<I", 9) + b"abc",
            422,
            "images[0]: ends before its length",
        ),
        ({**IMAGES, "datatype": "FP32", "shape": [1], "data": [1]}, b"", 422, "images must be BYTES; got FP32"),
        (
            {**NUMBERS, "shape": [1, 3, 32, 32], "data": [0]},
            b"",
            422,
            f"must be (n, 3, {built_in.SIDE}, ",
        ),
        ({**NUMBERS, "data": [0, 1]}, b"", 422, f"{built_in.COUNT:,} numbers"),
        ({**NUMBERS, "data": ["a"] * built_in.COUNT}, b"", 422, f"{built_in.COUNT:,} numbers"),
        ({**NUMBERS, "data": [None] * built_in.COUNT}, b"", 422, f"{built_in.COUNT:,} numbers"),
        ({**NUMBERS, "data": ["1.5"] * built_in.COUNT}, b"", 422, f"{built_in.COUNT:,} numbers"),
        ({**NUMBERS, "data": [True] * built_in.COUNT}, b"", 422, f"{built_in.COUNT:,} numbers"),
        ({**NUMBERS, "data": [[[0]]] * built_in.COUNT}, b"", 422, f"{built_in.COUNT:,} numbers"),
        ({**NUMBERS, "data": [1e39] * built_in.COUNT}, b"", 422, "pixel_values[0]: not finite"),
        ({**NUMBERS, "data": [3e38] * built_in.COUNT}, b"", 422, "pixel_values[0]: its features are not finite"),
        ({**NUMBERS, "parameters": {"binary_data_size": 8}}, bytes(8), 422, f"{4 * built_in.COUNT:,} bytes"),
        (
            {**NUMBERS, "parameters": {"binary_data_size": 4 * built_in.COUNT}},
            np.full(built_in.COUNT, np.inf, "<f4").tobytes(),
            422,
            "pixel_values[0]: not finite",
        ),
        ({**IMAGES, "name": "photo", "shape": [1], "data": ["GOOD"]}, b"", 422, "inputs.0.name"),
        ({"name": "images"}, b"", 422, "Field required"),
    ],
)
def test_what_infer_refuses_in_the_form_of_the_protocol(
    server: Server, photos: list[bytes], given: dict[str, Any], rest: bytes, status: int, said: str
) -> None:
    filled = json.loads(json.dumps(given).replace("GOOD", base64.b64encode(photos[0]).decode()))
    answer = infer(server, filled, rest)
    assert answer.status == status
    assert set(answer.json) == {"error"}
    assert said in answer.json["error"]


def test_infer_refuses_lengths_and_outputs_that_cannot_be(server: Server, photos: list[bytes]) -> None:
    given = {**IMAGES, "shape": [1], "data": [base64.b64encode(photos[0]).decode()]}
    assert "outputs.0.name" in infer(server, given, outputs=[{"name": "logits"}]).json["error"]
    assert "outputs.0" in infer(server, given, outputs=[1] * 900_000).json["error"]
    for length in ("-1", "a", "9999999", "9" * 5000):
        answer = server.post("/v2/models/robustfeat/infer", b"{}", inference_header_content_length=length)
        assert (answer.status, "Content-Length" in answer.json["error"]) == (400, True)
    assert server.get("/v2/nothing").json.keys() == {"error"}


def test_health_answers_while_millions_of_numbers_are_read(small_model: Path) -> None:
    """The last number is too large for float32: the time is all reading."""
    count = 900
    numbers = (b"-0.1234567," * (count * 3 * 32 * 32))[: -len(b"-0.1234567,")] + b"1e39"
    head = {"name": "pixel_values", "datatype": "FP32", "shape": [count, 3, 32, 32], "data": ["NUMBERS"]}
    body = json.dumps({"inputs": [head]}).encode().replace(b'"NUMBERS"', numbers)
    limits = ("--max-items", count, "--max-queue", count, "--workers", 1)
    with serving("--model", f"small={small_model}", *limits) as server, ThreadPoolExecutor(1) as pool:
        began = time.monotonic()
        refused = pool.submit(server.post, "/v2/models/small/infer", body, content_type="application/json")
        delays = []
        while not refused.done():
            asked = time.monotonic()
            assert server.get("/health/live").status == 200
            delays.append(time.monotonic() - asked)
        seconds = time.monotonic() - began
        assert refused.result().json == {"error": f"pixel_values[{count - 1}]: not finite"}
    assert max(delays) < seconds / 3, (max(delays), seconds, len(delays))
