"""The command ``optax-clipquant``, which inspects, compresses and converts model files."""

import os
import signal
import sys
import threading
import types
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code: 0, 1 after an error, 128 + n after signal n.

    As a command, without ``argv``, it does not use accelerators unless ``JAX_PLATFORMS`` names them.
    """
    # SIGTERM raises like Ctrl-C, so that half-written files are removed. Only the main thread gets signals.
    main_thread = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, _terminate) if main_thread else None
    try:
        return _run(argv)
    except (KeyboardInterrupt, _Terminated) as stop:
        print("optax-clipquant: interrupted; nothing is left half-written", file=sys.stderr)
        return 128 + (signal.SIGTERM if isinstance(stop, _Terminated) else signal.SIGINT)
    finally:
        if main_thread:
            signal.signal(signal.SIGTERM, before)


def _run(argv: Sequence[str] | None) -> int:
    # Imported here, so that a signal during the imports ends the command just as quietly.
    from optax_clipquant.cli import compress, convert, decompress, inspect
    from optax_clipquant.cli.arguments import parser_of
    from optax_clipquant.cli.terminal import message_of

    args = parser_of(inspect.add, compress.add, decompress.add, convert.add).parse_args(argv)
    if argv is None:
        # The work takes less time than reading and writing, and a TPU may be in use for training.
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    try:
        args.run(args)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader closed the pipe. Python flushes the rest of the output once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError, TypeError, RuntimeError, MemoryError) as error:
        print(f"optax-clipquant: error: {message_of(error)}", file=sys.stderr)
        return 1
    return 0


class _Terminated(BaseException):
    """Raised on SIGTERM."""


def _terminate(number: int, frame: types.FrameType | None) -> None:
    raise _Terminated


if __name__ == "__main__":
    sys.exit(main())
