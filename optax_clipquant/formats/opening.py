"""Opening files that may be anything. No JAX here."""

import io
import os
import stat


def open_file(path: str | os.PathLike[str], what: str) -> io.BufferedReader:
    """Opens a file for reading, if it is a regular one: a pipe would wait for a writer, and a device may never end.

    Args:
      path: the file.
      what: what it should be, for messages.

    Raises:
      OSError: it cannot be opened, or is a folder.
      ValueError: it is a pipe, a device or a socket.
    """
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(f"{os.fspath(path)} is a folder; name {what}")
    if not stat.S_ISREG(mode):
        raise ValueError(f"{os.fspath(path)} is not a regular file; name {what}")
    return open(path, "rb")
