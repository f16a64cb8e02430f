"""Embedding from and to remote storage: the real s3fs against moto's S3, and the real Hub client against a stand-in."""

from __future__ import annotations

import hashlib
import importlib
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import boto3
import numpy as np
import pyarrow as pa
import pytest
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from pyarrow import parquet
from werkzeug.serving import WSGIRequestHandler, make_server

from robustfeat import FeatureExtractor
from robustfeat.cli import main
from robustfeat.errors import InputError
from robustfeat.serving.bulk.embedding import EmbeddingResult, embed_files
from robustfeat.serving.heads.features import open_features
from robustfeat.serving.inputs.listing import list_inputs
from robustfeat.serving.inputs.parquet import ParquetImages
from robustfeat.serving.inputs.sources import ImageSource
from tests.conftest import ROOT, Run, files_of
from tests.hub_server import FakeHub

Fault = Callable[[dict[str, Any]], str | None]

_ERROR = "<?xml version='1.0'?><Error><Code>{0}</Code><Message>{0} was asked for</Message></Error>"
_STATUS = {"InternalError": "500 Oops", "SlowDown": "503 Slow Down"}


class Storage:
    """An S3 server in this process, which can be told to misbehave.

    Attributes:
        fault: asked about each request: None to serve it, an error code of S3 to refuse it, `drop` to hang up at once,
            `cut` to hang up within the body.
        client: sees what is there without robustfeat's or s3fs's help.
    """

    def __init__(self) -> None:
        self._backend = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._serve, threaded=True, request_handler=_Silent)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        self._numbers = itertools.count()
        self.fault: Fault = lambda _: None
        self.url = f"http://127.0.0.1:{self._server.port}"
        keys = {"aws_access_key_id": "key", "aws_secret_access_key": "secret", "region_name": "us-east-1"}
        self.client = boto3.client("s3", endpoint_url=self.url, **keys)
        self.environment = {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_MAX_ATTEMPTS": "1",
        }

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def new_bucket(self) -> str:
        name = f"bucket-{next(self._numbers)}"
        self.client.create_bucket(Bucket=name)
        return name

    def put(self, bucket: str, key: str, data: bytes = b"") -> None:
        self.client.put_object(Bucket=bucket, Key=key, Body=data)

    def put_folder(self, bucket: str, prefix: str, root: Path) -> None:
        for file in root.rglob("*"):
            if file.is_file():
                self.put(bucket, f"{prefix}/{file.relative_to(root).as_posix()}", file.read_bytes())

    def get(self, bucket: str, key: str) -> bytes:
        data: bytes = self.client.get_object(Bucket=bucket, Key=key)["Body"].read()
        return data

    def keys(self, bucket: str) -> list[str]:
        return [entry["Key"] for entry in self.client.list_objects_v2(Bucket=bucket).get("Contents", [])]

    def uploads(self, bucket: str) -> list[str]:
        """Multipart uploads that were begun and neither finished nor given up: they cost money unseen."""
        return [entry["Key"] for entry in self.client.list_multipart_uploads(Bucket=bucket).get("Uploads", [])]

    def _serve(self, environ: dict[str, Any], start_response: Any) -> Any:
        fault = self.fault(environ)
        if fault == "drop":
            environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
        if fault in {None, "drop"}:
            return self._backend(environ, start_response)
        if fault == "cut":
            body = b"".join(self._backend(environ, start_response))
            return _Cut(body[: len(body) // 2], environ["werkzeug.socket"])
        body = _ERROR.format(fault).encode()
        headers = [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))]
        start_response(_STATUS.get(fault, "403 Forbidden"), headers)
        return [] if environ["REQUEST_METHOD"] == "HEAD" else [body]


class _Silent(WSGIRequestHandler):
    def log(self, *_: Any) -> None:
        pass


class _Cut:
    """Half a body, whose connection ends instead of the other half."""

    def __init__(self, half: bytes, connection: socket.socket) -> None:
        self._half, self._connection = half, connection

    def __iter__(self) -> Iterator[bytes]:
        yield self._half
        self._connection.shutdown(socket.SHUT_RDWR)


