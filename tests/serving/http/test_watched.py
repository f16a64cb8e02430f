"""When a watched file counts as changed."""

from __future__ import annotations

from pathlib import Path

from robustfeat.serving.http.watched import WatchedFile


def test_a_file_has_changed_once_it_stays_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "served.toml"
    file.write_text("a")
    watched = WatchedFile(file)
    assert not watched.changed()
    with file.open("a") as writing:  # a little at a time
        for _ in range(3):
            writing.write("more")
            writing.flush()
            assert not watched.changed()
    assert [watched.changed() for _ in range(3)] == [True, False, False]
    file.unlink()
    assert [watched.changed() for _ in range(3)] == [False, True, False]
    file.write_text("a")
    assert [watched.changed() for _ in range(3)] == [False, True, False]


def test_a_config_map_that_is_swapped_has_changed(tmp_path: Path) -> None:
    """As the kubelet writes: files in a folder with a time in its name, and a link to that folder that is replaced."""
    for name in ("..first", "..second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "served.toml").write_text("a")
    (tmp_path / "..data").symlink_to("..first")
    (tmp_path / "served.toml").symlink_to("..data/served.toml")
    watched = WatchedFile(tmp_path / "served.toml")
    assert not watched.changed()
    (tmp_path / "..data_tmp").symlink_to("..second")
    (tmp_path / "..data_tmp").rename(tmp_path / "..data")
    assert [watched.changed() for _ in range(3)] == [False, True, False]
