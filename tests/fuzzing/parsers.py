"""The parsers that run in the parent process, each with inputs that it accepts."""

from __future__ import annotations

import atexit
import base64
import hashlib
import io
import json
import shutil
import struct
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
from onnx import TensorProto, helper
from PIL import Image

from robustfeat.errors import DataError, DecodeError, HeadError, InputError, ModelFolderError
from robustfeat.hub.catalog import builtin_model
from robustfeat.hub.config import ModelConfig
from robustfeat.hub.external_data import inline_external_data
from robustfeat.hub.float16 import convert_to_float16, with_float32_ends
from robustfeat.hub.folder import CONFIG, ModelFolder
from robustfeat.hub.head_folder import HEAD, TENSORS
from robustfeat.hub.image_files import name_contents, without_png_metadata
from robustfeat.hub.onnx_layout import PROCESSORS, is_onnx_layout, read_onnx_layout
from robustfeat.hub.preprocessing import Preprocessing, decode
from robustfeat.serving.bulk.formats import map_features
from robustfeat.serving.heads.features import open_features
from robustfeat.serving.heads.head import Head
from robustfeat.serving.heads.labels.reading import read_labels
from robustfeat.serving.http.bodies import images_of
from robustfeat.serving.http.keys import parse_keys
from robustfeat.serving.http.openai import _parse
from robustfeat.serving.inputs.parquet import ParquetImages, class_names, find_images
from robustfeat.serving.inputs.tar import TarReader
from robustfeat.serving.online import numbers
from robustfeat.serving.online.content import check_form, data_of_uri, parse_json
from robustfeat.serving.online.errors import ApiError
from robustfeat.serving.online.infer import infer_images, parse_infer
from robustfeat.serving.online.schemas import InferRequest
from robustfeat.training.data.tar_shards import read_shards
from tests.conftest import FEATURES_META
from tests.fuzzing.conversation import converse
from tests.fuzzing.engine import Parser

__all__ = ["PARSERS"]

ROWS, SIZE = 3, 4


@cache
def scratch() -> Path:
    """A folder that lasts as long as this process."""
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    folder = Path(tempfile.mkdtemp(prefix="robustfeat-fuzzing-", dir=memory))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def in_file(name: str, run: Callable[[str], object]) -> Callable[[bytes], object]:
    def of_bytes(data: bytes) -> object:
        file = scratch() / name
        file.write_bytes(data)
        return run(str(file))

    return of_bytes


# --- archives


def archive(kind: int, members: dict[str, bytes], **pax: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=kind) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size, info.pax_headers = len(data), pax
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


SAMPLES = {"a.jpg": b"x", "a.cls": b"3", "d/b.png": b"y" * 600, "d/b.json": b'{"label": 1}', "n" * 120 + ".jpg": b""}


def sign_tar(data: bytes) -> bytes:
    """Headers with checksums that fit."""
    signed = bytearray(data)
    for at in range(0, len(data) - 511, 512):
        if signed[at + 257 : at + 262] == b"ustar":
            signed[at + 148 : at + 156] = b" " * 8
            signed[at + 148 : at + 156] = b"%06o\0 " % sum(signed[at : at + 512])
    return bytes(signed)


def walk_tar(data: bytes) -> None:
    for complete in (False, True):
        try:
            members = list(TarReader(io.BytesIO(data), "a.tar", complete=complete).members())
        except InputError:
            continue
        assert len(members) <= len(data) // 512
        assert all(0 < member.offset <= member.offset + member.size <= len(data) for member in members)


TAR_TOKENS = [
    b"L",
    b"x",
    b"g",
    b"S",
    b"ustar\0",
    b"10 size=9\n",
    b"5 a=\n",
    b"11 path=a\n",
    b"GNU.sparse.name=",
    bytes(512),
]


# --- tables