@pytest.fixture(scope="module")
def server() -> Iterator[Storage]:
    storage = Storage()
    yield storage
    storage.close()


@pytest.fixture
def s3(server: Storage, monkeypatch: pytest.MonkeyPatch) -> Storage:
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    server.fault = lambda _: None
    return server


@pytest.fixture
def bucket(s3: Storage) -> str:
    return s3.new_bucket()


@pytest.fixture(scope="module")
def extractor() -> FeatureExtractor:
    return FeatureExtractor.from_pretrained(threads=1, streams=1)


@pytest.fixture
def photos(tmp_path: Path, example_files: list[Path]) -> Path:
    """Names that URLs and globs could take for something else, unusable images, other files and hidden ones."""
    root = tmp_path / "photos"
    places = ["b.jpg", "a/z.JPEG", "a-1/y.jpg", "é [1].jpg", "a/b/50%25 + #1?.jpg", "x::y&=.jpg", "A.jpg"]
    for place, file in zip(places, example_files, strict=False):
        (root / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, root / place)
    (root / "a" / "broken.png").write_bytes(b"\x89PNG junk")
    (root / "empty.gif").touch()
    (root / "notes.txt").write_text("not an image")
    (root / ".hidden.jpg").write_text("ignored")
    (root / ".git").mkdir()
    (root / ".git" / "c.jpg").write_text("ignored")
    (root / ".git" / "config").write_text("ignored")
    return root


def embed(extractor: FeatureExtractor, inputs: list[str | Path], out: str | Path, **options: Any) -> EmbeddingResult:
    with list_inputs(inputs) as found:
        return embed_files(extractor, found, out, quiet=True, **{"workers": 1, "batch_size": 4, **options})


@pytest.fixture
def command(robustfeat: Run) -> Run:
    """The command line; its decoders are processes of their own that inherit the environment."""
    options = ["--quiet", "--threads=1", "--workers=1", "--batch-size=4"]
    return lambda *arguments, **environment: robustfeat(
        "embed", *options, *arguments, env={**os.environ, **environment}
    )


def index_paths(inputs: list[str | Path]) -> list[str]:
    with list_inputs(inputs) as found:
        return [image.path for image in found]


def assert_same_rows(out: Path, expected: Path) -> None:
    assert out.read_bytes() == expected.read_bytes()
    assert out.with_suffix(".index.jsonl").read_bytes() == expected.with_suffix(".index.jsonl").read_bytes()


def is_get_of(environ: dict[str, Any], ending: str) -> bool:
    method, path = str(environ["REQUEST_METHOD"]), str(environ["PATH_INFO"])
    return method == "GET" and path.endswith(ending)


def always(fault: str) -> Fault:
    return lambda _: fault


def refused_listing(prefix: str, code: str) -> Fault:
    return lambda environ: code if f"prefix={prefix}" in unquote(environ["QUERY_STRING"]) else None


# Inputs


def test_a_folder_on_s3_gives_what_its_local_copy_gives(
    s3: Storage, bucket: str, extractor: FeatureExtractor, photos: Path, tmp_path: Path, command: Run
) -> None:
    s3.put_folder(bucket, "in/photos", photos)
    s3.put(bucket, "in/photos/")  # as S3's own console makes folders
    s3.put(bucket, "in/photos/a/")
    s3.put(bucket, "in/photos-of-others/c.jpg")
    local = embed(extractor, [photos], tmp_path / "local.npy")
    # The other way of telling s3fs where storage lies.
    result = command(f"s3://{bucket}/in/photos", "--out", tmp_path / "remote.npy", "--json", AWS_ENDPOINT_URL="",
                     FSSPEC_S3_ENDPOINT_URL=s3.url)  # fmt: skip
    assert result.returncode == 3, result.stderr
    summary = json.loads(result.stdout)
    assert (summary["images"], summary["failed"], summary["skipped"]) == (9, 2, 3)
    assert (local.images, local.failed, local.skipped) == (9, 2, 3)
    assert_same_rows(tmp_path / "remote.npy", tmp_path / "local.npy")
    paths = [json.loads(line)["path"] for line in (tmp_path / "remote.index.jsonl").read_text("utf-8").splitlines()]
    assert paths == sorted(paths, key=os.fsencode)
    assert len(result.stderr.splitlines()) == 1, result.stderr


