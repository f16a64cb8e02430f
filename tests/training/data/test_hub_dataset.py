"""Training sets on the Hub: which files are taken, downloaded or read where they are, and what is said when not."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.conftest import Run, hub_environment, train_arguments
from tests.hub_server import FakeHub, Fault
from tests.training.data.test_batches import jpeg
from tests.training.data.test_tar_shards import pack
from tests.training.data.test_tar_shards import samples as tar_samples

Read = Callable[..., Any]

# What the client's environment says is read when it is imported: each case has a process of its own.
PROGRAM = """
import json, sys
from robustfeat.errors import RobustFeatError
from robustfeat.training.data import parquet
from robustfeat.training.data.batches import EpochPlan, TrainingBatches, load_batches
from robustfeat.training.data.opening import open_training_data
for url, options, workers, limit in json.loads(sys.argv[1]):
    parquet.LARGE_BYTES = limit
    try:
        splits = open_training_data(url, **options)
        batches = TrainingBatches(splits[0], 16, EpochPlan(splits[0], 2, seed=0, epoch=0))
        made = [] if workers is None else load_batches(batches, workers)
        seen = sorted(int(label) for batch in made for label in batch.labels)
        print(json.dumps({
            "classes": splits[0].classes,
            "labels": [data.labels.tolist() for data in splits],
            "values": [[data.image(row).getpixel((0, 0))[0] for row in range(len(data))] for data in splits],
            "kind": type(splits[0].source).__name__,
            "fingerprints": [data.fingerprint for data in splits],
            "seen": seen,
        }))
    except RobustFeatError as exc:
        print(json.dumps({"kind": type(exc).__name__, "error": str(exc)}))
