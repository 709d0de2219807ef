"""The first bytes of files that are no safetensors, as other programs write them."""

import io
import zipfile

import numpy as np


def _npz() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, w=np.ones(3))
    return buffer.getvalue()


def _torch_zip() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("archive/data.pkl", b"x" * 50)
    return buffer.getvalue()


NPZ = _npz()
NPY = b"\x93NUMPY\x01\x00v\x00{'descr'" + bytes(50)
TORCH = _torch_zip()
PICKLE = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19." + bytes(50)
HDF5 = b"\x89HDF\r\n\x1a\n" + bytes(64)
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"
HTML = b"<!DOCTYPE html><html></html>"
