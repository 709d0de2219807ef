"""``optax-clipquant decompress`` turns a compressed checkpoint into a plain one."""

import argparse
import contextlib
from collections.abc import Iterator

from optax_clipquant.cli.arguments import Commands, add_files, add_json
from optax_clipquant.cli.contents import Contents, described
from optax_clipquant.cli.numpy_grid import threads
from optax_clipquant.cli.terminal import Progress, check_output, progress, report
from optax_clipquant.formats.checkpoint import Checkpoint, writing_checkpoint
from optax_clipquant.formats.dtypes import nbytes
from optax_clipquant.formats.safetensors import Writer, writing

_TEXT = """Decompress a file to a plain safetensors file, which any program can read.

Names, shapes, dtypes and metadata are those of the file that was compressed, except that float8 weights
become float32. Where a program wants a folder, such as transformers, name OUT model.safetensors and copy
config.json and the tokenizer beside it."""
_EXAMPLES = """  optax-clipquant decompress small.safetensors model.safetensors
  optax-clipquant decompress small.safetensors model.safetensors --force --json
  optax-clipquant decompress small/ model/ --max-shard-size 5GB"""


def add(commands: Commands) -> None:
    """Adds the command."""
    parser = commands("decompress", run, _TEXT, _EXAMPLES)
    add_files(parser, "a compressed file")
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    check_output(args)
    with Checkpoint(args.input) as source:
        if not source.is_saved:
            raise ValueError(f"{args.input} is not compressed: optax_clipquant did not write it")
        contents = Contents(source)
        leaves = contents.leaves.values()
        total = sum(nbytes(*leaf.spec) for leaf in leaves)
        with progress("decompressing", total) as advance:
            decompress(contents, args.output, args.max_shard_size, advance)
    rows = [
        described(path, leaf, leaf.nbytes, nbytes(*leaf.spec))
        for path, leaf in contents.leaves.items()
    ]
    dtypes = [leaf.dtype.name for leaf in leaves]
    quantized = sum(leaf.levels is not None for leaf in leaves)
    report(args, rows, dtypes, done="dequantized", quantized=quantized)


def decompress(
    contents: Contents, output: str, max_shard_size: int | None, advance: Progress
) -> None:
    """Writes the tensors to plain files, with the metadata given to ``save``."""
    if "__metadata__" in contents.leaves:
        raise ValueError(f"{contents.path}: a plain file cannot have a tensor named '__metadata__'")
    specs = {path: leaf.spec for path, leaf in contents.leaves.items()}
    sizes = {path: nbytes(*spec) for path, spec in specs.items()}

    @contextlib.contextmanager
    def open_file(path: str, names: list[str]) -> Iterator[Writer]:
        with writing(path, {name: specs[name] for name in names}, contents.metadata) as file:
            yield file

    with threads() as pool, writing_checkpoint(output, sizes, max_shard_size, open_file) as file_of:
        for path in specs:
            for _ in file_of(path).putting(path, contents.pieces(path, pool)):
                pass
            advance(sizes[path])
