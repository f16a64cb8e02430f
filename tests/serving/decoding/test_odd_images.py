"""Broken and odd images in one folder: each gives one right row or one right reason, whatever lies beside it.

What is right comes from torchvision and ONNX Runtime, and from the pictures as they were before they were encoded.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import json
import os
import pickle
import re
import shutil
import socket
import struct
import subprocess
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pillow_heif
import pyarrow as pa
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper
from PIL import Image
from pyarrow import parquet
from torchvision.transforms import v2

from robustfeat import FeatureExtractor
from robustfeat.serving.bulk.embedding import EmbeddingResult, embed_files
from robustfeat.serving.decoding import process as decoders
from robustfeat.serving.inputs.listing import list_inputs
from robustfeat.serving.verify import cosine
from robustfeat.training.export.onnx_import import import_onnx
from tests.conftest import Run

Completed = subprocess.CompletedProcess[str]
Picture = Image.Image
Encode = Callable[[Picture], bytes]
Reference = Callable[[Picture], NDArray[np.float32]]


def encode(image: Picture, kind: str, *more: Picture, **options: Any) -> bytes:
    """An image file; `more` are further frames or pages."""
    options |= {"quality": 100, "subsampling": 0} if kind in {"jpeg", "mpo"} else {}
    options |= {"lossless": True, "exact": True, "method": 0} if kind == "webp" else {}
    options |= {"quality": 100, "subsampling": "4:4:4"} if kind == "avif" else {}
    if kind == "heic":
        return heic(pillow_heif.from_pillow(image), *more, **options)
    options |= {"save_all": True, "append_images": [frame.copy() for frame in more]} if more else {}
    buffer = io.BytesIO()
    image.copy().save(buffer, kind, **options)  # a copy: Pillow leaves notes of its own in what it saves
    return buffer.getvalue()


def heic(file: pillow_heif.HeifFile, *more: Picture, **options: Any) -> bytes:
    for other in more:
        file.add_from_pillow(other)
    buffer = io.BytesIO()
    file.save(buffer, quality=-1, chroma=444, **options)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, depth: int, colour: int, rows: bytes = b"") -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def sized(data: bytes, width: int, height: int) -> bytes:
    """An AVIF or HEIC file that claims another size."""
    return patched(data, data.index(b"ispe") + 8, ">II", width, height)


def deep(image: Picture, mode: str) -> bytes:
    """HEIC of 10 bits."""
    values = np.asarray(image.convert("L") if mode == "I;16" else image).astype("<u2") * 257
    return heic(pillow_heif.from_bytes(mode, image.size, values.tobytes()))


def multiplied(image: Picture) -> bytes:
    """HEIC whose colours are multiplied with their alpha."""
    return heic(pillow_heif.from_bytes("RGBa", image.size, hidden_top(image).convert("RGBa").tobytes()))


def png_with(image: Picture, kind: bytes, data: bytes) -> bytes:
    plain = encode(image, "png")
    return plain[:33] + chunk(kind, data) + plain[33:]


def patched(data: bytes, at: int, form: str, *values: int) -> bytes:
    return data[:at] + struct.pack(form, *values) + data[at + struct.calcsize(form) :]


def retagged(tiff: bytes, tag: int, value: int) -> bytes:
    entry = next(entry for kind in (3, 4) if (entry := struct.pack("<HHI", tag, kind, 1)) in tiff)
    return patched(tiff, tiff.index(entry) + len(entry), "<I", value)


@cache
def zeros() -> bytes:
    """64 MiB of them, compressed."""
    return zlib.compress(bytes(2**26), 1)


def half(data: bytes) -> bytes:
    return data[: len(data) // 2]


def half_file(image: Picture, kind: str) -> bytes:
    return half(encode(image, kind))


def animated(image: Picture, kind: str) -> bytes:
    return encode(image, kind, image.rotate(180))


def turned(image: Picture, kind: str, orientation: int = 6) -> bytes:
    """Its pixels lie on their side, or stand on their head, and the metadata say so."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    side = image.rotate({3: 180, 6: 90}[orientation], expand=True)
    return encode(side, kind, exif=exif.tobytes() if kind == "heic" else exif)


