"""``optax-clipquant convert`` writes a model for another runtime, with the same weights, and converts back."""

import argparse
import contextlib
import functools
import math
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from optax_clipquant._atomic import check_new_folder, scratch_folder
from optax_clipquant.cli import compress
from optax_clipquant.cli.arguments import Commands, add_json
from optax_clipquant.cli.rules import Store
from optax_clipquant.cli.terminal import check_free, print_json, print_table, printable, progress
from optax_clipquant.formats.checkpoint import Checkpoint
from optax_clipquant.formats.compressed_tensors.folder import float_config, read_config, read_object
from optax_clipquant.formats.gguf.container import GGUFFile
from optax_clipquant.formats.native.names import path_of_name

if TYPE_CHECKING:  # it imports JAX, which errors in the arguments need not wait for
    from optax_clipquant.formats.leaves import Leaf, Written

_TEXT = """Convert a model to the format of another runtime, with the same weights, or back.

IN is a file of `compress` or of optax_clipquant.save, a GGUF file, a folder of compressed-tensors, or a float
checkpoint, which --bits, --budget or --rule quantize first, in groups of 32 by default. OUT holds the codes
and scales of IN; a grid that OUT's format cannot hold exactly is an error. In compressed-tensors only linear
layers have codes, and what else a float checkpoint has, such as embeddings, stays float."""
_EXAMPLES = """  optax-clipquant convert small.safetensors model.gguf --to gguf --like model-f16.gguf
  optax-clipquant convert model/ model.gguf --to gguf --like model-f16.gguf --bits 4 --rule 'embed=8'
  optax-clipquant convert small.safetensors served/ --to compressed-tensors --like model/
  optax-clipquant convert model-q4_0.gguf model.safetensors --to safetensors"""

# Codes of 2 or 3 bits take 4 there, so a budget that chose them would lose accuracy and save nothing.
_STORES = {
    "gguf": Store((4, 5, 8), takes_others=False, block=32),
    "compressed-tensors": Store((4, 8), takes_others=False, scale_bytes=None),
}


def add(commands: Commands) -> None:
    """Adds the command."""
    parser = commands("convert", run, _TEXT, _EXAMPLES)
    parser.add_argument("input", metavar="IN", help="the model")
    parser.add_argument(
        "output", metavar="OUT", help="the file, or the folder for compressed-tensors"
    )
    parser.add_argument(
        "--to", choices=("gguf", "compressed-tensors", "safetensors"), required=True, help="OUT's format"
    )  # fmt: skip
    parser.add_argument(
        "--like",
        metavar="MODEL",
        help="the same model in OUT's format: a GGUF file of any precision, or a float Hugging Face folder. "
        "It provides the configuration, the tokenizer, and the tensors that IN lacks",
    )
    parser.add_argument(
        "--names",
        metavar="FILE.json",
        help="an object that maps tensors of IN, where names differ, to the name in MODEL, to [name, transpose], "
        "or to null to leave the tensor out. Tensors with a name here keep the order of their rows, others get that "
        "of queries and keys in OUT's format",
    )
    parser.add_argument(
        "--otherwise",
        choices=("float16", "bfloat16", "float32"),
        help="the dtype for tensors whose grid GGUF cannot hold exactly",
    )
    parser.add_argument("--force", action="store_true", help="overwrite OUT, if it is a file")
    widths = (
        f"{', '.join(map(str, store.widths))} bits for {name}" for name, store in _STORES.items()
    )
    compress.add_widths(parser, group_size=32, widths=", or ".join(widths))
    parser.set_defaults(max_shard_size=None)
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    names = _check(args)
    with _leaves(args, names or {}) as leaves:
        if args.to == "compressed-tensors" and all(leaf.grid is None for leaf in leaves.values()):
            raise ValueError(f"{args.input}: no tensor is quantized; if it is a safetensors checkpoint, pass --bits, --budget or --rule")  # fmt: skip
        total = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves.values())
        with progress("converting", total) as advance:
            written = _write(args, leaves, names, advance)
    if args.json:
        tensors = [_plain(item) for item in written]
        print_json({"input": args.input, "output": args.output, "tensors": tensors})
        return
    from optax_clipquant._print import Name, compact_table

    table = compact_table(show_footer=True)
    table.add_column("tensor", f"{len(written)} tensors", overflow="fold")
    table.add_column("shape", justify="right")
    table.add_column("in")
    table.add_column("out")
    nbytes = sum(item.nbytes for item in written)
    table.add_column("bytes", f"{nbytes:,}", justify="right")
    for item in map(_plain, written):
        shape = "x".join(map(str, item["shape"]))
        table.add_row(
            Name(printable(item["name"])), shape, item["in"], item["out"], f"{item['bytes']:,}"
        )
    print_table(table)


