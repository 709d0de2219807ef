"""The command ``optax-clipquant``, which inspects, compresses and converts model files.

Few modules are imported here, since Python answers Ctrl-C with a traceback until ``main`` runs.
"""

import os
import signal
import sys
import types
from collections.abc import Callable, Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code: 0, 1 after an error, 128 + n after signal n.

    As a command, without ``argv``, it does not use accelerators unless ``JAX_PLATFORMS`` names them.
    """
    stop = _Stop(is_command=argv is None)
    stop.take_over()
    if argv is None:
        _open_closed_streams()
    try:
        code = _run(argv, stop)
        stop.raises = False  # here, where a signal that comes before it is answered below
    except BaseException as error:
        # Also an error that the signal became on its way, as in imports of C code.
        if not (stop.received or isinstance(error, KeyboardInterrupt)):
            raise
        stop.raises = False
        print("optax-clipquant: interrupted; nothing is left half-written", file=sys.stderr)
        code = 128 + (stop.received or signal.SIGINT)
    finally:
        stop.give_back()
    return code


def _run(argv: Sequence[str] | None, stop: "_Stop") -> int:
    from optax_clipquant.cli import compress, convert, decompress, inspect
    from optax_clipquant.cli.arguments import parser_of
    from optax_clipquant.cli.terminal import message_of

    args = parser_of(inspect.add, compress.add, decompress.add, convert.add).parse_args(argv)
    if argv is None:
        # The work takes less time than reading and writing, and a TPU may be in use for training.
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    try:
        stop.raises = True
        args.run(args)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader closed the pipe. Python flushes the rest of the output once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError, TypeError, RuntimeError, MemoryError, ImportError) as error:
        if stop.received:
            raise
        print(f"optax-clipquant: error: {message_of(error)}", file=sys.stderr)
        return 1
    return 0


def _open_closed_streams() -> None:
    """Opens the streams that the parent closed, such as by ``>&-``, so that no file becomes one of them."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            # It gets the lowest free descriptor, which is that of the stream.
            descriptor = os.open(os.devnull, os.O_RDWR)
            setattr(sys, name, os.fdopen(descriptor, "r" if name == "stdin" else "w"))


class _Stopped(BaseException):
    """Raised on a signal."""


class _Stop:
    """Answers Ctrl-C and SIGTERM.

    While files may have to be removed, the first signal raises ``_Stopped``, and others are ignored. Before
    and after that, it ends the process of a command at once, since NumPy's import would turn the exception
    into another, and Python's exit would show it.

    Attributes:
      received: the number of the signal, or 0.
      raises: whether a signal raises in a command.
    """

    def __init__(self, *, is_command: bool) -> None:
        self.received = 0
        self.raises = False
        self._is_command = is_command
        self._before: dict[int, Callable[..., object] | int | None] = {}

    def take_over(self) -> None:
        """Installs the handlers, except for signals that the parent process has chosen to ignore."""
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) == signal.SIG_IGN:
                continue
            try:
                self._before[number] = signal.signal(number, self._handle)
            except ValueError:  # this is not the main thread, which gets the signals
                return
        if self._is_command:
            sys.unraisablehook = self._ignored

    def give_back(self) -> None:
        """Restores the handlers, except those of a command, which end its process to the last."""
        if not self._is_command:
            for number, handler in self._before.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: types.FrameType | None) -> None:
        if self._is_command and not self.raises:
            os._exit(128 + (self.received or number))
        if not self.received:
            self.received = number
            raise _Stopped

    def _ignored(self, error: "sys.UnraisableHookArgs") -> None:
        """Raises a little later what was raised where exceptions are ignored, as in a destructor."""
        if not issubclass(error.exc_type, _Stopped):
            sys.__unraisablehook__(error)
        elif hasattr(signal, "setitimer"):
            signal.signal(signal.SIGALRM, self._handle_again)
            signal.setitimer(signal.ITIMER_REAL, 0.001)

    def _handle_again(self, number: int, frame: types.FrameType | None) -> None:
        if not self.raises:
            os._exit(128 + self.received)
        raise _Stopped


if __name__ == "__main__":
    sys.exit(main())