"""


def parquet_bytes(values: list[int], *, group: int = 2, names: tuple[str, str] = ("image", "label")) -> bytes:
    sink = pa.BufferOutputStream()
    images = [{"bytes": jpeg(value), "path": None} for value in values]
    features = {"info": {"features": {names[1]: {"names": ["cat", "dog"], "_type": "ClassLabel"}}}}
    table = pa.table({names[0]: images, names[1]: [value % 2 for value in values]})
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(features)}), sink, row_group_size=group)
    data: bytes = sink.getvalue().to_pybytes()
    return data


FILES = {
    "README.md": b"---\nlicense: cc0-1.0\n---\n",
    "data/train-00000-of-00002.parquet": parquet_bytes([10, 20, 31, 40, 51]),
    "data/train-00001-of-00002.parquet": parquet_bytes([61, 70]),
    "data/validation-00000-of-00001.parquet": parquet_bytes([81, 90]),
    "data/test-00000-of-00001.parquet": parquet_bytes([99]),
    "other/extra.bin": b"x" * 100,
}


@pytest.fixture
def read(hub: FakeHub, tmp_path: Path, python: Run) -> Read:
    """Opens one data set or several; gives what is in each, or its error."""

    def read(
        *urls: str | tuple[str, dict[str, Any]],
        workers: int | None = None,
        limit: int = 2**30,
        environment: Mapping[str, str] | None = None,
        token: str | None = None,
        **options: Any,
    ) -> Any:
        pairs = [(url, {}) if isinstance(url, str) else url for url in urls]
        cases = [[url, options | more, workers, limit] for url, more in pairs]
        own = hub_environment(hub, tmp_path / "home", token, **(environment or {}))
        result = python(PROGRAM, json.dumps(cases), env=own)
        assert result.returncode == 0, result.stderr
        answers = [json.loads(line) for line in result.stdout.splitlines()]
        return answers if len(urls) > 1 else answers[0]

    return read


def downloads(hub: FakeHub) -> list[str]:
    return sorted({line.rpartition("/")[2] for line in hub.requests if "/resolve/" in line})


VALUES = [[10, 20, 31, 40, 51, 61, 70], [81, 90]]


def test_downloaded_and_streamed_give_the_same(hub: FakeHub, read: Read, tmp_path: Path) -> None:
    hub.add("org/photos", FILES, kind="datasets")
    small = read("hf://datasets/org/photos", workers=0)
    assert (small["classes"], small["values"], small["kind"]) == (["cat", "dog"], VALUES, "_Rows")
    assert small["labels"] == [[0, 0, 1, 0, 1, 1, 0], [1, 0]]
    assert downloads(hub) == [
        "train-00000-of-00002.parquet", "train-00001-of-00002.parquet", "validation-00000-of-00001.parquet"
    ]  # fmt: skip
    hub.requests.clear()
    large = read("hf://datasets/org/photos", workers=2, limit=100)
    assert downloads(hub) == []  # from the cache
    assert large["kind"] == "RowGroups"
    kept = sorted(file.name for file in tmp_path.rglob("*") if file.is_file())
    streamed = read("hf://datasets/org/photos", workers=2, stream=True, environment={"HF_HOME": str(tmp_path / "no")})
    assert len(downloads(hub)) == 3
    assert sorted(file.name for file in tmp_path.rglob("*") if file.is_file()) == kept  # nothing is kept
    for one in (large, streamed):
        assert len(one["seen"]) == 6
        assert {key: one[key] for key in ("classes", "labels", "values", "fingerprints")} == {
            key: small[key] for key in ("classes", "labels", "values", "fingerprints")
        }
    assert streamed["seen"] == large["seen"]


@pytest.mark.slow
def test_streaming_reads_each_row_group_once(hub: FakeHub, read: Read) -> None:
    hub.add("org/photos", FILES, kind="datasets")
    read("hf://datasets/org/photos", stream=True)
    opening = sum(line.startswith("GET /datasets/") for line in hub.requests)
    # Three footers and five chunks of labels, two of which lie in no read footer; five row groups of images.
    assert opening <= 3 + 6 + 5 + 3
    hub.requests.clear()
    read("hf://datasets/org/photos", stream=True, workers=0)
    assert sum(line.startswith("GET /datasets/") for line in hub.requests) <= opening + 4 + 3


@pytest.mark.slow
def test_parts_limits_what_is_downloaded(hub: FakeHub, read: Read) -> None:
    hub.add("org/photos", FILES, kind="datasets")
    url, limited = "hf://datasets/org/photos", ("hf://datasets/org/photos", {"parts": 1})
    expected = [VALUES[0][:5], VALUES[1]]
    assert read(limited)["values"] == expected
    assert "train-00001-of-00002.parquet" not in downloads(hub)
    assert read(url, parts=1, stream=True)["values"] == expected
    held, absent = read(limited, url, environment={"HF_HUB_OFFLINE": "1"})
    assert held["values"] == expected
    assert absent == {
        "kind": "HubError",
        "error": "hf://datasets/org/photos: is not in the cache, or not all of it; "
        "HF_HUB_OFFLINE forbids downloads; allow them once",
    }


def test_the_cache_serves_without_a_network(hub: FakeHub, read: Read) -> None:
    hub.add("org/photos", FILES, kind="datasets")
    offline, unreachable = {"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:1"}
    url = "hf://datasets/org/photos"
    streamed = (url, {"stream": True})
    for environment, message in ((offline, "HF_HUB_OFFLINE forbids "), (unreachable, "1:1 cannot be reached (")):
        for answer in read(url, streamed, environment=environment):
            assert message in answer["error"]
            assert answer["error"].startswith(f"{url}: ")
    read(url)
    for environment in (offline, unreachable):
        held, absent = read(url, streamed, environment=environment)
        assert held["values"] == VALUES
        assert "error" in absent


@pytest.mark.slow
def test_a_revision_and_a_folder_are_chosen(hub: FakeHub, read: Read) -> None:
    configurations = {
        "small/train-0.parquet": parquet_bytes([1]),
        "small/val-0.parquet": parquet_bytes([2]),
        "large/data/train-0.parquet": parquet_bytes([3]),
        "large/data/test-0.parquet": parquet_bytes([4]),
        "wds/train-0.tar": b"",  # only where there are no Parquet files
    }
    repo = hub.add("org/photos", configurations, kind="datasets")
    old = repo.branches["main"]
    hub.commit(repo, "main", {"train-0.parquet": parquet_bytes([5]), "test-0.parquet": parquet_bytes([6])})
    url = "hf://datasets/org/photos"
    repo.branches["feature"] = old
    urls = [url, f"{url}/small", f"{url}@{old}/large/", f"{url}@{old}", f"{url}@gone"]
    for stream in (False, True):
        *found, several, gone = read(*urls, stream=stream)
        # The root comes before folders.
        assert [answer["values"] for answer in found] == [[[5], [6]], [[1], [2]], [[3], [4]]]
        assert several["error"] == (
            f"{url}@{old}: has several configurations (large/data, small); add one, as {url}@{old}/large/data"
        )
        assert "has no revision 'gone'; it has main, feature" in gone["error"]


def test_shards_are_downloaded(hub: FakeHub, read: Read, tmp_path: Path) -> None:
    for name, values in (("train-0.tar", [1, 2]), ("train-1.tar", [3]), ("validation-0.tar", [4])):
        pack(tmp_path / name, tar_samples(values, [value % 2 for value in values]))
    files = {f"wds/{file.name}": file.read_bytes() for file in tmp_path.glob("*.tar")}
    hub.add("org/photos", files | {"wds/classes.txt": b"even\nodd\n"}, kind="datasets")
    answer = read("hf://datasets/org/photos", workers=0)
    assert (answer["classes"], answer["labels"]) == (["even", "odd"], [[1, 0, 1], [0]])
    assert answer["values"] == [[1, 2, 3], [4]]
    again = read("hf://datasets/org/photos", environment={"HF_HUB_OFFLINE": "1"})
    assert again["fingerprints"] == answer["fingerprints"]
    assert "holds tar shards, which cannot be streamed" in read("hf://datasets/org/photos", stream=True)["error"]


@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_read_is_said(hub: FakeHub, read: Read, stream: bool) -> None:
    hub.add("org/gated", FILES, kind="datasets", gated=True)
    hub.add("org/private", FILES, kind="datasets", private=True)
    hub.add("org/words", {"data/words.csv": b"a", "data/test-0.parquet": b""}, kind="datasets")
    hub.add("org/cifar", {"data/train-0.parquet": parquet_bytes([1], names=("img", "fine"))}, kind="datasets")
    hub.add("org/packed", {"original/train-0.tar.gz": b""}, kind="datasets")
    hub.add("org/broken", {"train-0.parquet": b"x" * 200}, kind="datasets")
    expected = {
        "org/gated": f"access is gated; accept its terms at {hub.url}/datasets/org/gated, then run hf auth login",
        "org/private": f"no such dataset at {hub.url}; check the name; if it is private, log in (hf auth login)",
        "org/gone": f"no such dataset at {hub.url}; check the name",
        "org/words": "holds neither train-*.parquet nor train-*.tar files; it holds data/test-0.parquet, data/words",
        "org/cifar/data": "needs the columns image and label; got img, fine",
        "org/packed": "images cannot be read at random out of a compressed archive; unpack it to a .tar",
        "org/broken": "not a Parquet file, or damaged",
        "name": "expected hf://datasets/ORG/NAME, with @REVISION or /FOLDER after it where needed",
    }
    answers = read(*(f"hf://datasets/{name}" for name in expected), stream=stream)
    for (name, message), answer in zip(expected.items(), answers, strict=True):
        assert message in answer["error"], answer
        assert answer["error"].startswith(f"hf://datasets/{name}"), answer
        assert "\n" not in answer["error"]
    assert read("hf://datasets/org/gated", stream=stream, token="hf_alice")["values"] == VALUES


@pytest.mark.slow
def test_a_stream_that_breaks_stops_in_one_line(hub: FakeHub, read: Read) -> None:
    """The Hub opens its files, and refuses the row groups that a worker then asks for."""
    hub.add("org/photos", {"train-0.parquet": parquet_bytes(list(range(20))), "test-0.parquet": b""}, kind="datasets")
    read("hf://datasets/org/photos", stream=True)
    before = sum("train-0" in line for line in hub.requests)  # until it came to the second file, which is empty
    assert before >= 3
    hub.add("org/photos", {"train-0.parquet": parquet_bytes(list(range(20)))}, kind="datasets")
    hub.requests.clear()
    hub.faults += [_After(hub, before)]
    answer = read("hf://datasets/org/photos", stream=True, workers=1, val_fraction=0.1)
    assert answer["kind"] == "HubError"
    assert answer["error"].startswith("hf://datasets/org/photos: ")
    assert "forbids it" in answer["error"]
    assert "\n" not in answer["error"]


class _After(Fault):
    """Refuses a file once so much of it was asked for."""

    def __init__(self, hub: FakeHub, count: int) -> None:
        self._hub, self._count = hub, count
        super().__init__("", 403, times=1000)

    @property
    def path(self) -> str:
        return "train-0" if sum("train-0" in line for line in self._hub.requests) > self._count else "nothing"

    @path.setter
    def path(self, _: str) -> None: ...


@pytest.mark.slow
def test_training_takes_a_dataset(hub: FakeHub, tmp_path: Path, robustfeat: Callable[..., Any]) -> None:
    files = {"train-0.parquet": parquet_bytes(list(range(12))), "test-0.parquet": parquet_bytes([1, 2])}
    hub.add("org/photos", files, kind="datasets")
    arguments = train_arguments(Path("DATA"), tmp_path / "run", concepts="classes", epochs=1)
    arguments[1] = "hf://datasets/org/photos"
    result = robustfeat(*arguments, "--json", env=hub_environment(hub, tmp_path / "home", None))
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["bad_images"] == 0
    from robustfeat.training.loop.checkpoint import load_checkpoint

    assert load_checkpoint(tmp_path / "run").data["root"] == "hf://datasets/org/photos"