def test_a_whole_bucket_is_a_folder(s3: Storage, bucket: str) -> None:
    for key in ("b.jpg", "a/c.jpg", "notes.txt"):
        s3.put(bucket, key)
    assert index_paths([f"s3://{bucket}"]) == index_paths([f"s3://{bucket}/"]) == ["a/c.jpg", "b.jpg"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.jpg", ["A.jpg", "b.jpg", "x::y&=.jpg", "é [1].jpg"]),
        ("[ab]/*", ["a/b/50%25 + #1?.jpg", "a/broken.png", "a/z.JPEG"]),
        ("*", ["A.jpg", "a-1/y.jpg", "a/b/50%25 + #1?.jpg", "a/broken.png", "a/z.JPEG", "b.jpg", "empty.gif",
               "notes.txt", "x::y&=.jpg", "é [1].jpg"]),
        ("**/*.jpg", ["A.jpg", "a-1/y.jpg", "a/b/50%25 + #1?.jpg", "b.jpg", "x::y&=.jpg", "é [1].jpg"]),
        ("a/**", ["b/50%25 + #1?.jpg", "broken.png", "z.JPEG"]),
        ("?/*/*", ["a/b/50%25 + #1?.jpg"]),
        (".*.jpg", [".hidden.jpg"]),
        ("é [1].jpg", ["é [1].jpg"]),
    ],
)  # fmt: skip
def test_globs_on_s3_match_what_local_ones_match(
    s3: Storage, bucket: str, photos: Path, pattern: str, expected: list[str]
) -> None:
    s3.put_folder(bucket, "photos", photos)
    assert index_paths([f"s3://{bucket}/photos/{pattern}"]) == expected
    assert index_paths([photos / pattern]) == expected


def test_a_folder_with_brackets_in_its_name_is_no_pattern(s3: Storage, bucket: str) -> None:
    s3.put(bucket, "photos [1]/a.jpg")
    assert index_paths([f"s3://{bucket}/photos [1]"]) == ["a.jpg"]


def test_files_and_archives_on_s3_give_what_local_ones_give(
    s3: Storage, bucket: str, extractor: FeatureExtractor, photos: Path, tmp_path: Path
) -> None:
    with tarfile.open(tmp_path / "shard.tar", "w") as archive:
        archive.add(photos, "photos")
    good = [photos / "b.jpg", photos / "A.jpg", photos / "a" / "z.JPEG"]
    images = [{"bytes": file.read_bytes(), "path": file.name} for file in good]
    table = pa.table({"image": [*images, None], "thumbnail": [b"no image"] * 4})
    parquet.write_table(table, tmp_path / "part.parquet", row_group_size=2)
    shutil.copy(photos / "b.jpg", tmp_path / "photo.dat")
    names = ["photo.dat", "shard.tar", "part.parquet", "part.parquet:thumbnail"]
    for name in names[:3]:
        s3.put(bucket, f"deep/{name}", (tmp_path / name).read_bytes())
    # Batches of two, so that none holds rows of both kinds.
    embed(extractor, [tmp_path / name for name in names], tmp_path / "local.npy", batch_size=2)
    result = embed(extractor, [f"s3://{bucket}/deep/{name}" for name in names], tmp_path / "remote.npy", batch_size=2)
    # Broken and empty files and the nested one: the tar holds what the folder does; a null; four that are no images.
    assert (result.images, result.failed) == (1 + 9 + 4 + 4, 2 + 1 + 4)
    assert_same_rows(tmp_path / "remote.npy", tmp_path / "local.npy")


def test_rows_of_parquet_beside_remote_files_in_a_batch_are_their_own(
    s3: Storage, bucket: str, extractor: FeatureExtractor, photos: Path, tmp_path: Path
) -> None:
    data = [(photos / name).read_bytes() for name in ("b.jpg", "A.jpg")]
    parquet.write_table(pa.table({"image": data[:1]}), tmp_path / "part.parquet")
    s3.put(bucket, "A.jpg", data[1])
    result = embed(extractor, [tmp_path / "part.parquet", *[f"s3://{bucket}/A.jpg"] * 7], tmp_path / "feats.npy")
    assert (result.images, result.failed) == (8, 0)
    index = [json.loads(line) for line in (tmp_path / "feats.index.jsonl").read_text().splitlines()]
    assert [row["sha256"] for row in index] == [hashlib.sha256(data[number > 0]).hexdigest() for number in range(8)]


