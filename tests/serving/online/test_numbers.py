"""Long arrays of numbers in JSON, against the json module and NumPy."""

from __future__ import annotations

import json
import time
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from robustfeat.serving.online.numbers import LongArray, set_aside, set_aside_in_turns

SHAPE = (9, 3, 32, 32)


def drawn(shape: tuple[int, ...] = SHAPE) -> NDArray[np.float32]:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def taken(body: bytes) -> tuple[Any, str, LongArray]:
    found = set_aside(body)
    assert found is not None
    shortened, token, array = found
    return json.loads(shortened), token, array


def read(array: LongArray, shape: tuple[int, ...] = SHAPE) -> NDArray[np.float32]:
    steps = array.read(shape)
    while True:
        try:
            next(steps)
        except StopIteration as done:
            values: NDArray[np.float32] = done.value
            return values


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("indent", [None, 1])
def test_numbers_are_those_of_the_json_module(nested: bool, indent: int | None) -> None:
    values = drawn()
    data = (values if nested else values.ravel()).tolist()
    body = json.dumps({"id": "a", "data": data, "after": [1, {"data": [2]}]}, indent=indent).encode()
    rest, token, array = taken(body)
    assert rest == {"id": "a", "data": [token], "after": [1, {"data": [2]}]}
    np.testing.assert_array_equal(read(array), values)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (b"]", b" ]"),
        (b"],[", b",["),
        (b"],[", b"][,"),
        (b",", b",,"),
        (b",", b" "),
        (b"0.", b"00."),
        (b"0.", b"."),
        (b"-", b"--"),
        (b"-", b"+"),
        (b",", b",1,"),
    ],
)
def test_what_is_no_array_of_that_shape_is_refused(before: bytes, after: bytes) -> None:
    """At the beginning, in the middle and at the end."""
    text = json.dumps(drawn().tolist(), separators=(",", ":")).encode()
    places = [at for at in range(len(text)) if text.startswith(before, at)]
    for at in {places[0], places[len(places) // 2], places[-1]}:
        changed = text[:at] + after + text[at + len(before) :]
        found = set_aside(b'{"data": ' + changed + b"}")
        if found is None:
            continue
        if before == b"]":
            np.testing.assert_array_equal(read(found[2]), drawn())
        else:
            with pytest.raises(ValueError, match=r"."):
                read(found[2])


def test_an_array_without_an_end_is_refused() -> None:
    text = json.dumps(drawn().tolist(), separators=(",", ":"))
    found = set_aside(f'{{"data": {text[:-2]}}}'.encode())
    assert found is not None
    with pytest.raises(ValueError, match="an array among them has no end"):
        read(found[2])


def test_other_shapes_of_as_many_numbers_are_refused() -> None:
    _, _, array = taken(json.dumps({"data": drawn().tolist()}).encode())
    with pytest.raises(ValueError, match="nested in another way"):
        read(array, (9, 3, 16, 64))
    with pytest.raises(ValueError, match="there are not 9,216 numbers"):
        read(array, (3, 3, 32, 32))


@pytest.mark.parametrize("text", ['["a"', "[1", "[" + "1," * 10, "[true", "[null", "[[1]]"])
def test_short_arrays_and_others_stay(text: str) -> None:
    assert set_aside(b'{"data":' + text.encode() + b', "b": "' + b"x" * 2**19 + b'"}') is None


def test_looking_for_a_long_array_stops_after_each_mebibyte() -> None:
    body = json.dumps({"data": [0.25] * 800_000}).encode()
    steps = set_aside_in_turns(body)
    assert sum(1 for _ in steps) == len(body) // 2**20


def test_each_slice_takes_milliseconds() -> None:
    values = drawn((16, 3, 224, 224)).astype(np.float16)
    _, _, array = taken(json.dumps({"data": values.tolist()}).encode())
    times, steps = [], array.read(values.shape)
    while True:
        began = time.process_time()
        try:
            next(steps)
        except StopIteration as done:
            np.testing.assert_array_equal(done.value, values)
            break
        times.append(time.process_time() - began)
    assert len(times) > 100
    assert sorted(times)[len(times) // 2] < 0.01
