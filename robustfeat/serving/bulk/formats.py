"""Reads and writes .npy, .safetensors and .parquet files of features in blocks, without loading them whole."""

from __future__ import annotations

import io
import json
import os
import struct
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robustfeat.counts import format_count
from robustfeat.errors import InputError, first_line
from robustfeat.serving.inputs.remote import is_remote

__all__ = ["FORMATS", "Block", "BlockStream", "FeatureFormat", "map_features", "read_features"]

_READ_BYTES = 2**23
_HEADER_BYTES = 2**24
_RAW = (".npy", ".safetensors")  # their values have the same layout in the file and in memory


@dataclass(frozen=True)
class Block:
    """A block of rows: (n, D) float32 features, and their lines of the index file."""

    features: NDArray[np.float32]
    index: bytes

    def split(self, rows: int) -> tuple[Block, Block]:
        """Splits off the first rows."""
        lines = self.index.splitlines(keepends=True)
        first, second = b"".join(lines[:rows]), b"".join(lines[rows:])
        return Block(self.features[:rows], first), Block(self.features[rows:], second)


class BlockStream:
    """A stream of blocks, from which files take rows across block borders."""

    def __init__(self, blocks: Iterator[Block]) -> None:
        self._blocks = blocks
        self._rest: Block | None = None

    def take(self, rows: int) -> Iterator[Block]:
        """The next blocks, `rows` rows in total."""
        while rows:
            block = self._rest or next(self._blocks)
            self._rest = None
            if len(block.features) > rows:
                block, self._rest = block.split(rows)
            rows -= len(block.features)
            yield block

    def skip(self, rows: int) -> Iterator[Block]:
        """The stream after the next `rows` rows."""
        for _ in self.take(rows):
            pass
        if self._rest:
            yield self._rest
        yield from self._blocks


@dataclass(frozen=True)
class FeatureFormat:
    """A file format of features.

    Attributes:
        write: writes a file sequentially, given the shape (n, D), a description (text values) and the rows.
        read: reads blocks of (n, D) float32 from a file with random access, given D and the number of rows.
    """

    write: Callable[[Any, tuple[int, int], dict[str, str], Iterable[Block]], None]
    read: Callable[[Any, int, int], Iterator[NDArray[np.float32]]]


def _write_npy(handle: Any, shape: tuple[int, int], _: dict[str, str], blocks: Iterable[Block]) -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": shape})
    _write_raw(handle, header.getvalue(), blocks)


def _write_safetensors(handle: Any, shape: tuple[int, int], about: dict[str, str], blocks: Iterable[Block]) -> None:
    """Writes the format directly, since the library only writes tensors in memory.

    It has eight bytes of little-endian length, JSON of that length padded with spaces to a multiple of eight, and the
    values.
    """
    tensor = {"dtype": "F32", "shape": shape, "data_offsets": [0, 4 * shape[0] * shape[1]]}
    header = json.dumps({"__metadata__": about, "features": tensor}).encode()
    header += b" " * (-len(header) % 8)
    _write_raw(handle, struct.pack("<Q", len(header)) + header, blocks)


def _write_raw(handle: Any, header: bytes, blocks: Iterable[Block]) -> None:
    handle.write(header)
    for block in blocks:
        handle.write(block.features.astype("<f4", copy=False).tobytes())


def _read_npy(handle: Any, feature_size: int, rows: int) -> Iterator[NDArray[np.float32]]:
    version = np.lib.format.read_magic(handle)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in readers:
        raise ValueError(f"version {version} of the format; expected (1, 0)")
    try:
        shape, fortran_order, dtype = readers[version](handle)
    except Exception as exc:  # NumPy parses the header as Python source, so errors have no common base
        raise ValueError(f"its header cannot be read ({first_line(exc)})") from exc
    if dtype != np.dtype("<f4") or (fortran_order and min(shape) > 1):
        order = ", in Fortran's order" if fortran_order else ""
        raise ValueError(f"it has {dtype.str}{order}; expected <f4, row by row")
    yield from _read_raw(handle, feature_size, rows, shape)


def _read_safetensors(handle: Any, feature_size: int, rows: int) -> Iterator[NDArray[np.float32]]:
    length = struct.unpack("<Q", handle.read(8))[0]
    if length > _HEADER_BYTES:
        raise ValueError(f"a header of {length:,} bytes")
    header = json.loads(handle.read(length))
    tensor = header["features"]
    if set(header) - {"__metadata__"} != {"features"} or tensor["dtype"] != "F32":
        raise ValueError("it must have one tensor, features, of F32")
    yield from _read_raw(handle, feature_size, rows, tensor["shape"])


