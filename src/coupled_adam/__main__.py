"""``coupled-adam`` and ``python -m coupled_adam``: how every command starts and ends, whatever is installed."""

import atexit
import os
import signal
import sys
import threading
import warnings
from collections.abc import Sequence
from types import FrameType

from coupled_adam import __version__
from coupled_adam.errors import BAD_PATH, INSTALL, DivergedError, InputError, Interrupted, of_system, one_line, require
from coupled_adam.terminal import print_error, print_line, survive_encoding

#: What the program is called, however it was started.
COMMAND = "coupled-adam"

#: What a shell adds to the number of the signal that ended a program.
SIGNALED = 128

#: Characters of an error: a message of ours lists what there is to choose from.
LONGEST = 4000

#: The help of an installation that has the optimizers alone.
HELP = """\
Usage: coupled-adam [OPTIONS] COMMAND [ARGS]...

  AdamW for language models that keeps token embeddings centered: optimizers, experiments, measurements.

  The optimizers are installed (from coupled_adam import CoupledAdam, param_groups). The commands need the extra demo;
  {install}

Options:
  --version   Show the version and exit.
  -h, --help  Show this message and exit.

Commands:
  demo         Compare AdamW with Coupled Adam on real text.
  prepare      Turn text into token shards.
  experiments  List the papers' experiments and miniatures, or show one.
  train        Train one experiment, resume it, or train it longer.
  reproduce    Train and evaluate the remaining runs of a suite.
  evaluate     Evaluate a run: loss, embeddings, export, downstream tasks.
  export       Export a model that transformers loads without this package.
  report       Report on evaluated runs: the paper's table and charts.
  audit        Audit the embeddings of any model."""


def main() -> None:
    """Run the command line, and exit with its status.

    0; 1 after a failure; 2 after an input that the user can fix, whoever notices it; 128 and its number after a signal.
    A failure that nobody has foreseen keeps its traceback.
    """
    survive_encoding()
    formatwarning, warnings.formatwarning = warnings.formatwarning, _warning
    interrupts: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        """The first ends the work, which may take a moment; the second does not wait."""
        interrupts.append(number)
        if len(interrupts) > 1:
            os._exit(SIGNALED + number)
        raise KeyboardInterrupt

    # A shell may have had the signal ignored, as for a job in the background.
    ours = threading.current_thread() is threading.main_thread()
    ours = ours and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if ours:
        signal.signal(signal.SIGINT, interrupt)
    try:
        status = _status(sys.argv[1:])
        sys.stdout.flush()
    except BaseException as error:
        # Some libraries make an error of their own of an interrupt, above all while they are imported.
        interrupted = bool(interrupts) or isinstance(error, KeyboardInterrupt)
        interrupts.append(signal.SIGINT)  # from here on the next one is the second
        status = SIGNALED + signal.SIGINT if interrupted else _failed(error)
    finally:
        warnings.formatwarning = formatwarning
    interrupts.append(signal.SIGINT)
    if ours:  # Python's own end would die of one, after everything is done
        atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)
    sys.exit(status)


def _status(arguments: list[str]) -> int:
    """Run a command, and return the exit status."""
    if arguments == ["--version"]:
        print_line(__version__)
        return 0
    if not arguments or {"-h", "--help"} & set(arguments):
        try:
            require("demo", "typer", "rich")
        except ImportError:
            print_line(HELP.format(install=INSTALL.format(extra="demo")))
            return 0
    return _command(arguments)


def _command(arguments: list[str]) -> int:
    require("demo", "typer", "rich")
    import typer

    from coupled_adam.cli import app

    try:
        ended = app(args=arguments or ["--help"], prog_name=COMMAND, standalone_mode=False)
    except typer.Abort:
        raise KeyboardInterrupt from None
    except Exception as error:
        if not hasattr(error, "format_message"):
            raise
        context = getattr(error, "ctx", None)
        help_for = f"; see {context.command_path} --help" if context else ""
        given = _given(arguments, getattr(getattr(error, "param", None), "opts", ()))
        raise InputError(f"{error.format_message().rstrip('.')}{given}{help_for}") from None
    return ended if isinstance(ended, int) else 0


def _given(arguments: list[str], options: Sequence[str]) -> str:
    """Return what was given for one of ``options``, to be appended to a message that does not say it; else nothing."""
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        name, equals, value = argument.partition("=")
        if name in options and (equals or following):
            return f" (got {(value if equals else following)!r})"
    return ""


def _failed(error: BaseException) -> int:
    """Print the one line of a failure, and return the exit status that it stands for; raise one that is a bug."""
    text, status = one_line(error, LONGEST), 1
    match error:
        case Interrupted():
            print_error(f"{text}. Rerun the same command to resume.")
            return SIGNALED + error.signal_number
        case BrokenPipeError():  # whoever reads the output has seen enough
            _end_output()
            return status
        case InputError():
            status = 2
        case ImportError() if not (error.name or "").startswith("coupled_adam"):
            status = 2
            if isinstance(error, ModuleNotFoundError) and error.name and "." not in error.name:
                text = f"{error.name} not installed; {INSTALL.format(extra='demo')}"
        case OSError():
            _end_output()  # it may be what is full
            text, status = one_line(of_system(error), LONGEST), 2 if error.errno in BAD_PATH else 1
        case RecursionError():
            text = f"the input is nested too deeply ({text})"
        case MemoryError() | RuntimeError() if isinstance(error, MemoryError) or _lacks_memory(error):
            text = f"out of memory ({text})" if str(error) else "out of memory"
        case DivergedError():
            pass
        case _:
            raise error
    print_error(f"coupled-adam: {text}")
    return status


def _lacks_memory(error: BaseException) -> bool:
    """Return whether torch could not allocate a tensor."""
    return type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator" in str(error)


def _end_output() -> None:
    """Write what standard output still holds; where that is impossible, let Python not complain about it at the end."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    return f"{one_line(filename)}:{lineno}: {category.__name__}: {one_line(message, LONGEST)}\n"


if __name__ == "__main__":
    main()