def test_missing_urls_of_a_list_are_failed_rows_with_a_reason(
    s3: Storage, bucket: str, photos: Path, tmp_path: Path, command: Run
) -> None:
    s3.put(bucket, "b.jpg", (photos / "b.jpg").read_bytes())
    lines = [f"s3://{bucket}/b.jpg", f"s3://{bucket}/gone.jpg", str(photos / "b.jpg"), "s3://no-such-bucket/b.jpg"]
    (tmp_path / "list").write_text("\n".join(lines))
    result = command("--files-from", tmp_path / "list", "--out", tmp_path / "feats.npy")
    assert result.returncode == 3, result.stderr
    index = [json.loads(line) for line in (tmp_path / "feats.index.jsonl").read_text().splitlines()]
    assert [row["path"] for row in index] == lines
    assert [row["error"] for row in index] == [
        None,
        "not found (The specified key does not exist.)",
        None,
        "not found (The specified bucket does not exist)",
    ]
    features = np.load(tmp_path / "feats.npy")
    np.testing.assert_array_equal(np.isfinite(features).all(1), [True, False, True, False])
    np.testing.assert_array_equal(features[0], features[2])


# What cannot work


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("s3://{bucket}/gone.jpg", "no such file or folder"),
        ("s3://{bucket}/gone.parquet:image", "no such file or folder"),
        ("s3://no-such-bucket/photos", "no such file or folder"),
        ("s3://{bucket}/gone/*.jpg", "no images found"),
        ("s3://{bucket}/notes.parquet", "not a readable Parquet file"),
        ("s3://{bucket}/notes.tar", "not a tar file"),
        ("s3://{bucket}/notes.tar.gz", "decompress it"),
        ("foo://photos", "Protocol not known: foo; expected a path, or s3://, gs:// or hf://"),
    ],
)
def test_arguments_that_name_nothing_usable_are_refused_in_one_line(
    s3: Storage, bucket: str, tmp_path: Path, argument: str, message: str,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    for ending in ("parquet", "tar", "tar.gz"):
        s3.put(bucket, f"notes.{ending}", b"not what its name says" * 99)
    argument = argument.format(bucket=bucket)
    monkeypatch.setattr(sys, "argv", ["robustfeat", "embed", argument, "--out", str(tmp_path / "x.npy"), "--quiet"])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith(f"robustfeat: {argument.removesuffix(':image')}")
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("url", "missing", "message"),
    [
        ("gs://bucket/photos", "gcsfs", "pip install 'robustfeat[gs]'"),
        ("s3://bucket/photos", "s3fs", "pip install 'robustfeat[s3]'"),
        ("hf://datasets/a/b", "huggingface_hub", "pip install 'huggingface_hub'"),
        ("s3://bucket/photos", "fsspec", "pip install 'robustfeat[s3]'"),
    ],
)
def test_a_missing_package_is_named(url: str, missing: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = importlib.import_module("fsspec.registry")
    monkeypatch.delitem(registry._registry, url.partition(":")[0], raising=False)  # if it was imported before
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(InputError) as caught:
        list_inputs([url])
    assert str(caught.value).startswith(f"{url}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_storage_out_of_reach_is_one_line_and_the_run_can_be_repeated(
    s3: Storage, bucket: str, photos: Path, tmp_path: Path, command: Run
) -> None:
    s3.put(bucket, "b.jpg", (photos / "b.jpg").read_bytes())
    with socket.create_server(("127.0.0.1", 0)) as free:
        nowhere = f"http://127.0.0.1:{free.getsockname()[1]}"
    there, out = f"s3://{bucket}/b.jpg", f"s3://{bucket}/feats.npy"
    for source, target, environment, message in [
        (there, tmp_path / "feats.npy", {"AWS_ENDPOINT_URL": nowhere}, "Could not connect to the endpoint"),
        (photos / "b.jpg", out, {"AWS_ENDPOINT_URL": nowhere}, "Could not connect to the endpoint"),
        (there, out, {"AWS_ACCESS_KEY_ID": "", "HOME": str(tmp_path)}, "Unable to locate credentials"),
    ]:
        result = command(source, "--out", target, **environment)
        assert result.returncode == 1
        assert result.stderr.startswith(f"robustfeat: s3://{bucket}/")
        assert message in result.stderr
        assert result.stderr.count("\n") == 1
        assert [entry.name for entry in tmp_path.iterdir()] == ["photos"]
        assert s3.keys(bucket) == ["b.jpg"]
    result = command(there, "--out", out)
    assert (result.returncode, result.stderr) == (0, "")
    assert s3.keys(bucket) == ["b.jpg", "feats.index.jsonl", "feats.meta.json", "feats.npy"]


def test_a_folder_that_storage_refuses_to_list_is_never_left_out(s3: Storage, bucket: str, photos: Path) -> None:
    s3.put_folder(bucket, "photos", photos)
    for code in ("AccessDenied", "InternalError"):
        s3.fault = refused_listing("photos/a/b/", code)
        for pattern in ("", "/**/*.jpg", "/a"):
            with pytest.raises(InputError, match=f"cannot be listed .*{code} was asked for"):
                list_inputs([f"s3://{bucket}/photos{pattern}"])


@pytest.mark.parametrize(
    ("code", "raised", "message"),
    [
        ("AccessDenied", OSError, "cannot be read (AccessDenied was asked for)"),
        ("NoSuchKey", OSError, "not found (NoSuchKey was asked for)"),
        ("ExpiredToken", InputError, "ExpiredToken was asked for"),
        ("InvalidAccessKeyId", InputError, "InvalidAccessKeyId was asked for"),
        ("InternalError", InputError, "InternalError was asked for"),
    ],
)
def test_only_what_is_the_images_own_fault_fails_its_row(
    s3: Storage, bucket: str, monkeypatch: pytest.MonkeyPatch, code: str, raised: type[Exception], message: str
) -> None:
    """A decoder makes a failed row of OSError and stops the run at InputError."""
    monkeypatch.setattr(time, "sleep", lambda _: None)
    s3.fault = lambda _: code
    with pytest.raises(raised) as caught:
        ImageSource("a.jpg", f"s3://{bucket}/a.jpg").read()
    reason = caught.value.strerror if isinstance(caught.value, OSError) else str(caught.value)
    assert message in str(reason)
    assert "\n" not in str(reason)


def test_a_parquet_file_that_cannot_be_read_on_stops_the_run(s3: Storage, bucket: str, tmp_path: Path) -> None:
    parquet.write_table(pa.table({"image": [b"x"]}), tmp_path / "part.parquet")
    s3.put(bucket, "part.parquet", (tmp_path / "part.parquet").read_bytes())
    url = f"s3://{bucket}/part.parquet"
    with list_inputs([url]) as found:
        (image,) = found
    for fault in ("InternalError", "NoSuchKey"):
        s3.fault = always(fault)
        with pytest.raises(InputError, match=f"{url}: cannot be read") as caught:
            ParquetImages(image.file, image.detail).read(image.at)
        assert "\n" not in str(caught.value)


def test_a_hiccup_of_the_network_is_not_noticed(
    s3: Storage, bucket: str, extractor: FeatureExtractor, photos: Path, tmp_path: Path
) -> None:
    s3.put_folder(bucket, "photos", photos)
    faults = {"/b.jpg": ["drop"], "/A.jpg": ["cut"], "/z.JPEG": ["SlowDown"], "/y.jpg": ["InternalError"]}

    def hiccup(environ: dict[str, Any]) -> str | None:
        left = next((faults[name] for name in faults if is_get_of(environ, name)), None)
        return left.pop() if left else None

    s3.fault = hiccup
    embed(extractor, [photos], tmp_path / "local.npy")
    embed(extractor, [f"s3://{bucket}/photos"], tmp_path / "remote.npy")
    assert not any(faults.values())
    assert_same_rows(tmp_path / "remote.npy", tmp_path / "local.npy")


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory, example_files: list[Path]) -> Path:
    root = tmp_path_factory.mktemp("inputs") / "many"
    root.mkdir()
    for number, file in enumerate(example_files[:14]):
        shutil.copy(file, root / f"{number:02}.jpg")
    return root


