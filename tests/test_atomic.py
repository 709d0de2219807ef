"""Atomic replacement of files, which keeps mode and owner."""

import os
import stat
import subprocess
import sys
import threading

import pytest

from optax_clipquant._atomic import new_folder, replacing


def write(path, content: bytes = b"new") -> None:
    with replacing(path) as file:
        file.write(content)


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o755, 0o444])
def test_mode_is_kept(tmp_path, mode):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    path.chmod(mode)
    write(path)
    assert stat.S_IMODE(path.stat().st_mode) == mode
    assert path.read_bytes() == b"new"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs root")
def test_owner_is_kept(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    os.chown(path, 1234, 4321)
    path.chmod(0o640)
    write(path)
    found = path.stat()
    assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (1234, 4321, 0o640)


@pytest.mark.parametrize("exists", [True, False])
def test_symbolic_link_is_written_through(tmp_path, exists):
    (tmp_path / "elsewhere").mkdir()
    target, link = tmp_path / "elsewhere" / "file", tmp_path / "link"
    if exists:
        target.write_bytes(b"old")
    link.symlink_to("elsewhere/file")
    write(link)
    assert link.is_symlink()
    assert target.read_bytes() == b"new"
    assert os.listdir(tmp_path / "elsewhere") == ["file"]


def test_link_to_itself_is_refused(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises((ValueError, OSError), match="loop"):
        write(tmp_path / "loop")
    assert (tmp_path / "loop").is_symlink()


KILLED = """
import os, signal, sys
from optax_clipquant._atomic import replacing
with replacing(sys.argv[1]) as file:
    file.write(b"half")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_files_of_killed_writers_are_removed_by_the_next(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    (tmp_path / ".file.notes.tmp").touch()
    (tmp_path / ".other.0123456789ab.tmp").touch()
    subprocess.run([sys.executable, "-c", KILLED, path], check=False)
    assert path.read_bytes() == b"old"
    assert len(os.listdir(tmp_path)) == 4
    write(path)
    assert sorted(os.listdir(tmp_path)) == [".file.notes.tmp", ".other.0123456789ab.tmp", "file"]


def test_files_of_running_writers_are_kept(tmp_path):
    path = tmp_path / "file"
    with replacing(path) as slow:
        slow.write(b"slow")
        write(path, b"fast")
        assert path.read_bytes() == b"fast"
    assert path.read_bytes() == b"slow"
    assert os.listdir(tmp_path) == ["file"]


def test_concurrent_writers_never_mix(tmp_path):
    path = tmp_path / "file"
    contents = [bytes([n]) * 100_000 for n in range(4)]
    failed = []

    def work(content: bytes) -> None:
        try:
            for _ in range(20):
                write(path, content)
                assert path.read_bytes() in contents
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert os.listdir(tmp_path) == ["file"]


def test_folders_of_killed_writers_are_removed(tmp_path):
    """That of a living writer stays, and so do folders with other names."""
    others = (".file.tmp", ".other.0123456789ab.tmp")
    for name in (".file.0123456789ab.tmp", *others):
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").touch()
    with new_folder(tmp_path / "file") as first, new_folder(tmp_path / "file") as second:
        found = {os.path.join(tmp_path, name) for name in others} | {first, second}
        assert {str(path) for path in tmp_path.iterdir()} == found
    assert sorted(os.listdir(tmp_path)) == [*others, "file"]
    assert not os.listdir(tmp_path / "file")