@cache
def tables() -> list[bytes]:
    import pyarrow as pa
    from pyarrow import parquet

    images = pa.array([b"abc", None, b"x" * 300])
    structs = pa.array([{"bytes": b"abc", "path": "a"}, None, {"bytes": None, "path": "b"}])
    labels = {"huggingface": json.dumps({"info": {"features": {"label": {"names": ["a", "b"]}}}})}
    found = []
    for columns, options in (
        ({"image": images, "label": [0, 1, 1]}, {"compression": "none"}),
        ({"image": structs}, {"compression": "zstd", "data_page_version": "2.0"}),
        ({"image": images.dictionary_encode()}, {"row_group_size": 1}),
    ):
        buffer = io.BytesIO()
        parquet.write_table(pa.table(columns).replace_schema_metadata(labels), buffer, **options)
        found.append(buffer.getvalue())
    return found


def read_table(file: str) -> None:
    from pyarrow import parquet

    column, rows = find_images(file, None)
    class_names(parquet.read_schema(file), "label")
    images = ParquetImages(file, column)
    for row in range(min(rows, 50)):
        images.read(row)


def labels_of(file: str) -> None:
    for multi_label in (False, True):
        try:
            read_labels([file], multi_label=multi_label)
        except InputError:
            continue


CSV = [
    b"path,label\na.jpg,cat\nb.jpg,'=1\n",
    b'\xef\xbb\xbffile;class\r\n"a;b.jpg";NA\r\n',
    "image\tlabel\nä.jpg\t1\n".encode("utf-16"),
    b"a.jpg,1\nb.jpg,2\n",
]
CSV_TOKENS = [b'"', b",", b";", b"\r", b"\n", b"\0", b"path", b"a|b", b"\xff\xfe"]


# --- features


def npy(values: Any, version: tuple[int, int] = (1, 0)) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.asarray(values), version=version, allow_pickle=False)
    return buffer.getvalue()


VALUES = np.arange(ROWS * SIZE, dtype=np.float32).reshape(ROWS, SIZE)


def mapped(suffix: str) -> Callable[[str], object]:
    def read(file: str) -> object:
        with open(file, "rb") as handle:
            return map_features(handle, "f" + suffix, suffix, SIZE, ROWS)

    return read