@pytest.fixture(scope="module")
def expected(many: Path, extractor: FeatureExtractor) -> Path:
    """What `many` gives on this machine."""
    embed(extractor, [many], many.parent / "feats.npy")
    return many.parent / "feats.npy"


def test_a_failure_of_the_network_stops_the_run_and_keeps_what_is_done(
    s3: Storage, bucket: str, extractor: FeatureExtractor, many: Path, expected: Path, tmp_path: Path
) -> None:
    """No image is at fault, so none may become a failed row."""
    s3.put_folder(bucket, "many", many)
    s3.fault = lambda environ: "InternalError" if is_get_of(environ, "/09.jpg") else None
    with pytest.raises(InputError, match=r"many/09.jpg: cannot be read .*InternalError was asked for") as caught:
        embed(extractor, [f"s3://{bucket}/many"], tmp_path / "remote.npy", shard_rows=4)
    assert "\n" not in str(caught.value)
    shards = tmp_path / ".remote.npy.shards"
    assert {"000000.jsonl", "000001.jsonl"} <= {file.name for file in shards.iterdir()}
    assert not (tmp_path / "remote.npy").exists()
    # Only what is missing is read again.
    s3.fault = lambda environ: "InternalError" if is_get_of(environ, "/02.jpg") else None
    embed(extractor, [f"s3://{bucket}/many"], tmp_path / "remote.npy", shard_rows=4)
    assert_same_rows(tmp_path / "remote.npy", expected)
    assert not shards.exists()