def _read_raw(handle: Any, feature_size: int, rows: int, shape: Any) -> Iterator[NDArray[np.float32]]:
    if list(shape) != [rows, feature_size]:
        raise ValueError(f"it has {tuple(shape)} features, not {(rows, feature_size)}")
    step = max(1, _READ_BYTES // (4 * feature_size))
    for first in range(0, rows, step):
        wanted = 4 * feature_size * min(step, rows - first)
        data = handle.read(wanted)
        if len(data) < wanted:
            raise ValueError(f"it ends in row {first + len(data) // (4 * feature_size):,} of {rows:,}")
        yield np.frombuffer(data, "<f4").reshape(-1, feature_size)


def _write_parquet(handle: Any, shape: tuple[int, int], about: dict[str, str], blocks: Iterable[Block]) -> None:
    import pyarrow
    from pyarrow import parquet

    vector = pyarrow.list_(pyarrow.float32(), shape[1])
    fields = [("path", pyarrow.string()), ("features", vector), ("error", pyarrow.string())]
    schema = pyarrow.schema(fields, metadata=about)
    with parquet.ParquetWriter(handle, schema, compression="zstd") as writer:
        for block in blocks:
            records = [json.loads(line) for line in block.index.splitlines()]
            values = pyarrow.array(block.features.reshape(-1))
            columns = [
                pyarrow.array([record["path"] for record in records], pyarrow.string()),
                pyarrow.FixedSizeListArray.from_arrays(values, shape[1]),
                pyarrow.array([record["error"] for record in records], pyarrow.string()),
            ]
            writer.write_table(pyarrow.Table.from_arrays(columns, schema=schema))


def _read_parquet(handle: Any, feature_size: int, rows: int) -> Iterator[NDArray[np.float32]]:
    import pyarrow
    from pyarrow import parquet

    file = parquet.ParquetFile(handle)
    kind = file.schema_arrow.field("features").type
    if not pyarrow.types.is_fixed_size_list(kind) or kind.value_type != pyarrow.float32():
        raise ValueError(f"the column features must be lists of {feature_size} float32; it is {kind}")
    if file.metadata.num_rows != rows:
        raise ValueError(f"it has {format_count(file.metadata.num_rows, 'row')}, not {rows}")
    for batch in file.iter_batches(columns=["features"]):
        yield np.asarray(batch.column(0).flatten()).reshape(-1, feature_size)


FORMATS = {
    ".npy": FeatureFormat(_write_npy, _read_npy),
    ".parquet": FeatureFormat(_write_parquet, _read_parquet),
    ".safetensors": FeatureFormat(_write_safetensors, _read_safetensors),
}
"""Formats by suffix."""


def read_features(handle: Any, place: str, suffix: str, feature_size: int, rows: int) -> Iterator[NDArray[np.float32]]:
    """Reads all features of an open file in blocks; `place` is its name for messages.

    Raises:
        InputError: the file cannot be read, or has other contents.
    """
    handle.seek(0)
    try:
        yield from FORMATS[suffix].read(handle, feature_size, rows)
    except (OSError, ValueError, LookupError, TypeError, OverflowError, RecursionError, struct.error) as exc:
        raise InputError(
            f"{place}: not the features that its meta file describes ({first_line(exc)}); "
            "the files do not belong together",
            fix="embed the images again",
        ) from exc


def map_features(handle: Any, place: str, suffix: str, feature_size: int, rows: int) -> NDArray[np.float32]:
    """Maps all features of an open file to memory, (rows, D). Parquet and remote files need a temporary copy.

    Raises:
        InputError: the file cannot be read, or has other contents.
    """
    if not rows:
        raise InputError(f"{place}: has no rows")
    blocks = read_features(handle, place, suffix, feature_size, rows)
    if suffix in _RAW and not is_remote(place):
        offset = -next(blocks).nbytes + handle.tell()  # the first block checks the header
        if os.fstat(handle.fileno()).st_size < offset + 4 * rows * feature_size:
            raise InputError(f"{place}: ends before its {rows:,} rows do", fix="embed the images again")
        return np.memmap(handle, "<f4", "r", offset=offset, shape=(rows, feature_size))
    try:
        with tempfile.TemporaryFile(prefix="robustfeat-") as copy:
            for block in blocks:
                copy.write(block.data.cast("B"))
            copy.flush()
            return np.memmap(copy, "<f4", "r", shape=(rows, feature_size))
    except OSError as exc:
        raise InputError(
            f"{place}: no room for a temporary copy ({exc.strerror})", fix="free space, or use .npy"
        ) from exc