def _plain(item: "Written") -> dict[str, Any]:
    return {"name": item.name, "shape": list(item.shape), "in": _kind_of(item.leaf), "out": item.kind, "bytes": item.nbytes}  # fmt: skip


def _check(args: argparse.Namespace) -> "dict[str, Any] | None":
    """Checks before the work that the arguments are consistent, and OUT can be written; returns the names."""
    os.stat(args.input)  # raises if it is missing
    if args.to == "safetensors":
        unused = {"--like": args.like, "--names": args.names, "--otherwise": args.otherwise}
        if not (_is_gguf(args.input) or _is_compressed_tensors(args.input)):
            with Checkpoint(args.input) as source:  # raises if it is of another kind
                way_out = "`decompress` it" if source.is_saved else "`compress` quantizes it"
            raise ValueError(
                f"{args.input} is neither a GGUF file nor a folder of compressed-tensors; {way_out}"
            )
    else:
        unused = {} if args.to == "gguf" else {"--otherwise": args.otherwise}
        if args.like is None:
            raise ValueError(f"--to {args.to} needs --like MODEL, the same model in that format")
    for option, value in unused.items():
        if value is not None:
            raise ValueError(f"{option} has no use with --to {args.to}; leave it out")
    if os.path.realpath(args.input) == os.path.realpath(args.output):
        raise ValueError(f"IN and OUT are the same, {args.input}; name another OUT")
    if args.to == "compressed-tensors":
        check_new_folder(args.output)
        float_config(args.like)
    else:
        check_free(f"OUT {args.output}", args.output, args.force)
    if args.to == "gguf":
        with GGUFFile(args.like):
            pass
    return None if args.names is None else read_object(args.names)


def _write(
    args: argparse.Namespace,
    leaves: "dict[str, Leaf]",
    names: "dict[str, Any] | None",
    advance: Any,
) -> "list[Written]":
    if args.to == "gguf":
        from optax_clipquant.formats.gguf.write import write_gguf

        options = {"like": args.like, "names": names, "otherwise": args.otherwise}
        return write_gguf(args.output, leaves, **options, progress=advance)
    if args.to == "compressed-tensors":
        from optax_clipquant.formats.compressed_tensors.write import write_compressed_tensors

        return write_compressed_tensors(
            args.output, leaves, like=args.like, names=names, progress=advance
        )
    from optax_clipquant import save
    from optax_clipquant.formats.leaves import Written

    save(args.output, {path: leaf.whole() for path, leaf in leaves.items()})
    with Checkpoint(args.output) as saved:
        sizes = {path_of_name(name): stored.nbytes for name, stored in saved.leaves.items()}
    return [
        Written(leaf, path, _kind_of(leaf), leaf.shape, sizes[path])
        for path, leaf in leaves.items()
    ]


def _kind_of(leaf: "Leaf") -> str:
    return leaf.dtype.name if leaf.grid is None else f"{leaf.grid.bits:.3g} bits"