# Outputs


@pytest.mark.parametrize("suffix", [".npy", ".parquet", ".safetensors"])
def test_outputs_on_s3_have_the_bytes_of_local_ones_also_when_appended_to(
    s3: Storage, bucket: str, extractor: FeatureExtractor, photos: Path, tmp_path: Path, suffix: str
) -> None:
    def check() -> None:
        names = sorted([f"out/feats{suffix}", "out/feats.index.jsonl", "out/feats.meta.json"])
        assert s3.keys(bucket) == names
        assert not s3.uploads(bucket)
        for name in names:
            there, here = s3.get(bucket, name), (tmp_path / name.removeprefix("out/")).read_bytes()
            if name.endswith(".json"):
                assert {**json.loads(there), "timing": None} == {**json.loads(here), "timing": None}
            else:
                assert there == here

    first: list[str | Path] = [photos / "a", photos / "b.jpg"]
    for out in (tmp_path / f"feats{suffix}", f"s3://{bucket}/out/feats{suffix}"):
        embed(extractor, first, out, shard_rows=4)
    check()
    for out in (tmp_path / f"feats{suffix}", f"s3://{bucket}/out/feats{suffix}"):
        result = embed(extractor, [*first, photos / "a-1"], out, append=True)
        assert (result.images, result.known) == (5, 4)
    check()


def test_appending_to_what_is_not_there_is_refused(
    s3: Storage, bucket: str, extractor: FeatureExtractor, photos: Path
) -> None:
    out = f"s3://{bucket}/feats.npy"
    with pytest.raises(InputError, match=f"append=True: {out} does not exist"):
        embed(extractor, [photos / "b.jpg"], out, append=True)
    s3.fault = lambda _: "InternalError"  # that is not the same
    with pytest.raises(InputError, match=r"shards: cannot be listed"):
        embed(extractor, [photos / "b.jpg"], out, append=True)
    s3.fault = lambda _: None
    assert not s3.keys(bucket)


def test_a_bucket_that_is_not_there_is_not_made(s3: Storage, extractor: FeatureExtractor, photos: Path) -> None:
    with pytest.raises(InputError, match=r"s3://misspelt/.*: cannot be written .*bucket does not exist"):
        embed(extractor, [photos / "b.jpg"], "s3://misspelt/feats.npy")
    assert "misspelt" not in [entry["Name"] for entry in s3.client.list_buckets()["Buckets"]]