def seen_through(image: Picture) -> Picture:
    image = image.copy()
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    return image


def on_white(image: Picture) -> Picture:
    seen = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", seen.size, "white"), seen).convert("RGB")


def hidden_top(image: Picture) -> Picture:
    """Transparent above what the network sees."""
    image = image.copy()
    image.putalpha(255)
    image.paste((0, 0, 0, 0), (0, 0, image.width, 20))
    return image


def grey16(image: Picture, kind: str = "<u2", flip: int = 0) -> Picture:
    return Image.fromarray((np.asarray(image.convert("L")).astype(np.uint16) * 256 + 77 ^ flip).astype(kind))


def grey12(image: Picture) -> bytes:
    values = np.asarray(image.convert("L")).astype(int) * 16
    even, odd = values[:, ::2], values[:, 1::2]
    packed = np.stack([even >> 4, (even & 15) << 4 | odd >> 8, odd & 255], 2).reshape(image.height, -1)
    data = encode(Image.fromarray(packed.astype(np.uint8)), "tiff")
    return retagged(retagged(data, 256, image.width), 258, 12)


def rgb16(image: Picture) -> bytes:
    pixels = np.asarray(image)
    rows = np.stack([pixels, 255 - pixels], 3).reshape(image.height, -1)
    return png(*image.size, 16, 2, np.pad(rows, ((0, 0), (1, 0))).tobytes())


def noise(width: int, height: int) -> Picture:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


def blown_up(image: Picture) -> Picture:
    return image.resize((90, 90)).convert("1").resize((9000, 9000), Image.Resampling.NEAREST)


def webp_canvas(image: Picture, width: int, height: int) -> bytes:
    data = encode(image, "webp", image.rotate(180))
    return data[:24] + struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3] + data[30:]


def rgba(image: Picture, kind: str) -> bytes:
    return encode(seen_through(image), kind)


def scans(image: Picture, count: int) -> bytes:
    """A progressive JPEG that goes over its picture `count` times more, for a few bytes each."""
    data = encode(image, "jpeg", progressive=True)
    return data[:-2] + data[data.rindex(b"\xff\xda") : -2] * count + data[-2:]


