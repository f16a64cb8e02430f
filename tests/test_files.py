import errno
import fcntl
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from robustfeat.errors import InputError
from robustfeat.files import FileLock, lock_inherited, new_file, new_folder
from robustfeat.serving.bulk.storage import LocalFolder
from robustfeat.system import python_command


def test_new_file_appears_whole_when_the_block_ends(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    with new_file(target) as partial:
        partial.write_text("new")
        assert not target.exists()
    assert target.read_text() == "new"
    assert list(tmp_path.iterdir()) == [target]


def test_new_file_follows_links_and_leaves_what_is_no_file(tmp_path: Path) -> None:
    target, link, pipe = tmp_path / "a.txt", tmp_path / "link", tmp_path / "pipe"
    target.write_text("old")
    link.symlink_to(target)
    with new_file(link) as partial:
        partial.write_text("new")
    assert link.is_symlink()
    assert target.read_text() == "new"
    os.mkfifo(pipe)
    with pytest.raises(InputError, match="pipe: exists and is not a regular file"), new_file(pipe):
        pass
    assert pipe.is_fifo()


def test_new_file_keeps_the_old_content_when_the_block_fails(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")
    with pytest.raises(RuntimeError), new_file(target) as partial:
        partial.write_text("half")
        raise RuntimeError
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_new_file_says_what_to_do_when_the_disk_is_full(tmp_path: Path) -> None:
    with (
        pytest.raises(InputError, match=r"a\.txt: cannot be written \(No space left on device\)"),
        new_file(tmp_path / "a.txt"),
        open("/dev/full", "w") as full,
    ):
        full.write("x")
    assert not list(tmp_path.iterdir())


def start_adding(file: Path, number: int) -> subprocess.Popen[str]:
    """A process that adds a number to a list in a file, again and again, as two commands on one output do."""
    code = f"""import json
from pathlib import Path
from robustfeat.files import new_file
file = Path({str(file)!r})
print("ready", flush=True)
sys.stdin.readline()
for turn in range(25):
    with new_file(file) as partial:
        known = json.loads(file.read_text()) if file.exists() else []
        with open(partial, "w") as handle:
            handle.write("[")
            handle.flush()
            handle.write(json.dumps([*known, [{number}, turn]])[1:])
"""
    return subprocess.Popen(
        python_command(code), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_processes_that_write_one_file_take_turns(tmp_path: Path) -> None:
    file = tmp_path / "list.json"
    writers = [start_adding(file, number) for number in range(3)]
    for writer in writers:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.write("go\n")
        writer.stdin.flush()
    said = [writer.communicate()[1] for writer in writers]
    assert said == ["", "", ""]
    added = json.loads(file.read_text())
    assert sorted(added) == [[number, turn] for number in range(3) for turn in range(25)]
    assert list(tmp_path.iterdir()) == [file]


def test_a_killed_writer_leaves_the_turn_to_the_next(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    code = f"""from robustfeat.files import new_file
with new_file({str(target)!r}) as partial:
    partial.write_text("half of a longer text")
    print("writing", flush=True)
    sys.stdin.read()
"""
    with subprocess.Popen(python_command(code), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "writing\n"
        writer.kill()
    with new_file(target) as partial:
        partial.write_text("new")
    assert target.read_text() == "new"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_new_file_needs_no_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    target = tmp_path / "a.txt"
    with new_file(target) as partial:
        partial.write_text("new")
    with pytest.raises(RuntimeError), new_file(target) as partial:
        raise RuntimeError
    assert target.read_text() == "new"
    assert list(tmp_path.iterdir()) == [target]


def test_new_folder_vanishes_when_the_block_fails(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), new_folder(tmp_path / "deep" / "model") as partial:
        (partial / "half").write_text("x")
        raise RuntimeError
    assert not list((tmp_path / "deep").iterdir())


def test_new_folder_refuses_a_folder_with_content(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("x")
    with pytest.raises(InputError, match="exists already"), new_folder(tmp_path):
        pass
    assert (tmp_path / "mine").read_text() == "x"


def test_what_a_killed_process_left_does_not_stay(tmp_path: Path) -> None:
    (tmp_path / ".model.partial").mkdir()
    (tmp_path / ".model.partial" / "half").write_text("x")
    (tmp_path / ".model.partial" / "deep").mkdir()
    (tmp_path / ".model.partial" / "link").symlink_to(tmp_path)
    (tmp_path / ".a.txt.partial").write_text("half of a longer text")
    with new_folder(tmp_path / "model") as folder:
        (folder / "whole").write_text("x")
    with new_file(tmp_path / "a.txt") as partial:
        partial.write_text("new")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a.txt", "model"]
    assert [entry.name for entry in (tmp_path / "model").iterdir()] == ["whole"]
    assert (tmp_path / "a.txt").read_text() == "new"


def test_two_processes_do_not_fill_one_folder(tmp_path: Path) -> None:
    with new_folder(tmp_path / "model") as first:
        (first / "a").write_text("a")
        code = f"from robustfeat.files import new_folder\nwith new_folder({str(tmp_path / 'model')!r}): pass"
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert "another process is writing it" in other.stderr
    assert [entry.name for entry in tmp_path.rglob("*")] == ["model", "a"]


def test_a_file_of_somebody_elses_stays(tmp_path: Path) -> None:
    mine = tmp_path / ".model.partial"
    mine.write_text("mine")
    with pytest.raises(InputError, match="cannot be written"), new_folder(tmp_path / "model"):
        pass
    assert mine.read_text() == "mine"


def take_elsewhere(place: Path) -> subprocess.Popen[str]:
    """Another process that holds the lock on `place` until its stdin is closed."""
    code = f"""from robustfeat.files import FileLock
lock = FileLock({str(place)!r})
print(lock.take(), flush=True)
sys.stdin.read()
"""
    process = subprocess.Popen(python_command(code), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "True\n"
    return process


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_lock_is_free_again_when_its_process_is_killed(tmp_path: Path, kind: str) -> None:
    place = tmp_path / "a.lock" if kind == "file" else tmp_path
    lock = FileLock(place)
    with take_elsewhere(place) as holder:
        assert not lock.take()
        note = lock.holder_note()
        assert note in {f" (process {holder.pid})", ""}
        if sys.platform == "linux":
            assert note
        holder.kill()
        holder.wait()
        assert lock.take()
        assert lock.holder_note() in {f" (process {os.getpid()})", ""}
    lock.release()


def test_a_lock_is_waited_for_where_asked(tmp_path: Path) -> None:
    lock = FileLock(tmp_path / "lock")
    with take_elsewhere(tmp_path / "lock") as holder:
        assert holder.stdin is not None
        assert lock.take(on_wait=holder.stdin.close)
        assert not FileLock(tmp_path / "lock").take()
        lock.release()
        assert FileLock(tmp_path / "lock").take()


def test_a_lock_on_what_its_holder_has_renamed_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").mkdir()
    lock = FileLock(tmp_path / "a")

    def rename_first(descriptor: int, operation: int) -> None:
        (tmp_path / "a").rename(tmp_path / "b")

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", rename_first)
        assert not lock.take()
    assert lock.holder_note() == ""


def test_waiting_for_a_lock_on_a_folder_that_its_holder_renames_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with take_elsewhere(tmp_path / "a") as holder:
        stdin = holder.stdin
        assert stdin is not None

        def finish() -> None:
            (tmp_path / "a").rename(tmp_path / "b")
            stdin.close()

        with pytest.raises(FileNotFoundError):
            FileLock(tmp_path / "a").take(on_wait=finish)


@pytest.mark.parametrize("replaced", [False, True])
def test_waiting_for_a_lock_ends_with_the_lock_though_its_file_is_removed(tmp_path: Path, replaced: bool) -> None:
    place = tmp_path / "lock"
    lock = FileLock(place)
    with take_elsewhere(place) as holder:
        stdin = holder.stdin
        assert stdin is not None

        def finish() -> None:
            place.unlink()
            if replaced:
                place.touch()
            stdin.close()

        assert lock.take(on_wait=finish)
        assert not FileLock(place).take()
    lock.release()


def test_a_lock_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        FileLock(tmp_path / "missing" / "lock").take()


def test_processes_that_inherit_a_descriptor_lock_each_other_out(tmp_path: Path) -> None:
    with open(tmp_path / "shared", "wb+") as shared:
        descriptor = shared.fileno()
        code = f"""import fcntl
from robustfeat.files import lock_inherited
try:
    fcntl.lockf({descriptor}, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    print("locked", flush=True)
with lock_inherited({descriptor}):
    print("ours", flush=True)
"""
        with lock_inherited(descriptor):
            command = python_command(code)
            other = subprocess.Popen(command, pass_fds=[descriptor], stdout=subprocess.PIPE, text=True)
            assert other.stdout is not None
            assert other.stdout.readline() == "locked\n"
        assert other.communicate(timeout=60)[0] == "ours\n"


def test_planted_links_are_not_followed(tmp_path: Path) -> None:
    """Others may write to the folder of an output: what they plant there must not have other files changed."""
    victim, shared = tmp_path / "victim", tmp_path / "shared"
    victim.mkdir()
    shared.mkdir()
    (victim / "file").write_text("old")
    (shared / ".f.npy.partial").symlink_to(victim / "file")
    with new_file(shared / "f.npy") as partial:
        partial.write_text("new")
    assert not (shared / "f.npy").is_symlink()
    (shared / ".model.partial").symlink_to(victim)
    with new_folder(shared / "model") as folder:
        (folder / "file").write_text("new")
    (shared / "lock").symlink_to(victim / "file")
    (shared / "dangling").symlink_to(victim / "made")
    for name in ("lock", "dangling"):
        lock = FileLock(shared / name)
        assert lock.take()
        lock.release()
    (shared / ".g.npy.shards").symlink_to(victim)
    shards = LocalFolder(str(shared / ".g.npy.shards"))
    shards.create()
    (shared / ".g.npy.shards" / "0.f32.new").symlink_to(victim / "file")
    shards.write("0.f32", b"new")
    shards.release()
    assert {file.name: file.read_text() for file in victim.iterdir()} == {"file": "old"}


def test_a_forked_child_does_not_keep_a_lock(tmp_path: Path) -> None:
    held, other = FileLock(tmp_path / "lock"), FileLock(tmp_path / "lock")
    assert held.take()
    ours, theirs = socket.socketpair()
    child = os.fork()
    if child == 0:
        ours.close()
        theirs.send(b"x")
        theirs.recv(1)  # outlives the lock
        os._exit(0)
    theirs.close()
    try:
        assert ours.recv(1)
        assert not other.take()  # the child's copy was closed, the parent's was not
        held.release()
        assert other.take()
    finally:
        ours.close()
        os.waitpid(child, 0)


@pytest.mark.skipif(os.geteuid() != 0, reason="the superuser alone can make another user's link")
def test_a_link_of_another_user_in_a_shared_folder_is_not_followed(tmp_path: Path) -> None:
    """Linux protects opening so (`fs.protected_symlinks`), and not what a program does with a link's target itself."""
    shared, own = tmp_path / "shared", tmp_path / "own.txt"
    shared.mkdir()
    own.write_text("ours")
    link = shared / "out"
    link.symlink_to(own)
    os.lchown(link, 12345, 12345)
    with new_file(link) as partial:  # the folder is ours alone
        partial.write_text("new")
    assert own.read_text() == "new"
    shared.chmod(0o1777)
    refused = pytest.raises(InputError, match=r"shared/out: a link that another user created; choose another place")
    with refused, new_file(link) as partial:
        partial.write_text("newer")
    assert own.read_text() == "new"
    os.lchown(link, 0, 0)
    with new_file(link) as partial:
        partial.write_text("newer")
    assert own.read_text() == "newer"