def test_an_upload_that_fails_leaves_nothing_half_done(
    s3: Storage, bucket: str, extractor: FeatureExtractor, photos: Path, tmp_path: Path
) -> None:
    out = f"s3://{bucket}/feats.npy"
    s3.fault = lambda environ: "AccessDenied" if "partNumber=" in environ["QUERY_STRING"] else None
    with pytest.raises(InputError, match=r"new-features: cannot be written .*AccessDenied was asked for"):
        embed(extractor, [photos / "b.jpg"], out)
    assert not s3.uploads(bucket)
    assert "feats.npy" not in s3.keys(bucket)
    s3.fault = lambda _: None
    embed(extractor, [photos / "b.jpg"], out)
    assert s3.keys(bucket) == ["feats.index.jsonl", "feats.meta.json", "feats.npy"]


def test_shards_that_cannot_be_seen_are_not_taken_for_none(
    s3: Storage, bucket: str, extractor: FeatureExtractor, many: Path, expected: Path
) -> None:
    out = f"s3://{bucket}/feats.npy"
    s3.fault = lambda environ: "AccessDenied" if environ["PATH_INFO"].endswith("/000002.f32") else None
    with pytest.raises(InputError, match=r"shards: cannot be written .*AccessDenied was asked for"):
        embed(extractor, [many], out, shard_rows=4)
    kept = s3.keys(bucket)
    assert ".feats.npy.shards/000001.jsonl" in kept
    s3.fault = lambda environ: "InternalError" if "list-type=2" in environ["QUERY_STRING"] else None
    with pytest.raises(InputError, match="shards: cannot be listed"):
        embed(extractor, [many], out, shard_rows=4)
    s3.fault = lambda _: None
    assert s3.keys(bucket) == kept
    embed(extractor, [many], out, shard_rows=4)
    assert s3.get(bucket, "feats.npy") == expected.read_bytes()


@pytest.mark.parametrize("at", ["PUT 000001.jsonl", "PUT feats.index.jsonl", "DELETE job.json"])
def test_a_run_killed_while_it_writes_to_s3_goes_on_when_repeated(
    s3: Storage, bucket: str, extractor: FeatureExtractor, many: Path, expected: Path, at: str
) -> None:
    """Killed within a request: between the shards, while they are joined, and when the output is complete."""
    out = f"s3://{bucket}/feats.npy"
    requests: list[str] = []
    pid: list[int] = []
    started = threading.Event()

    def kill(environ: dict[str, Any]) -> str | None:
        requests.append(f"{environ['REQUEST_METHOD']} {environ['PATH_INFO'].rpartition('/')[2]}")
        # job.json is also deleted, if it is there, before all else.
        if requests[-1] == at and (at.startswith("PUT") or "PUT job.json" in requests):
            started.wait()
            os.kill(pid[0], signal.SIGKILL)
            return "drop"
        return None

    s3.fault = kill
    arguments = [many, "--out", out, "--shard-rows=4", "--quiet", "--threads=1", "--workers=1", "--batch-size=4"]
    command_line = [sys.executable, "-m", "robustfeat", "embed", *map(str, arguments)]
    with subprocess.Popen(command_line, cwd=ROOT, stderr=subprocess.DEVNULL) as process:
        pid.append(process.pid)
        started.set()
    assert process.returncode == -signal.SIGKILL
    left = s3.keys(bucket)
    assert ".feats.npy.shards/000000.jsonl" in left
    assert ("feats.npy" in left) == (at == "DELETE job.json")
    if at == "PUT feats.index.jsonl":  # of the new output, one file is at its place already: it is read all the same
        assert "feats.meta.json" in left
        assert open_features(out).values[:].tobytes() == np.load(expected).tobytes()
    requests.clear()
    s3.fault = lambda environ: requests.append(f"{environ['REQUEST_METHOD']} {environ['PATH_INFO'].rpartition('/')[2]}")
    embed(extractor, [many], out, shard_rows=4)
    assert "PUT 000000.f32" not in requests or at == "DELETE job.json"
    assert s3.keys(bucket) == ["feats.index.jsonl", "feats.meta.json", "feats.npy"]
    for name in ("feats.npy", "feats.index.jsonl"):
        assert s3.get(bucket, name) == expected.with_name(name).read_bytes()


