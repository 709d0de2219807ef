"""Folders of Hugging Face models: reading the configuration and the list of weight files."""

import json
import os
from typing import Any

from optax_clipquant.formats.checkpoint import files_of
from optax_clipquant.formats.opening import open_file

_WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth")
_WEIGHTS += (".gguf", ".h5", ".msgpack", ".onnx")


def read_config(folder: str) -> dict[str, Any]:
    if not os.path.isdir(folder):
        raise NotADirectoryError(f"{folder} is not a folder; name that of a Hugging Face model")
    return read_object(os.path.join(folder, "config.json"))


def float_config(folder: str) -> dict[str, Any]:
    """The configuration of a model that is not quantized yet."""
    config = read_config(folder)
    if config.get("quantization_config") is not None:
        raise ValueError(f"{folder} is quantized already; give the folder of the float model")
    return config


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