ODD_NAMES = ["e" * 251 + ".png", "🎩.png", "line\nfeed.png", "line\u2028.png", "\udcff.png", "'\"`*?[\\.png", "A.PNG"]
GOOD: dict[str, Encode] = {
    "1x1.png": lambda p: encode(p.resize((1, 1)), "png"),
    "1x20000.png": lambda _: encode(noise(1, 20000), "png"),
    "20000x1.png": lambda _: encode(noise(20000, 1), "png"),
    "9000x9000.png": lambda p: encode(blown_up(p), "png"),
    **{f"animated.{kind}": partial(animated, kind=kind) for kind in ("png", "webp", "tiff", "avif", "heic")},
    "animated.gif": lambda p: encode(p.quantize(64), "gif", p.rotate(180).quantize(64)),
    "bomb-exif.png": lambda p: png_with(p, b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(bytes(2**26))),
    "bomb-icc.png": lambda p: png_with(p, b"iCCP", b"icc\0\0" + zlib.compress(bytes(2**26))),
    "bomb-itxt.png": lambda p: png_with(p, b"iTXt", b"k\0\1\0\0\0" + zlib.compress(bytes(2**26))),
    "bomb-ztxt.png": lambda p: png_with(p, b"zTXt", b"k\0\0" + zlib.compress(bytes(2**26))),
    "avif.jpg": lambda p: encode(p, "avif"),
    "cmyk-adobe.jpg": lambda p: encode(p.convert("CMYK"), "jpeg"),  # inverted, and saying so
    "cmyk.jpg": lambda p: re.sub(rb"(?s)\xff\xee\0\x0eAdobe.{7}", b"", encode(p.convert("CMYK"), "jpeg"), count=1),
    "fax.tif": lambda p: encode(p.convert("1"), "tiff", compression="group4"),
    "folder.jpg/photo.png": lambda p: encode(p, "png"),
    "gif.tiff": lambda p: encode(p.quantize(64), "gif"),
    "grey-alpha.png": lambda p: encode(seen_through(p.convert("L")), "png"),
    "grey.avif": lambda p: encode(p.convert("L"), "avif"),
    "grey.heic": lambda p: encode(p.convert("L"), "heic"),
    "grey10.heic": lambda p: deep(p, "I;16"),
    "grey12.tif": grey12,
    "grey16.png": lambda p: encode(grey16(p), "png"),
    "grey16.tif": lambda p: encode(grey16(p), "tiff"),
    "grey16-big-endian.tif": lambda p: encode(grey16(p, ">u2"), "tiff"),
    "grey16-white-is-0.tif": lambda p: retagged(encode(grey16(p, flip=0xFFFF), "tiff"), 262, 0),
    "heic.jpg": lambda p: encode(p, "heic"),
    "jpeg.png": lambda p: encode(p, "jpeg"),
    "junk-behind.jpg": lambda p: encode(p, "jpeg") + b"junk" * 100,
    "junk-exif.jpg": lambda p: encode(p, "jpeg", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f\x01"),
    "junk-exif.png": lambda p: png_with(p, b"eXIf", b"II*\0\x08\0\0\0\xff\xff" + b"\xff" * 40),
    "junk-exif.webp": lambda p: encode(p, "webp", exif=b"Exif\0\0junk"),
    "junk-icc.jpg": lambda p: encode(p, "jpeg", icc_profile=b"junk" * 100),
    "junk-chunks.png": lambda p: png_with(p, b"pHYs", b"1")[:-12] + chunk(b"sRGB", b"") + chunk(b"IEND", b""),
    "junk-icc.png": lambda p: png_with(p, b"iCCP", b"name\0\0no zlib stream"),
    "junk-mpf.jpg": lambda p: encode(p, "jpeg").replace(b"\xff\xdb", b"\xff\xe2\0\x0aMPF\0junk\xff\xdb", 1),
    "lzw.tif": lambda p: encode(p, "tiff", compression="tiff_lzw"),
    "multiplied.heic": multiplied,
    "mpo.jpg": lambda p: encode(p, "mpo", p.rotate(180)),
    "one-bit.png": lambda p: encode(p.convert("1"), "png"),
    "palette.png": lambda p: encode(p.quantize(64), "png", transparency=bytes(range(64))),
    "png.jpg": lambda p: encode(p, "png"),
    "progressive.jpg": lambda p: encode(p, "jpeg", progressive=True),
    "rgb10.heic": lambda p: deep(p, "RGB;16"),
    "rgb16.png": rgb16,
    **{f"rgba.{kind}": partial(rgba, kind=kind) for kind in ("png", "webp", "tiff", "avif", "heic")},
    **{f"turned.{kind}": partial(turned, kind=kind) for kind in ("jpeg", "png", "webp", "tiff", "avif", "heic")},
    "tiles.heif": lambda p: encode(p.resize((600, 780)), "heic", tile_size=256),
    "turned-over.tif": lambda p: turned(p, "tiff", 3),
    **dict.fromkeys(ODD_NAMES, lambda p: encode(p, "png")),
}
# What they show, where it is not simply the photograph.
SHOWN: dict[str, Callable[[Picture], Picture]] = {
    "1x1.png": lambda p: p.resize((1, 1)),
    # The middle is all that the network sees.
    "1x20000.png": lambda _: noise(1, 20000).crop((0, 9900, 1, 10_100)),
    "tiles.heif": lambda p: p.resize((600, 780)),
    "20000x1.png": lambda _: noise(20000, 1).crop((9900, 0, 10_100, 1)),
    "9000x9000.png": blown_up,
    **dict.fromkeys(["animated.gif", "gif.tiff"], lambda p: p.quantize(64)),
    "palette.png": lambda p: on_white(Image.open(io.BytesIO(GOOD["palette.png"](p)))),
    **dict.fromkeys(["fax.tif", "one-bit.png"], lambda p: p.convert("1")),
    **dict.fromkeys([name for name in GOOD if name.startswith("grey")], lambda p: p.convert("L")),
    **dict.fromkeys([name for name in GOOD if name.startswith("rgba.")], lambda p: on_white(seen_through(p))),
    "grey-alpha.png": lambda p: on_white(seen_through(p.convert("L"))),
}

FOREIGN = "not an image of these formats: JPEG, PNG"
TRUNCATED = "damaged: image file is truncated"
HUGE = "over the limit of 100,000,000 pixels"
BAD: dict[str, tuple[Encode, str]] = {
    "bomb.avif": (lambda p: sized(encode(p, "avif"), 60000, 60000), "60000 x 60000 is over the limit of libavif"),
    "bomb.bmp": (lambda p: patched(encode(p, "bmp"), 18, "<ii", 60000, -60000), HUGE),
    "bomb.gif": (lambda p: patched(encode(p.quantize(64), "gif"), 6, "<HH", 60000, 60000), HUGE),
    "wide.heic": (lambda p: sized(encode(p, "heic"), 2**32 - 1, 1), "damaged: "),
    "bomb.heic": (lambda p: sized(encode(p, "heic"), 60000, 60000), f"60000 x 60000 is {HUGE}"),
    "bomb.png": (lambda _: png(60000, 60000, 8, 2), HUGE),
    "bomb.tif": (lambda p: retagged(retagged(encode(p, "tiff"), 256, 60000), 257, 60000), HUGE),
    "bomb.webp": (lambda p: webp_canvas(p, 16383, 16383), HUGE),
    "bomb-small.avif": (lambda p: sized(encode(p, "avif"), 11000, 11000), f"11000 x 11000 is {HUGE}"),
    "bomb-small.png": (lambda _: png(11000, 11000, 1, 0), f"11000 x 11000 is {HUGE}"),
    "bomb-wide.webp": (lambda p: webp_canvas(p, 2**24, 255), HUGE),
    "eps.jpg": (lambda p: encode(p, "eps"), FOREIGN),
    "float.tif": (lambda p: encode(p.convert("F"), "tiff"), ".*have no defined range; save it with 8 or 16"),
    **{f"half.{k}": (partial(half_file, kind=k), TRUNCATED) for k in ("bmp", "gif", "jpeg", "png", "tiff")},
    "half.avif": (lambda p: half(encode(p, "avif")), "damaged: Failed to decode"),
    "half.heic": (lambda p: half(encode(p, "heic")), "damaged: Invalid input: Unexpected end of file"),
    "half.webp": (lambda p: half(encode(p, "webp")), "damaged: "),
    "half-lzw.tif": (lambda p: half(encode(p, "tiff", compression="tiff_lzw")), f"damaged: |{FOREIGN}"),
    "half-progressive.jpg": (lambda p: half(encode(p, "jpeg", progressive=True)), TRUNCATED),
    "header.avif": (lambda p: encode(p, "avif")[:20], "damaged: Failed to decode image: Truncated data"),
    "header.heic": (lambda p: encode(p, "heic")[:20], "damaged: Invalid input: "),
    "header.jpg": (lambda p: encode(p, "jpeg")[:100], "damaged: "),
    "html.png": (lambda _: b"<!DOCTYPE html><title>404</title>", FOREIGN),
    "int32.tif": (lambda p: encode(Image.new("I", p.size, 2**20), "tiff"), ".*have no defined range"),
    "junk-before.jpg": (lambda p: b"junk" + encode(p, "jpeg"), FOREIGN),
    "pdf.jpg": (lambda p: encode(p, "pdf"), FOREIGN),
    "pickle.jpg": (lambda p: pickle.dumps(np.asarray(p)), FOREIGN),
    "svg.png": (lambda _: b'<svg xmlns="http://www.w3.org/2000/svg"/>', FOREIGN),
    "text.jpg": (lambda _: b"hello\n", FOREIGN),
    "wrong-sum.png": (lambda p: patched(encode(p, "png"), 29, ">I", 0), f"damaged: |{FOREIGN}"),
    "zero-bytes.jpg": (lambda _: b"", "the file is empty"),
    "wrong-size.heic": (lambda p: sized(encode(p, "heic"), 100, 100), "damaged: Invalid input: Invalid image size"),
    "zeros.png": (lambda _: bytes(10_000), FOREIGN),
}
LINKS = {
    "dangling.jpg": ("nowhere", "No such file"),
    "device.jpg": ("/dev/zero", "not a regular file"),
    "loop.jpg": ("loop.jpg", "Too many levels of symbolic links"),
    "long-target.jpg": ("x" * 300, "File name too long"),
    "not-a-folder.jpg": ("text.jpg/x.jpg", "Not a directory"),
    "process.jpg": ("/proc/self/mem", "Input/output error|No such file"),
}
NO_FILES = {
    "pipe.jpg": "not a regular file",
    "socket.jpg": "No such device or address|not a regular file",
    "sparse.tiff": "over the limit of 536,870,912 bytes",
    "unreadable.jpg": "Permission denied",
}
REASONS = {name: reason for name, (_, reason) in (BAD | LINKS).items()} | NO_FILES | {"named.eps": FOREIGN}


@dataclass
class Corpus:
    """The folder of all these, and what came of it."""

    arguments: list[Path]
    out: Path
    result: EmbeddingResult
    records: dict[str, dict[str, Any]]
    features: NDArray[np.float32]
    expected: dict[str, NDArray[np.float32]]


@pytest.fixture(scope="module")
def extractor(tmp_path_factory: pytest.TempPathFactory) -> FeatureExtractor:
    # Means of pixels: a network passes on what the last bits of a resize differ by, more or less as it was trained.
    file = tmp_path_factory.mktemp("means") / "means.onnx"
    nodes = [
        helper.make_node("AveragePool", ["pixels"], ["means"], kernel_shape=[8, 8], strides=[8, 8]),
        helper.make_node("Flatten", ["means"], ["features"]),
    ]
    taken = helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["batch", 3, 64, 64])
    given = helper.make_tensor_value_info("features", TensorProto.FLOAT, ["batch", 192])
    graph = helper.make_graph(nodes, "means", [taken], [given])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), file)
    import_onnx(file, file.parent / "model", mean=[0.5], std=[0.25], crop_pct=1.0, int8=False)
    return FeatureExtractor.from_pretrained(file.parent / "model", threads=2, streams=2)


