"""Atomic replacement of files, and creation of folders."""

import contextlib
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # on Windows, the temporary files of killed writers stay behind
    fcntl = None


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Opens a new file, which replaces ``path`` when the block ends without an exception.

    It is written beside ``path``, synced and renamed, so that an exception or a crash leaves ``path``
    unchanged. It keeps the mode of the file it replaces, and the owner where the system allows that. A
    symbolic link stays, and its target is replaced. Temporary files that killed writers of the same
    ``path`` left behind are removed.

    Raises:
      FileNotFoundError: the folder of ``path`` does not exist.
      IsADirectoryError: ``path`` is a folder.
      ValueError: ``path`` is a device, a pipe or a socket, or a link that leads to itself.
    """
    path = os.fspath(path)
    check_replaceable(path)
    target = os.path.realpath(path)
    folder, name = os.path.split(target)
    _remove_abandoned(folder, name)
    file, temporary = _create(folder, name)
    try:
        with file:
            _keep_mode_and_owner(file, target)
            yield file
            file.flush()
            os.fsync(file.fileno())
            # While the lock is held, or another writer would take the file for abandoned.
            os.replace(temporary, target)
        _sync(folder)
    except BaseException as error:
        if isinstance(error, OSError) and error.errno and error.filename is None:
            error.filename = path  # as when the disk is full
        with contextlib.suppress(FileNotFoundError):
            os.remove(temporary)
        raise


@contextlib.contextmanager
def new_folder(path: str | os.PathLike[str]) -> Iterator[str]:
    """Makes a folder that gets its name when the block ends without an exception, and is removed otherwise.

    Raises:
      FileExistsError: ``path`` exists and is not an empty folder.
      FileNotFoundError: its parent does not exist.
    """
    path = os.path.abspath(path)
    check_new_folder(path)
    with scratch_folder(path) as temporary:
        yield temporary
        if os.path.isdir(path):
            os.rmdir(path)  # Windows cannot rename onto a folder
        os.replace(temporary, path)


@contextlib.contextmanager
def scratch_folder(path: str | os.PathLike[str]) -> Iterator[str]:
    """Makes a folder beside ``path`` that is removed at the end.

    Temporary folders that killed writers of the same ``path`` left behind are removed.
    """
    parent, name = os.path.split(os.path.abspath(path))
    _remove_abandoned(parent, name)
    temporary = _temporary(parent, name)
    os.mkdir(temporary)
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, temporary, ignore_errors=True)
        if fcntl is not None:
            descriptor = os.open(temporary, os.O_RDONLY)
            stack.callback(os.close, descriptor)
            _lock(descriptor, wait=True)
        yield temporary


def check_new_folder(path: str | os.PathLike[str]) -> None:
    """Raises what ``new_folder`` would raise, without creating a folder."""
    path = os.path.abspath(path)
    if os.path.lexists(path) and (not os.path.isdir(path) or os.listdir(path)):
        raise FileExistsError(f"{path} exists; name a new folder, or remove it")
    parent = os.path.dirname(path)
    if not os.path.isdir(parent):
        raise FileNotFoundError(f"{path}: there is no folder {parent}")


def check_replaceable(path: str) -> None:
    """Raises what ``replacing`` would raise, without creating a file."""
    target = os.path.realpath(path)
    if os.path.isdir(target):
        raise IsADirectoryError(f"{path} is a folder; name a file")
    if os.path.islink(target):
        raise ValueError(f"{path} is a link that leads to itself; name another")
    if os.path.exists(target) and not os.path.isfile(target):
        raise ValueError(f"{path} is not a regular file; name another")
    folder = os.path.dirname(target)
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"{path}: there is no folder {folder}")


def _temporary(folder: str, name: str) -> str:
    return os.path.join(folder, f".{name[:32]}.{secrets.token_hex(6)}.tmp")


def _create(folder: str, name: str) -> tuple[BinaryIO, str]:
    """Creates a temporary file, which stays locked while it is open; returns it and its path."""
    while True:
        temporary = _temporary(folder, name)
        file = open(temporary, "xb")  # noqa: SIM115 (the caller closes it)
        _lock(file.fileno(), wait=True)
        # Another writer may have removed it as abandoned before it was locked.
        if fcntl is None or os.fstat(file.fileno()).st_nlink:
            return file, temporary
        file.close()


def _remove_abandoned(folder: str, name: str) -> None:
    """Removes the temporary files and folders of this name that no living process has locked."""
    if fcntl is None:
        return
    pattern = re.compile(re.escape(f".{name[:32]}.") + r"[0-9a-f]{12}\.tmp")
    with os.scandir(folder) as entries:
        found = [entry for entry in entries if pattern.fullmatch(entry.name)]
    for entry in found:
        is_folder = entry.is_dir(follow_symlinks=False)
        with contextlib.suppress(OSError):
            access = os.O_RDONLY if is_folder else os.O_RDWR
            descriptor = os.open(entry.path, access | os.O_NOFOLLOW)
            try:
                if _lock(descriptor, wait=False):
                    (shutil.rmtree if is_folder else os.remove)(entry.path)
            finally:
                os.close(descriptor)


def _lock(descriptor: int, *, wait: bool) -> bool:
    """Locks the file, and returns whether that succeeded. The lock ends with the process, however it ends."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:  # it is locked, or the file system has no locks
        return False
    return True


def _keep_mode_and_owner(file: BinaryIO, target: str) -> None:
    if os.name != "posix" or not os.path.exists(target):
        return
    old, descriptor = os.stat(target), file.fileno()
    # The owner first, since changing it clears bits of the mode.
    for owner, group in ((old.st_uid, old.st_gid), (-1, old.st_gid)):
        with contextlib.suppress(PermissionError):
            os.fchown(descriptor, owner, group)
            break
    os.fchmod(descriptor, stat.S_IMODE(old.st_mode))


def _sync(folder: str) -> None:
    if os.name != "posix":
        return  # elsewhere a folder cannot be opened
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
