"""PLACE[@REVISION][#SHA256] on the command line and in manifests."""

from __future__ import annotations

from pathlib import Path

import pytest

from robustfeat.errors import InputError
from robustfeat.hub.place import Place
from robustfeat.serving.http.manifest import Manifest

HASH = "ab" * 32


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("builtin", Place("builtin")),
        (f"builtin#{HASH}", Place("builtin", None, HASH)),
        ("org/name", Place("org/name")),
        ("org/name@v1", Place("org/name", "v1")),
        (f"org/name#{HASH}", Place("org/name", None, HASH)),
        (f"org/name@refs/pr/1#sha256:{HASH}", Place("org/name", "refs/pr/1", f"sha256:{HASH}")),
        ("folder", Place("folder")),
        (f"folder#{HASH}", Place("folder", None, HASH)),
        ("odd@v1/part#2", Place("odd@v1/part#2")),
        (f"odd@v1/part#2#{HASH}", Place("odd@v1/part#2", None, HASH)),
        ("no@folder", Place("no@folder")),
    ],
)
def test_a_text_is_a_place(text: str, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("folder", "odd@v1/part#2"):
        Path(name).mkdir(parents=True)
    assert Place.parse(text) == place
    assert Manifest.of_options([f"a={text}"], [], []).models == {"a": place}


@pytest.mark.parametrize(
    ("entry", "name"),
    [
        ("builtin", "robustfeat"),
        (f"org/name@v1#{HASH}", "name"),
        ("a=b/folder", "folder"),  # a folder of that name
        ("photos.npy", "photos"),
    ],
)
def test_a_place_without_a_name_is_named_by_its_last_part(
    entry: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a=b/folder").mkdir(parents=True)
    kind = "collections" if entry.endswith(".npy") else "models"
    given = {"models": [], "heads": [], "collections": [], kind: [entry]}
    assert list(getattr(Manifest.of_options(**given), kind)) == [name]


def test_a_name_is_refused_with_the_option() -> None:
    for entries in (["a=builtin", "a=builtin"], ["a/b=builtin"], ["-a=builtin"]):
        with pytest.raises(InputError, match=f"models={entries[-1]}: expected NAME=PLACE, each name once"):
            Manifest.of_options(entries, [], [])


def test_what_a_worker_loaded_goes_to_the_others_unchanged() -> None:
    manifest = Manifest(
        {"a": Place("org/a", "1" * 40, HASH)}, {"b": Place("b@c#d")}, {"f": Place("f#.npy", None, HASH)}
    )
    assert Manifest.from_dict(manifest.to_dict()) == manifest
