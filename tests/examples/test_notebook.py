"""The Colab notebook runs with few steps, and its stored outputs come from a full run."""

import json

import pytest
from helpers import EXAMPLES, compiled, run_python

NOTEBOOK = EXAMPLES / "colab_tpu.ipynb"

RUN = """
import sys, nbclient, nbformat
notebook = nbformat.read(sys.argv[1], 4)
nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
nbformat.write(notebook, sys.argv[2])
"""


def printed(notebook: dict) -> str:
    return "".join(
        "".join(output["text"])
        for cell in notebook["cells"]
        for output in cell.get("outputs", [])
        if output.get("name") == "stdout"
    )


def pictures(notebook: dict) -> int:
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", [])]
    return sum("image/png" in output.get("data", {}) for output in outputs)


@pytest.mark.slow
def test_notebook_runs(tmp_path):
    out = tmp_path / "run.ipynb"
    process = run_python(
        *("-c", RUN, NOTEBOOK, out),
        timeout=400, QUICK="1", JAX_PLATFORMS="cpu", TMPDIR=str(tmp_path), **compiled(),
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-3000:]
    run = json.loads(out.read_text())
    text = printed(run)
    assert "compiled 2 times for 40 steps" in text
    assert "as in training: True" in text
    assert "blk/attn_q/kernel" in text  # in the tables
    assert "equal weights: True" in text
    assert pictures(run) == 2


def test_stored_outputs_come_from_a_full_run():
    notebook = json.loads(NOTEBOOK.read_text())
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert all(output["output_type"] != "error" for cell in cells for output in cell["outputs"])
    assert pictures(notebook) == 2
    assert "compiled 2 times for 600 steps" in printed(notebook)
    assert "llama.cpp: not installed" not in printed(notebook)