@contextlib.contextmanager
def _leaves(args: argparse.Namespace, names: dict[str, Any]) -> "Iterator[dict[str, Leaf]]":
    """The leaves of IN, quantized if the arguments ask for it, with Hugging Face's names where OUT needs them."""
    from optax_clipquant.formats.leaves import leaves_in

    wanted = args.bits is not None or args.budget is not None or bool(args.rule)
    if _is_gguf(args.input):
        from optax_clipquant import from_gguf

        _check_unquantized(args.input, wanted, "a GGUF file, which is converted as it is")
        tree, metadata = from_gguf(args.input)
        leaves = leaves_in(tree)
        if args.to == "compressed-tensors":
            from optax_clipquant.formats.gguf.names import as_hugging_face

            given = {path: leaves.pop(path) for path in names if path in leaves}
            leaves = given | as_hugging_face(leaves, metadata)
        yield leaves
        return
    if _is_compressed_tensors(args.input):
        from optax_clipquant import from_compressed_tensors

        _check_unquantized(args.input, wanted)
        yield leaves_in(from_compressed_tensors(args.input)[0])
        return
    with contextlib.ExitStack() as stack:
        source = stack.enter_context(Checkpoint(args.input))
        if source.is_saved:
            _check_unquantized(args.input, wanted)
        elif wanted:
            folder = stack.enter_context(scratch_folder(args.output))
            path = os.path.join(folder, "quantized.safetensors")
            kept = _kept_float(args, source, names) if args.to == "compressed-tensors" else {}
            compress.quantize(args, source, path, kept, _STORES[args.to])
            source = stack.enter_context(Checkpoint(path))
        yield _lazy(source)


def _check_unquantized(path: str, wanted: bool, what: str = "quantized already") -> None:
    if wanted:
        raise ValueError(f"{path} is {what}; leave out --bits, --budget and --rule")


def _kept_float(
    args: argparse.Namespace, source: Checkpoint, names: dict[str, Any]
) -> dict[str, str]:
    """The tensors that compressed-tensors would hold dequantized: their error would save no byte."""
    from optax_clipquant.formats.compressed_tensors.write import takes_codes

    with Checkpoint(args.like) as like:
        return {
            name: "not of a linear layer"
            for name, (_, shape) in source.specs.items()
            if not takes_codes(name, shape, names, like.specs)
        }


def _lazy(source: Checkpoint) -> "dict[str, Leaf]":
    """The leaves of a checkpoint, read on demand."""
    from optax_clipquant.formats.dtypes import Opaque
    from optax_clipquant.formats.leaves import Leaf
    from optax_clipquant.formats.native.trees import restored

    # Cached, since each layer of a stacked leaf reads the same content.
    @functools.lru_cache(maxsize=1)
    def read(name: str) -> Any:
        with source.describing(name):
            return restored(source.leaves[name], source.tensors(name))

    def leaf_of(name: str, path: str) -> Leaf:
        stored = source.leaves[name]
        if isinstance(stored.dtype, Opaque):
            raise ValueError(f"{source.path}: tensor {path!r} has a dtype that NumPy lacks; keep it out of IN")  # fmt: skip
        if stored.levels is None:
            return Leaf(path, stored.shape, stored.dtype, None, lambda: read(name))
        return Leaf(path, stored.shape, stored.dtype, read(name).grid, lambda: read(name).qvalue)

    paths = {name: path_of_name(name) if source.is_saved else name for name in source.leaves}
    return {path: leaf_of(name, path) for name, path in paths.items()}


def _is_gguf(path: str) -> bool:
    if not os.path.isfile(path):
        return False
    with open(path, "rb") as file:
        return file.read(4) == b"GGUF"


def _is_compressed_tensors(path: str) -> bool:
    try:
        quantization = read_config(path).get("quantization_config")
    except (OSError, ValueError):
        return False
    return (
        isinstance(quantization, dict) and quantization.get("quant_method") == "compressed-tensors"
    )