@pytest.fixture(scope="module")
def reference(extractor: FeatureExtractor) -> Reference:
    """A picture's vector by torchvision and ONNX Runtime alone."""
    folder = extractor.folder
    contract = json.loads((folder.path / "config.json").read_text())["robustfeat"]["preprocessing"]
    side = contract["image_size"]
    session = onnxruntime.InferenceSession(folder.onnx("fp32"), providers=["CPUExecutionProvider"])
    transform = v2.Compose(
        [
            v2.Resize(int(side / contract["crop_pct"]), v2.InterpolationMode(contract["interpolation"])),
            v2.CenterCrop(side),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(contract["mean"], contract["std"]),
        ]
    )
    return lambda image: session.run(None, {"pixel_values": transform(image.convert("RGB"))[None].numpy()})[0]


@pytest.fixture(scope="module")
def photos(example_files: list[Path]) -> list[Picture]:
    return [Image.open(file).convert("RGB").resize((200, 260)) for file in example_files]


def read_index(out: Path) -> dict[str, dict[str, Any]]:
    """By path: the name as the system gives it."""
    rows = [json.loads(line) for line in out.with_suffix(".index.jsonl").read_bytes().splitlines()]
    raw = [base64.b64decode(row["path_bytes"]) if "path_bytes" in row else row["path"].encode() for row in rows]
    return {os.fsdecode(path): row for path, row in zip(raw, rows, strict=True)}


