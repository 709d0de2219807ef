"""The command ``optax-clipquant``: look into safetensors files, make them small, and serve them."""

import os
import signal
import sys
import threading
import types
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code: 0, 1 after an error, 128 + n after signal n.

    As a command, without ``argv``, it keeps off accelerators unless ``JAX_PLATFORMS`` names them.
    """
    # As Ctrl-C does: so that a half-written file is removed. Only the main thread is told of signals.
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
    # Here, so that a signal that comes while they load ends the command as quietly.
    from optax_clipquant.cli import compress, convert, decompress, inspect
    from optax_clipquant.cli.arguments import parser_of
    from optax_clipquant.cli.terminal import message_of

    args = parser_of(inspect.add, compress.add, decompress.add, convert.add).parse_args(argv)
    if argv is None:
        # All is done while a byte is read and written; and a TPU belongs to who trains on it.
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    try:
        args.run(args)
        sys.stdout.flush()
    except BrokenPipeError:
        # Who read the output has enough. Python flushes what is left of it once more at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError, TypeError, RuntimeError, MemoryError) as error:
        print(f"optax-clipquant: error: {message_of(error)}", file=sys.stderr)
        return 1
    return 0


class _Terminated(BaseException):
    """SIGTERM."""


def _terminate(number: int, frame: types.FrameType | None) -> None:
    raise _Terminated


if __name__ == "__main__":
    sys.exit(main())
