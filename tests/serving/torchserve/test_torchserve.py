"""TorchServe answers with the features of `embed`."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import re
import shutil
import signal
import socket
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
import tritonclient.http as triton
from numpy.typing import NDArray

from robustfeat import FeatureExtractor
from robustfeat.serving.verify import cosine
from tests.conftest import Run
from tests.serving.http.conftest import Answer, alive, children, form_of, wait_until
from tests.serving.torchserve.conftest import TorchServer, free_ports, torchserving, why_not

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not())

PREDICT = "/predictions/robustfeat"
INFER = "/v2/models/robustfeat/infer"
PHOTO = {"content_type": "image/jpeg"}


@pytest.fixture(scope="module")
def expected(robustfeat: Run, photos: list[bytes], tmp_path_factory: pytest.TempPathFactory) -> NDArray[np.float32]:
    """What the command `embed` makes of the photographs."""
    folder = tmp_path_factory.mktemp("embed")
    (folder / "in").mkdir()
    for number, photo in enumerate(photos):
        (folder / "in" / f"{number}.jpg").write_bytes(photo)
    done = robustfeat("embed", folder / "in", "--out", folder / "feats.npy", "--quiet")
    assert done.returncode == 0, done.stderr
    features: NDArray[np.float32] = np.load(folder / "feats.npy")
    return features


def embedding(answer: Answer, item: int = 0) -> NDArray[np.float32]:
    assert answer.status == 200, answer.body
    return np.array(answer.json["data"][item]["embedding"], np.float32)


def same(found: NDArray[np.float32], right: NDArray[np.float32]) -> bool:
    return found.shape == right.shape and bool((cosine(np.atleast_2d(found), np.atleast_2d(right)) >= 0.99999).all())


def test_an_image_as_the_body_gives_what_embed_gives(
    torchserver: TorchServer, photos: list[bytes], expected: NDArray[np.float32]
) -> None:
    with ThreadPoolExecutor(len(photos)) as pool:
        answers = list(pool.map(lambda photo: torchserver.post(PREDICT, photo, **PHOTO), photos))
    assert same(np.stack([embedding(answer) for answer in answers]), expected)
    assert {key: answers[0].json[key] for key in ("model", "revision", "precision")} == {
        "model": "robustfeat",
        "revision": None,
        "precision": "fp32",
    }


@pytest.mark.parametrize("kind", ["application/octet-stream", "application/x-npy"])
def test_float32_is_answered_where_it_is_accepted(
    torchserver: TorchServer, photos: list[bytes], expected: NDArray[np.float32], kind: str
) -> None:
    answer = torchserver.form(PREDICT, [photos[0], b"no image"], accept=kind)
    assert answer.status == 200
    raw = kind == "application/octet-stream"
    values = np.frombuffer(answer.body, "<f4").reshape(2, -1) if raw else np.load(io.BytesIO(answer.body))
    assert same(values[0], expected[0])
    assert np.isnan(values[1]).all()
    assert answer.headers["content-type"] == kind
    assert (answer.headers["x-robustfeat-failed"], answer.headers["x-robustfeat-shape"]) == ("1", "2,512")


def test_every_file_of_a_form_is_an_image_though_all_have_one_name(
    torchserver: TorchServer, photos: list[bytes], expected: NDArray[np.float32]
) -> None:
    answer = torchserver.form(PREDICT, photos[:3])
    assert [item["index"] for item in answer.json["data"]] == [0, 1, 2]
    assert same(np.stack([embedding(answer, item) for item in range(3)]), expected[:3])


def test_the_open_inference_protocol_is_spoken_in_json_and_in_its_binary_form(
    torchserver: TorchServer, photos: list[bytes], expected: NDArray[np.float32]
) -> None:
    images = triton.InferInput("images", [2], "BYTES")
    images.set_data_from_numpy(np.array(photos[:2], object))
    client = triton.InferenceServerClient(f"127.0.0.1:{torchserver.port}")
    headers = {"Authorization": f"Bearer {torchserver.key('inference')}"}
    assert same(client.infer("robustfeat", [images], headers=headers).as_numpy("features"), expected[:2])
    data = [base64.b64encode(photo).decode() for photo in photos[:2]]
    request = {"inputs": [{"name": "images", "shape": [2], "datatype": "BYTES", "data": data}]}
    answer = torchserver.post(INFER, request)
    (output,) = answer.json["outputs"]
    assert same(np.array(output["data"], np.float32).reshape(output["shape"]), expected[:2])
    assert answer.json["model_name"] == "robustfeat"


def test_the_protocol_also_takes_prepared_tensors(
    torchserver: TorchServer, photos: list[bytes], expected: NDArray[np.float32]
) -> None:
    from robustfeat.hub.preprocessing import normalise

    extractor = FeatureExtractor.from_pretrained()
    values = normalise(extractor.prepare(photos[0])[None], extractor.config.preprocessing)
    pixels = triton.InferInput("pixel_values", list(values.shape), "FP32")
    pixels.set_data_from_numpy(values)
    client = triton.InferenceServerClient(f"127.0.0.1:{torchserver.port}")
    headers = {"Authorization": f"Bearer {torchserver.key('inference')}"}
    assert same(client.infer("robustfeat", [pixels], headers=headers).as_numpy("features"), expected[:1])


def test_a_bad_image_in_a_batch_of_eight_costs_itself_alone(
    torchserver: TorchServer, photos: list[bytes], expected: NDArray[np.float32]
) -> None:
    sent = [photos[3][:2000] if number == 3 else photo for number, photo in enumerate(photos)]
    assert len(sent) == 8
    for _ in range(5):  # until all eight come within the time that a batch waits
        batches = torchserver.log().count("Backend received inference")
        before = torchserver.metrics()
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda photo: torchserver.post(PREDICT, photo, **PHOTO), sent))
        if torchserver.log().count("Backend received inference") == batches + 1:
            break
    assert [answer.status for answer in answers] == [200, 200, 200, 422, 200, 200, 200, 200]
    bad = answers.pop(3)
    assert same(np.stack([embedding(answer) for answer in answers]), np.delete(expected, 3, 0))
    assert bad.json["error"]["code"] == "unreadable_image"
    assert "damaged" in bad.json["error"]["message"]
    assert torchserver.log().count("Backend received inference") == batches + 1, "not one batch"
    wait_until(lambda: images(torchserver.metrics(), "failed") == images(before, "failed") + 1)
    assert images(torchserver.metrics(), "good") == images(before, "good") + 7


def images(metrics: str, outcome: str) -> float:
    found = re.findall(rf'^robustfeat_images\{{outcome="{outcome}".*\}} ([\d.]+)$', metrics, re.MULTILINE)
    return float(found[0]) if found else 0.0


def test_metrics_tell_of_requests_without_a_token(torchserver: TorchServer, photos: list[bytes]) -> None:
    torchserver.post(PREDICT, photos[0], **PHOTO)
    assert re.search(r'^ts_inference_requests_total\{model_name="robustfeat".*\} [\d.]+$', torchserver.metrics(), re.M)


@pytest.mark.parametrize(
    ("path", "body", "headers", "status", "said"),
    [
        (PREDICT, b"", {"content-type": "image/jpeg"}, 422, "no image came"),
        (PREDICT, b"x", {"content-type": "image/jpeg", "accept": "text/html"}, 406, "answers are application/json"),
        (PREDICT, b"{}", {"content-type": "application/json"}, 422, "inputs: Field required"),
        (PREDICT, b"{", {"content-type": "application/json"}, 400, "not JSON"),
        (PREDICT, *form_of([b"x"] * 5), 413, "more than 4 images"),
        (INFER, b'{"inputs": []}', {"content-type": "application/json"}, 422, "inputs"),
    ],
)
def test_what_is_wrong_is_told(
    torchserver: TorchServer, path: str, body: bytes, headers: dict[str, str] | str, status: int, said: str
) -> None:
    headers = {"content-type": headers} if isinstance(headers, str) else headers
    answer = torchserver.ask("POST", path, body, headers)
    assert answer.status == status
    error = answer.json["error"]
    assert said in (error["message"] if path == PREDICT else error)


def test_an_image_beyond_the_limit_of_pixels_is_refused(torchserver: TorchServer) -> None:
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(b"\0" * 100))]
    bomb = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    answer = torchserver.post(PREDICT, bomb, **PHOTO)
    assert answer.status == 422
    assert "pixels" in answer.json["error"]["message"]


def test_nothing_is_answered_without_a_token(torchserver: TorchServer, photos: list[bytes]) -> None:
    assert torchserver.ask("POST", PREDICT, photos[0], {"authorization": "Bearer x"}).status == 400
    assert torchserver.ask("POST", INFER, photos[0], {"authorization": ""}).status == 400


def test_models_cannot_be_managed_and_tokens_have_a_life(torchserver: TorchServer) -> None:
    for url in ("https://example.com/evil.mar", "robustfeat.mar"):
        assert torchserver.manage("POST", f"/models?url={url}").status == 405
    assert torchserver.manage("DELETE", "/models/robustfeat").status == 405
    keys = json.loads((torchserver.store / "key_file.json").read_text())
    ends = datetime.fromisoformat(keys["inference"]["expiration time"])
    assert timedelta(minutes=85) < ends - datetime.now(UTC) <= timedelta(minutes=90)
    assert (torchserver.store / "key_file.json").stat().st_mode & 0o077 == 0
    renewed = torchserver.manage("GET", "/token?type=inference", key="API")
    assert renewed.status == 200
    assert torchserver.key("inference") != keys["inference"]["key"]


def test_all_listens_on_this_machine_alone(torchserver: TorchServer) -> None:
    own = {"127.0.0.1", "::ffff:127.0.0.1"}
    (java,) = children(torchserver.process.pid)
    assert len(listening(java)) == 5
    assert set(listening(java)) <= own


def listening(pid: int) -> list[str]:
    """Addresses of the TCP sockets that a process listens at."""
    sockets = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the process has closed it since
            sockets.add(str(link.readlink()))
    found = []
    for line in (
        Path("/proc/net/tcp6").read_text().splitlines()[1:] + Path("/proc/net/tcp").read_text().splitlines()[1:]
    ):
        place, state, inode = (line.split()[at] for at in (1, 3, 9))
        if state == "0A" and f"socket:[{inode}]" in sockets:
            words = bytes.fromhex(place.partition(":")[0])
            raw = b"".join(words[at : at + 4][::-1] for at in range(0, len(words), 4))
            found.append(socket.inet_ntop(socket.AF_INET6 if len(raw) == 16 else socket.AF_INET, raw))
    return found


def test_a_killed_decoder_costs_nothing(torchserver: TorchServer, photos: list[bytes]) -> None:
    (java,) = children(torchserver.process.pid)
    (worker,) = (pid for pid in children(java) if children(pid))
    for decoder in children(worker):
        os.kill(decoder, signal.SIGKILL)
    assert torchserver.form(PREDICT, photos[:4]).status == 200


@pytest.mark.slow
def test_stopping_leaves_no_process_and_no_token(tmp_path: Path, photos: list[bytes]) -> None:
    with torchserving(tmp_path / "store", "--workers", 2) as server:
        every = server.processes()
        assert len(every) >= 6  # this one, Java, two workers and their decoders
        assert server.post(PREDICT, photos[0], **PHOTO).status == 200
        assert server.stop() == 0
    assert not any(map(alive, every))
    assert sorted(file.name for file in server.store.iterdir()) == ["config.properties", "logs", "robustfeat.mar"]


@pytest.mark.slow
def test_whoever_kills_the_command_ends_torchserve(tmp_path: Path) -> None:
    with torchserving(tmp_path / "store") as server:
        every = server.processes()
        server.stop(signal.SIGKILL)
        wait_until(lambda: not any(map(alive, every)))


def test_a_worker_that_cannot_start_is_told(robustfeat: Run, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('torch is broken')\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    store = tmp_path / "store"
    done = robustfeat("torchserve", "--out", store, "--run", "--port", free_ports(5), env=environment)
    assert done.returncode == 1
    assert done.stdout == ""
    assert "cannot start (ImportError: torch is broken)" in done.stderr
    assert len(done.stderr.splitlines()) == 2


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="there is a GPU")
def test_a_model_that_cannot_be_loaded_is_told(robustfeat: Run, tmp_path: Path) -> None:
    done = robustfeat("torchserve", "--out", tmp_path, "--device", "cuda", "--run", "--port", free_ports(5))
    assert done.returncode == 1
    _, line = done.stderr.splitlines()
    assert "cannot start (device=cuda: ONNX Runtime runs on the CPU here" in line


def test_a_second_command_leaves_the_first_alone(robustfeat: Run, torchserver: TorchServer) -> None:
    before = (torchserver.store / "config.properties").read_bytes()
    done = robustfeat("torchserve", "--out", torchserver.store, "--run", "--port", free_ports(5))
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert "another robustfeat torchserve uses it" in done.stderr
    assert (torchserver.store / "config.properties").read_bytes() == before
    assert torchserver.get("/ping").status == 200


def test_a_port_in_use_is_told(robustfeat: Run, tmp_path: Path) -> None:
    first = free_ports(5)
    with socket.create_server(("127.0.0.1", first + 3)):
        done = robustfeat("torchserve", "--out", tmp_path / "store", "--run", "--port", first)
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert f"127.0.0.1:{first + 3}: Address already in use" in done.stderr


def test_a_request_of_java_that_is_not_there_is_told(robustfeat: Run, tmp_path: Path) -> None:
    environment = {**os.environ, "JAVA_HOME": str(tmp_path)}
    done = robustfeat("torchserve", "--out", tmp_path / "store", "--run", env=environment)
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert "needs Java 17" in done.stderr