@pytest.fixture(scope="module")
def corpus(
    extractor: FeatureExtractor,
    reference: Reference,
    photos: list[Picture],
    example_files: list[Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Corpus:
    folder = tmp_path_factory.mktemp("odd")
    root, out = folder / "in", folder / "out" / "feats.npy"
    (root / "folder.jpg").mkdir(parents=True)
    out.parent.mkdir()
    expected = {}
    for number, (name, write) in enumerate(GOOD.items()):
        photo = photos[number % len(photos)]
        (root / name).write_bytes(write(photo))
        expected[name] = reference(SHOWN.get(name, Picture.copy)(photo))
    for name, (write, _) in BAD.items():
        (root / name).write_bytes(write(photos[0]))
    for name, (target, _) in {**LINKS, "linked.jpg": ("folder.jpg", ""), "self": (".", "")}.items():
        (root / name).symlink_to(target)
    os.mkfifo(root / "pipe.jpg")
    with contextlib.chdir(root), socket.socket(socket.AF_UNIX) as server:
        server.bind("socket.jpg")  # a whole path may be too long for a socket
    (root / "sparse.tiff").touch()
    os.truncate(root / "sparse.tiff", 2**29 + 1)
    shutil.copy(example_files[0], root / "unreadable.jpg")
    (root / "unreadable.jpg").chmod(0)
    (root / "notes.txt").touch()
    (folder / "named.eps").write_bytes(encode(photos[0], "eps"))
    arguments = [root, folder / "named.eps"]
    with list_inputs(arguments) as inputs:
        result = embed_files(extractor, inputs, out, batch_size=8, workers=2, quiet=True)
    return Corpus(arguments, out, result, read_index(out), np.load(out), expected)


def test_every_file_is_one_row_and_nothing_is_left_behind(corpus: Corpus) -> None:
    inside = [*GOOD, *BAD, *LINKS, *NO_FILES, "linked.jpg/photo.png"]
    assert list(corpus.records) == [*sorted(inside, key=os.fsencode), "named.eps"]
    assert [row["row"] for row in corpus.records.values()] == list(range(len(inside) + 1))
    assert corpus.features.shape == (corpus.result.images, 192) == (len(inside) + 1, 192)
    assert corpus.result.skipped == 2  # notes.txt, and the folder in itself
    outputs = {file.name for file in corpus.out.parent.iterdir()}
    assert outputs == {"feats.npy", "feats.index.jsonl", "feats.meta.json"}


@pytest.mark.filterwarnings("ignore:::PIL")
@pytest.mark.parametrize("name", GOOD)
def test_row_is_right_when_the_image_is_odd(corpus: Corpus, extractor: FeatureExtractor, name: str) -> None:
    record, data = corpus.records[name], (corpus.arguments[0] / name).read_bytes()
    vector = corpus.features[[record["row"]]]
    assert record["error"] is None
    assert record["sha256"] == hashlib.sha256(data).hexdigest()
    assert cosine(vector, extractor.embed([data])) >= 0.999999  # as when it is alone
    # libavif writes colours that are half a level off.
    assert cosine(vector, corpus.expected[name]) >= (0.999 if "avif" in name else 0.9999)


def test_archives_and_tables_hold_avif_and_heic(corpus: Corpus, extractor: FeatureExtractor, tmp_path: Path) -> None:
    names = ["avif.jpg", "rgba.avif", "tiles.heif", "turned.heic"]
    files = {name: (corpus.arguments[0] / name).read_bytes() for name in names}
    with tarfile.open(tmp_path / "shard.tar", "w") as archive:
        for name in names:
            archive.add(corpus.arguments[0] / name, name)
    parquet.write_table(pa.table({"image": list(files.values())}), tmp_path / "table.parquet")
    out = tmp_path / "feats.npy"
    with list_inputs([tmp_path / "shard.tar", tmp_path / "table.parquet"]) as inputs:
        assert embed_files(extractor, inputs, out, workers=1, quiet=True).failed == 0
    expected = corpus.features[[corpus.records[name]["row"] for name in names]]
    assert cosine(np.load(out), np.concatenate([expected, expected])).min() >= 0.999999
    assert json.loads(out.with_suffix(".meta.json").read_text())["versions"]["pillow-heif"] == pillow_heif.__version__


def test_references_differ_when_pictures_do(corpus: Corpus) -> None:
    vectors = np.concatenate(list(corpus.expected.values()))
    assert cosine(vectors[1:], vectors[:-1]).max() < 0.99


@pytest.mark.parametrize("name", REASONS)
def test_reason_is_right_when_there_is_no_picture(corpus: Corpus, name: str) -> None:
    record = corpus.records[name]
    if name == "unreadable.jpg" and os.access(corpus.arguments[0] / name, os.R_OK):
        pytest.skip("the superuser reads every file")
    assert re.match(REASONS[name], record["error"])
    assert len(record["error"].splitlines()) == 1
    assert np.isnan(corpus.features[record["row"]]).all()


@pytest.fixture(scope="module")
def command(corpus: Corpus, extractor: FeatureExtractor, robustfeat: Run) -> Completed:
    out = corpus.arguments[0].with_name("command.npy")
    model = extractor.folder.path
    return robustfeat("embed", *corpus.arguments, "--out", out, "--model", model, "--batch-size", 8, "--quiet")


def test_command_exits_with_3_when_images_failed(corpus: Corpus, command: Completed) -> None:
    out = corpus.arguments[0].with_name("command.npy")
    failed = f"{corpus.result.failed} of {corpus.result.images} images failed"
    assert command.returncode == 3
    assert command.stderr.endswith(f"robustfeat: {failed}; {out.with_suffix('.index.jsonl')} says why\n")
    assert read_index(out) == corpus.records
    np.testing.assert_allclose(np.load(out), corpus.features, rtol=1e-3, atol=1e-5)


def test_command_says_one_line_when_images_are_odd(command: Completed) -> None:
    assert len(command.stderr.splitlines()) == 1


# What a decoder does at such an image, in place of bugs in the libraries that decode, and the reason of its row.
TRAPS = {
    "abort.png": ("os.abort()", "the decoder crashed (signal 6)"),
    "exit.png": ("os._exit(7)", "the decoder crashed (exit code 7)"),
    "kill.png": ("os.kill(os.getpid(), signal.SIGKILL)", "the decoder crashed (signal 9)"),
    "segfault.png": ("os.kill(os.getpid(), signal.SIGSEGV)", "the decoder crashed (signal 11)"),
    "sleep.png": ("time.sleep(1000)", "took longer than 1 s to read and decode"),
    "once.png": ("os.path.exists(flag) or (open(flag, 'w').close(), os.abort())", None),
}
TRAPPED_DECODER = """
import os, resource, signal, time
from robustfeat.serving.decoding import worker as decoder
prepare_square, flag = decoder.prepare_square, {flag!r}
def trapped(data, *arguments, **options):
    exec(data.partition(b"TRAP:")[2])
    return prepare_square(data, *arguments, **options)
decoder.prepare_square = trapped
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
"""


def test_neighbours_are_right_when_decoders_crash_or_hang(
    extractor: FeatureExtractor,
    reference: Reference,
    photos: list[Picture],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trap = TRAPPED_DECODER.format(flag=str(tmp_path / "flag"))

    def start(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
        code = command[-1].replace("from robustfeat", f"exec({trap!r}); from robustfeat", 1)
        return subprocess.Popen([*command[:-1], code], **options)

    monkeypatch.setattr(decoders, "subprocess", SimpleNamespace(Popen=start, DEVNULL=subprocess.DEVNULL))
    root, out = tmp_path / "in", tmp_path / "feats.npy"
    root.mkdir()
    for number, (name, (code, _)) in enumerate(TRAPS.items()):
        (root / name).write_bytes(encode(photos[-1 - number], "png") + b"TRAP:" + code.encode())
        (root / f"{name}.beside.png").write_bytes(encode(photos[number], "png"))
    # This one needs no trap: 0.4 MB that take a minute.
    (root / "scans.jpg").write_bytes(scans(Image.new("L", (4000, 4000)), 10_000))
    with list_inputs([root]) as inputs:
        embed_files(extractor, inputs, out, workers=1, deadline_s=1, quiet=True)
    records, features = read_index(out), np.load(out)
    reasons = {name: reason for name, (_, reason) in TRAPS.items()} | {"scans.jpg": TRAPS["sleep.png"][1]}
    assert {name: record["error"] for name, record in records.items() if name in reasons} == reasons
    for number, name in enumerate(TRAPS):
        beside = features[[records[f"{name}.beside.png"]["row"]]]
        assert cosine(beside, reference(photos[number])) >= 0.9999
    assert cosine(features[[records["once.png"]["row"]]], reference(photos[-len(TRAPS)])) >= 0.9999
    assert np.isnan(features).all(1).sum() == len(TRAPS)
