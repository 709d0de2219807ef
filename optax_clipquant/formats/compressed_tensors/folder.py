"""Folders of Hugging Face models: reading the configuration and the list of weight files, and writing."""

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from typing import Any

from optax_clipquant.formats.checkpoint import files_of
from optax_clipquant.formats.opening import open_file

_WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth")
_WEIGHTS += (".gguf", ".h5", ".msgpack", ".onnx")


def read_config(folder: str) -> dict[str, Any]:
    if not os.path.isdir(folder):
        raise NotADirectoryError(f"{folder} is not a folder; name that of a Hugging Face model")
    return read_object(os.path.join(folder, "config.json"))


def read_object(path: str) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
      OSError: it cannot be opened.
      ValueError: it holds something else.
    """
    with open_file(path, "a JSON file") as file:
        try:
            content = json.load(file)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a JSON object")
    return content


def shards_of(folder: str) -> dict[str, str]:
    """The paths of the weight files, by file name."""
    return {os.path.basename(path): path for path in files_of(folder)}


def is_weights(name: str) -> bool:
    return name.endswith(_WEIGHTS) or name.startswith(".")


def write_json(path: str, content: Any) -> None:
    with open(path, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=2)
        file.write("\n")


@contextlib.contextmanager
def new_folder(folder: str | os.PathLike[str]) -> Iterator[str]:
    """Makes a folder that gets its name when complete, and is removed after a failure."""
    folder = os.path.abspath(folder)
    if os.path.lexists(folder) and (not os.path.isdir(folder) or os.listdir(folder)):
        raise FileExistsError(f"{folder} exists; name a new folder, or remove it")
    parent, name = os.path.split(folder)
    if not os.path.isdir(parent):
        raise FileNotFoundError(f"{folder}: there is no folder {parent}")
    temporary = os.path.join(parent, f".{name[:32]}.{secrets.token_hex(6)}.tmp")
    os.mkdir(temporary)
    try:
        yield temporary
        if os.path.isdir(folder):
            os.rmdir(folder)  # Windows cannot rename onto a folder
        os.replace(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