def tensors(header: Any, values: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + values


FEATURES = tensors({"features": {"dtype": "F32", "shape": [ROWS, SIZE], "data_offsets": [0, 48]}}, VALUES.tobytes())
INDEX = b"".join(
    b'{"row": %d, "path": "%d.jpg", "path_bytes": "YQ==", "sha256": "%064d", "error": null}\n' % (row, row, 0)
    for row in range(ROWS)
)
META = {**FEATURES_META, "device": "cpu", "feature_size": SIZE, "images": ROWS, "format": ".npy"}


def output(index: bytes, meta: bytes | None) -> object:
    values = npy(VALUES)
    hashes = {"features_sha256": hashlib.sha256(values).hexdigest(), "index_sha256": hashlib.sha256(index).hexdigest()}
    contents = {"npy": values, "index.jsonl": index, "meta.json": meta or json.dumps(META | hashes).encode()}
    for suffix, data in contents.items():
        (scratch() / f"f.{suffix}").write_bytes(data)
    return open_features(str(scratch() / "f.npy"))


JSON_TOKENS = [
    b"[", b"{", b"]", b"}", b'"', b",", b":", b"null", b"NaN", b"1e999", b"-1", b"9" * 5000, b'"a":', b"[" * 600, b"{}",
    b'"\\ud800"', b"\xff", b"true", b'"row":', b'"path":', b"1.5",
]  # fmt: skip


def golden(data: bytes) -> object:
    """A model folder whose config.json vouches for these features."""
    folder = model_folder()
    (folder.path / "golden" / "features.npy").write_bytes(data)
    folder.config = folder.config.replace(
        files={**folder.config.files, "golden/features.npy": hashlib.sha256(data).hexdigest()}
    )
    return folder.golden()


@cache
def model_folder() -> ModelFolder:
    built_in = builtin_model()
    path = scratch() / "model"
    (path / "golden").mkdir(parents=True)
    for name in built_in.config.files:
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_bytes((built_in.path / name).read_bytes() if name.startswith("golden/") else b"{}")
    (path / CONFIG).write_bytes(built_in.config_bytes)
    return ModelFolder(path)


@cache
def head_files() -> tuple[bytes, bytes]:
    head = Head(
        kind="svm", classes=("a", "b", "c"), scaling="none", multi_label=False, model=None,
        arrays={"coefficients": np.ones((3, SIZE)), "intercepts": np.ones(3)},
    )  # fmt: skip
    folder = scratch() / "head"
    folder.mkdir()
    head.write(folder)
    return (folder / HEAD).read_bytes(), (folder / TENSORS).read_bytes()


def head_of(text: bytes, data: bytes) -> object:
    folder = scratch() / "head"
    (folder / HEAD).write_bytes(text)
    (folder / TENSORS).write_bytes(data)
    return Head.load(folder)


def head_of_tensors(data: bytes) -> object:
    text, _ = head_files()
    about = json.loads(text) | {f"{TENSORS}_sha256": hashlib.sha256(data).hexdigest()}
    return head_of(json.dumps(about).encode(), data)


# --- ONNX

ONNX_TOKENS = [b"\x3a", b"\x0a", b"\x80", b"\x70\x01"]


def network() -> bytes:
    weights = TensorProto(name="w", data_type=1, dims=[2], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", "w.bin"), ("offset", "4"), ("length", "8")):
        weights.external_data.add(key=key, value=value)
    inner = helper.make_graph([], "inner", [], [], [weights])
    node = helper.make_node("If", ["x"], ["y"], then_branch=inner, value=weights)
    model = helper.make_model(helper.make_graph([node], "g", [], [], [weights]))
    data: bytes = model.SerializeToString()
    return data


# --- images


def half_network() -> bytes:
    """A network with every kind of node and value that the conversion to fp16 changes."""
    tensor, node = helper.make_tensor, helper.make_node
    inner = helper.make_graph(
        [node("Constant", [], ["c"], value_floats=[0.5]), node("Mul", ["b", "c"], ["m"])],
        "inner", [], [helper.make_tensor_value_info("m", TensorProto.FLOAT, None)],
    )  # fmt: skip
    nodes = [
        node("BatchNormalization", ["pixel_values", "v", "v", "v", "v"], ["b"], epsilon=1e-3),
        node("Resize", ["b", "", "s"], ["r"]),
        node("If", ["y"], ["i"], then_branch=inner, else_branch=inner),
        node("Cast", ["i"], ["features"], to=TensorProto.FLOAT),
    ]
    graph = helper.make_graph(
        nodes, "g",
        [helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, ["n", 3, 4, 4])],
        [helper.make_tensor_value_info("features", TensorProto.FLOAT16, ["n", 3])],
        [
            tensor("v", TensorProto.FLOAT, [3], [1, 2, 3]),
            tensor("s", TensorProto.FLOAT, [4], [1, 1, 2, 2]),
            tensor("y", TensorProto.BOOL, [], [True]),
        ],
    )  # fmt: skip
    return bytes(helper.make_model(graph).SerializeToString())


def halve(data: bytes) -> None:
    with suppress(ValueError):
        with_float32_ends(data)
    convert_to_float16(data)


def png_file() -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((9, 7), 50).convert("P").save(buffer, "PNG", transparency=bytes(9))
    plain = buffer.getvalue()
    chunks = [
        len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")
        for kind, body in (
            (b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(b"exif")),
            (b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(b"<x/>")),
            (b"iCCP", b"x\0\0" + zlib.compress(b"icc")),
        )
    ]
    return plain[:33] + b"".join(chunks) + plain[33:]


def picture(kind: str, mode: str = "RGB", **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((9, 7), 50).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def see(data: bytes) -> None:
    without_png_metadata(data)
    name_contents(data)
    name_contents(data[4:])


def sign_png(data: bytes) -> bytes:
    signed, at = bytearray(data), 8
    while at + 12 <= len(signed):
        end = at + 8 + int.from_bytes(signed[at : at + 4], "big")
        if end + 4 > len(signed):
            break
        signed[end : end + 4] = zlib.crc32(signed[at + 4 : end]).to_bytes(4, "big")
        at = end + 4
    return bytes(signed)


# --- HTTP


FORM = (
    b'--cut\r\nContent-Disposition: form-data; name="images"; filename="a.jpg"\r\n'
    b"Content-Type: image/jpeg\r\n\r\nabc\r\n"
    b'--cut\r\nContent-Disposition: form-data; name="model"\r\n\r\nbuiltin\r\n--cut--\r\n'
)
URI = "data:image/jpeg;base64," + base64.b64encode(b"abc").decode()
INFER = {
    "id": "1",
    "inputs": [{"name": "images", "datatype": "BYTES", "shape": [1], "parameters": {"binary_data_size": 7}}],
    "outputs": [{"name": "features", "parameters": {"binary_data": True}}],
}
NUMBERS = {"name": "pixel_values", "datatype": "FP32", "shape": [1, 3, 1, 1], "data": [[[[1]], [[2]], [[0.5]]]]}


def ask_in_json(data: bytes) -> None:
    text = data.decode("latin-1")
    with suppress(ApiError):
        _parse(data, 64)
    with suppress(ApiError):
        check_form(InferRequest, parse_json(data))
    with suppress(ValueError):
        data_of_uri(text)


GET = b"GET /health/live HTTP/1.1\r\nHost: localhost\r\n\r\n"
CHUNKED = (
    b"POST /embed HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nTrailer: x\r\n\r\n"
    b"3;ext=1\r\nabc\r\n0\r\nx: y\r\n\r\n"
)
UPGRADE = b"PUT /v2 HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nUpgrade: h2c\r\nConnection: upgrade\r\n\r\nabcde"


HEADER_TOKENS = [b"(", b"-", b"{", b"'descr':", b"'<f4'", b"'|O'", b"L", b"[", b"\\", b"9" * 5000]
CONFIG_TOKENS = [b'"files":', b'"preprocessing":', b'"robustfeat":', b'"evaluations":', b'"image_size":']
PROCESSOR_TOKENS = [
    b'"shortest_edge":',
    b'"crop_pct":',
    b'"resample":',
    b"9" * 500,
    b"1e-300",
    b"1e999",
    b"NaN",
    b"null",
]
PROCESSOR_FILES = [
    json.dumps({"image_processor_type": f"{name}ImageProcessor", **settings}).encode()
    for name, settings in {
        "ConvNext": {"size": {"shortest_edge": 64}, "crop_pct": 0.9},
        "EfficientNet": {"size": 64, "rescale_offset": True, "rescale_factor": 0.1, "image_std": [0.1, 0.2, 0.3]},
        "CLIP": {"size": 64, "crop_size": {"height": 60, "width": 60}, "do_pad": True, "pad_size": 60},
    }.items()
]
IMAGES = [("PNG", "LA", {}), ("TIFF", "RGB", {}), ("TIFF", "L", {"compression": "tiff_lzw"}), ("GIF", "P", {}),
          ("TIFF", "CMYK", {"compression": "tiff_adobe_deflate"}), ("BMP", "RGB", {}), ("JPEG", "RGB", {}),
          ("WEBP", "RGBA", {})]  # fmt: skip
IMAGE_TOKENS = [b"II*\0", b"MM\0*", b"\x1c\x01\x03\0\x01\0\0\0\x02\0\0\0", b"tRNS", b"PLTE"]
PNG_TOKENS = [b"zTXt", b"iTXt", b"IDAT", b"XML:com.adobe.xmp\0", bytes(4), zlib.compress(bytes(2**20))]
FORM_TOKENS = [b"--cut", b"\r\n", b"\r\n--cut--\r\n", b"; name=", b'"', b"Content-Disposition:", b"\r\n\r\n", b"\\"]
TYPE_TOKENS = [b";", b"=", b'"', b"\\", b"boundary*=utf-8''cut", b"boundary=", b" "]
ASKED_TOKENS = [*JSON_TOKENS, b'"input":', b'"inputs":', b'"shape":', b"data:;base64,", b"%2B", b"1,"]
HTTP_TOKENS = [
    b"\r\n", b"\r\n\r\n", b"0\r\n", b"Host: b\r\n", b"Upgrade: h2c\r\n", b"Transfer-Encoding: chunked\r\n", GET,
    b"HTTP/1.0", b"Connection: close\r\n", b"Content-Length: 1\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"\n", b"\0",
    b"f" * 16, b"Expect: 100-continue\r\n",
]  # fmt: skip
KEY_TOKENS = [b"rate=", b"concurrency=", b"nan", b"inf", b"1e999", b"\x85", b"\n", b"=", b"9" * 5000, b"_", b"\xb2"]
KEYS = [b"# who\nanna 12345678 rate=2.5 concurrency=3\nbert abcdefghij\n"]
VALUE = np.arange(192, dtype=np.float32).reshape(1, 3, 8, 8) / 4
PIXELS = [
    json.dumps(
        {"inputs": [{"name": "pixel_values", "datatype": "FP32", "shape": [1, 3, 8, 8], "data": data.tolist()}]}
    ).encode()
    for data in (VALUE, VALUE.ravel())
]
ASKED = [{"model": "m", "input": [URI], "encoding_format": "base64"}, INFER, {"inputs": [NUMBERS]}]


def make_shard() -> bytes:
    return archive(tarfile.GNU_FORMAT, {name: data for name, data in SAMPLES.items() if len(name) < 9})


def read_config(data: bytes) -> object:
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):  # which `ModelFolder` catches
        return None
    return ModelConfig.from_dict(content, "config.json")


def read_processor(data: bytes) -> object:
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):  # which `ModelFolder` catches
        return None
    config = {"model_type": "dinov2", **content} if isinstance(content, dict) else None
    if not is_onnx_layout(config):
        return None
    assert config is not None
    return read_onnx_layout(config, content, dict.fromkeys(PROCESSORS, "0" * 64), "0" * 64, "model")


