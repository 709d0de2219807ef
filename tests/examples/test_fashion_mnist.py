"""The Fashion-MNIST example, on scikit-learn's digits written as IDX files and on Fashion-MNIST."""

import gzip
import pathlib
import re

import numpy as np
import pytest
from helpers import refusal, run_example

DEBIAN = pathlib.Path("/usr/share/datasets/fashion-mnist")


def write_idx(path: pathlib.Path, array: np.ndarray, packed: bool) -> None:
    raw = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes() + array.tobytes()
    path = path.with_name(path.name + ".gz") if packed else path
    path.write_bytes(gzip.compress(raw) if packed else raw)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """1,797 digits of 28 x 28 pixels; half of the files gzipped."""
    # Only slow tests need it, and its import takes seconds.
    from sklearn.datasets import load_digits

    folder = tmp_path_factory.mktemp("digits")
    images, labels = load_digits(return_X_y=True)
    images = images.reshape(-1, 8, 8).repeat(3, 1).repeat(3, 2) * 15
    images = np.pad(images, ((0, 0), (2, 2), (2, 2))).astype(np.uint8)
    for name, part, packed in (("train", slice(1200), True), ("t10k", slice(1200, None), False)):
        write_idx(folder / f"{name}-images-idx3-ubyte", images[part], packed)
        write_idx(folder / f"{name}-labels-idx1-ubyte", labels[part].astype(np.uint8), packed)
    return folder


def accuracies(out: str) -> dict[str, float]:
    rows = re.findall(r"│ (float|ternary|\d bits?) +│ +([\d.]+) │", out)
    return {name: float(value) for name, value in rows}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "widths"),
    [("cnn", {"float": "float", "ternary": "ternary"}), ("mlp", {"1": "1 bit", "4": "4 bits"})],
)
def test_runs_on_digits(
    tmp_path: pathlib.Path, digits: pathlib.Path, model: str, widths: dict[str, str]
):
    process = run_example(
        "fashion_mnist.py",
        "--data-dir", str(digits), "--model", model, "--widths", *widths,
        "--epochs", "3", "--batch", "40", "--out", str(tmp_path),
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    found = accuracies(process.stdout)
    assert list(found) == list(widths.values()), process.stdout
    assert all(value > 0.7 for value in found.values()), found
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    assert (tmp_path / f"fashion-{model}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_runs_with_few_steps(tmp_path: pathlib.Path, digits: pathlib.Path):
    process = run_example(
        "fashion_mnist.py",
        "--data-dir", str(digits), "--model", "mlp", "--widths", "ternary", "--epochs", "1",
        "--limit", "300", "--out", str(tmp_path),
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    assert "ternary" in accuracies(process.stdout)


@pytest.mark.slow
@pytest.mark.skipif(not DEBIAN.is_dir(), reason=f"no Fashion-MNIST in {DEBIAN}")
def test_runs_on_fashion_mnist(tmp_path: pathlib.Path):
    process = run_example(
        "fashion_mnist.py",
        "--model", "mlp", "--widths", "float", "2", "--epochs", "3", "--limit", "4000",
        "--out", str(tmp_path),
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    assert all(value > 0.7 for value in accuracies(process.stdout).values()), process.stdout


def test_bad_data_is_refused(
    tmp_path: pathlib.Path,
    digits: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.chdir(tmp_path)
    code, message = refusal(capsys, "fashion_mnist.py", "--data-dir", tmp_path)
    assert code == 1
    assert "lacks train-images-idx3-ubyte" in message
    for name in ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"):
        (tmp_path / name).write_bytes((digits / name).read_bytes())
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(b"\0\0\x08\x03" + bytes(20))
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(b"not an IDX file")
    code, message = refusal(capsys, "fashion_mnist.py", "--data-dir", tmp_path)
    assert code == 1
    assert "is cut short" in message
    code, message = refusal(capsys, "fashion_mnist.py", "--epochs", "0")
    assert code == 2
    assert "--epochs must be at least 1" in message