def test_a_folder_of_several_files_on_s3_has_the_bytes_of_a_local_one(
    s3: Storage, bucket: str, extractor: FeatureExtractor, many: Path, expected: Path, tmp_path: Path
) -> None:
    out, options = f"s3://{bucket}/feats/", {"shard_rows": 4, "rows_per_file": 4}
    embed(extractor, [many], f"{tmp_path}/feats/", **options)
    local = files_of(tmp_path / "feats")
    assert len(local) > 6

    def check() -> None:
        assert s3.keys(bucket) == sorted(f"feats/{name}" for name in local)
        for name in local:
            if name != "_meta.json":
                assert s3.get(bucket, f"feats/{name}") == local[name]

    # A move that fails: the files that are not moved yet are read where they are.
    def deny(environ: dict[str, Any]) -> str | None:
        at = environ["REQUEST_METHOD"], environ["PATH_INFO"].endswith("/feats/000001.npy")
        return "AccessDenied" if at == ("PUT", True) else None

    s3.fault = deny
    with pytest.raises(InputError, match=r"cannot be written .*AccessDenied was asked for"):
        embed(extractor, [many], out, **options)
    assert "feats/000001.npy" not in s3.keys(bucket)
    assert np.asarray(open_features(out).values).tobytes() == np.load(expected).tobytes()
    s3.fault = lambda _: None
    embed(extractor, [many], out, **options)
    check()
    assert list(open_features(out).paths) == list(open_features(str(expected)).paths)
    # Fewer files replace them.
    few: list[str | Path] = [*sorted(many.iterdir())[:5]]
    embed(extractor, few, out, **options)
    assert len([key for key in s3.keys(bucket) if key.endswith(".npy")]) == 2
    assert embed(extractor, [many], out, sync=True, shard_rows=4).known == 5
    assert s3.keys(bucket) == sorted(f"feats/{name}" for name in local)


# The Hugging Face Hub


def test_a_dataset_of_the_hub_gives_what_its_local_copy_gives(
    hub: FakeHub, extractor: FeatureExtractor, photos: Path, tmp_path: Path, command: Run
) -> None:
    root = tmp_path / "dataset"
    shutil.copytree(photos, root / "train")
    (root / "data").mkdir()
    images = [{"bytes": (photos / name).read_bytes(), "path": name} for name in ("b.jpg", "A.jpg")]
    parquet.write_table(pa.table({"image": images, "label": [0, 1]}), root / "data" / "test-00000.parquet")
    # The rows of the first fill a batch, so that none holds both kinds.
    inputs = ["data/test-00000.parquet", "train", "train/a*/*.jpg"]
    embed(extractor, [root / name for name in inputs], tmp_path / "local.npy", batch_size=2)
    files = {file.relative_to(root).as_posix(): file.read_bytes() for file in root.rglob("*") if file.is_file()}
    hub.add("org/name", files, kind="datasets")
    urls = [f"hf://datasets/org/name/{name}" for name in inputs]
    environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    result = command(*urls, "--out", tmp_path / "remote.npy", "--batch-size=2", **environment)
    assert result.returncode == 3, result.stderr
    assert result.stderr.count("\n") == 1
    assert_same_rows(tmp_path / "remote.npy", tmp_path / "local.npy")
    assert "GET /datasets/org/name/resolve/main/train/a/z.JPEG" in hub.requests
    result = command(urls[1], "hf://datasets/org/name/gone", "--out", tmp_path / "other.npy", **environment)
    assert result.returncode == 1
    assert result.stderr == "robustfeat: hf://datasets/org/name/gone: no such file or folder\n"
    environment["HF_ENDPOINT"] = "http://127.0.0.1:1"
    result = command(*urls, "--out", tmp_path / "other.npy", **environment)  # the Hub is gone
    assert result.returncode == 1
    assert result.stderr.startswith(f"robustfeat: {urls[0]}: cannot be listed")
    assert result.stderr.count("\n") == 1