def infer_both_ways(data: bytes) -> None:
    """An array of numbers that is read in slices gives what it gives within the rest of the request."""
    model: Any = SimpleNamespace(extractor=SimpleNamespace(config=SimpleNamespace(preprocessing=Preprocessing(8))))
    found: list[Any] = []
    for long_bytes in (16, 2**30):
        with mock.patch.object(numbers, "_LONG_BYTES", long_bytes):
            try:
                asked, rest = parse_infer(data, None)
                found.append(infer_images(asked.inputs[0], rest, model, 4))
            except ApiError:
                found.append(None)
    assert (found[0] is None) == (found[1] is None), found
    if found[0] is not None:
        assert all(np.array_equal(one, other) for one, other in zip(*found, strict=True))


PARSERS: dict[str, Callable[[], Parser]] = {
    "tar": lambda: Parser(
        walk_tar,
        [
            archive(tarfile.GNU_FORMAT, SAMPLES),
            archive(tarfile.PAX_FORMAT, SAMPLES, path="b.jpg", comment="c"),
            archive(tarfile.PAX_FORMAT, SAMPLES, **{"GNU.sparse.name": "s.jpg", "GNU.sparse.major": "1"}),
        ],
        (InputError,),
        TAR_TOKENS,
        sign_tar,
    ),
    "shard": lambda: Parser(
        in_file("train-0.tar", lambda file: read_shards([Path(file)])),
        [make_shard()],
        (DataError,),
        [*JSON_TOKENS, b'{"label":', b'"cls":', b"a.jpg", b"a.cls"],
        sign_tar,
    ),
    "parquet": lambda: Parser(
        in_file("a.parquet", read_table),
        tables(),
        (InputError,),
        [*JSON_TOKENS, b"PAR1", b"image", b"bytes"],
        seconds=2,
    ),
    "labels": lambda: Parser(in_file("a.csv", labels_of), CSV, (InputError,), CSV_TOKENS),
    "npy": lambda: Parser(
        in_file("f.npy", mapped(".npy")), [npy(VALUES), npy(VALUES, (2, 0))], (InputError,), HEADER_TOKENS
    ),
    "golden": lambda: Parser(golden, [npy(np.zeros((8, 512), np.float32))], (ModelFolderError,), HEADER_TOKENS),
    "safetensors": lambda: Parser(
        in_file("f.safetensors", mapped(".safetensors")), [FEATURES], (InputError,), JSON_TOKENS
    ),
    "index": lambda: Parser(lambda data: output(data, None), [INDEX], (InputError,), JSON_TOKENS),
    "meta": lambda: Parser(
        lambda data: output(INDEX, data),
        [json.dumps(META).encode()],
        (InputError,),
        [*JSON_TOKENS, *(f'"{key}":'.encode() for key in META)],
    ),
    "config": lambda: Parser(
        read_config, [builtin_model().config_bytes], (ModelFolderError,), [*JSON_TOKENS, *CONFIG_TOKENS]
    ),
    "image-processor": lambda: Parser(
        read_processor, PROCESSOR_FILES, (ModelFolderError,), [*JSON_TOKENS, *PROCESSOR_TOKENS]
    ),
    "head": lambda: Parser(lambda data: head_of(data, head_files()[1]), [head_files()[0]], (HeadError,), JSON_TOKENS),
    "head-tensors": lambda: Parser(
        head_of_tensors, [head_files()[1]], (HeadError,), [*JSON_TOKENS, b'"__metadata__":']
    ),
    "onnx": lambda: Parser(
        lambda data: inline_external_data(data, lambda _: bytes(16)),
        [network()],
        (ValueError,),
        [b"location", *ONNX_TOKENS],
    ),
    "fp16": lambda: Parser(halve, [half_network()], (ValueError,), ONNX_TOKENS),
    "png": lambda: Parser(see, [png_file()], (), PNG_TOKENS),
    "image": lambda: Parser(
        decode,
        [png_file(), *(picture(kind, mode, **options) for kind, mode, options in IMAGES)],
        (DecodeError,),
        IMAGE_TOKENS,
        sign_png,
        seconds=3,
    ),
    "form": lambda: Parser(
        lambda data: images_of("multipart/form-data; boundary=cut", data, 64),
        [FORM, FORM.replace(b"filename", b"filename*")],
        (ApiError,),
        FORM_TOKENS,
    ),
    "content-type": lambda: Parser(
        lambda data: images_of(data.decode("latin-1"), FORM, 64),
        [b'multipart/form-data; boundary="cut"'],
        (ApiError,),
        TYPE_TOKENS,
    ),
    "json": lambda: Parser(
        ask_in_json, [URI.encode(), *(json.dumps(asked).encode() for asked in ASKED)], (), ASKED_TOKENS
    ),
    "infer": lambda: Parser(infer_both_ways, PIXELS, (), [*ASKED_TOKENS, b"],[", b"]]", b"[[", b"0.5", b'"data":[']),
    "http": lambda: Parser(
        converse, [b"\xff" + GET, b"\x01" + CHUNKED, b"\x02" + UPGRADE + GET, b"\x80" + GET * 3], (), HTTP_TOKENS
    ),
    "keys": lambda: Parser(
        lambda data: parse_keys(data.decode("latin-1").splitlines()), KEYS, (InputError,), KEY_TOKENS
    ),
}
"""By name; each is made when it is first needed."""


def found(name: str) -> Iterator[bytes]:
    """Inputs that were findings once."""
    for file in sorted((Path(__file__).parent / "found").glob(f"{name}-*")):
        yield file.read_bytes()
