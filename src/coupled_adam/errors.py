"""How work ends early: errors that the user can fix, in one line that names the value and the remedy; and stops."""

import errno
import importlib.util
import os
import signal
import unicodedata

__all__ = ["DivergedError", "InputError", "Interrupted"]

#: How to install an optional extra. The package is on no index yet.
INSTALL = "in a clone of the repository: pip install '.[{extra}]'"


class InputError(ValueError):
    """The user can fix it: the message names the value and the remedy. The command line prints it and exits with 2."""


class DivergedError(RuntimeError):
    """The loss or the gradient is no longer finite, so training stops; the last checkpoint is intact."""


class Interrupted(Exception):
    """A signal asked the process to stop. Everything done so far is saved.

    Args:
        message: what was saved, and how to continue.
        signal_number: the signal that was received.
    """

    def __init__(self, message: str, signal_number: int = signal.SIGINT) -> None:
        super().__init__(message)
        self.signal_number = signal_number


def require(extra: str, *modules: str) -> None:
    """Raise ImportError naming the optional extra that provides ``modules``, if one of them is not installed."""
    missing = [m for m in modules if importlib.util.find_spec(m) is None]
    if missing:
        raise ImportError(f"{', '.join(missing)} not installed; {INSTALL.format(extra=extra)}", name=missing[0])


def require_trainer(module: str, package: str) -> None:
    """Raise ImportError naming the package of somebody else's trainer, if that is not installed."""
    if importlib.util.find_spec(module) is None:
        raise ImportError(f"{module} not installed: pip install {package}", name=module)


#: What a path that cannot be used is called by the operating system.
BAD_PATH = {
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
    errno.ENOTEMPTY,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENAMETOOLONG,
    errno.ELOOP,
}


def of_system(error: OSError) -> str:
    """Return the message of an error of the operating system, without its number and Python's quotes.

    Examples:
        >>> of_system(FileNotFoundError(2, "No such file or directory", "my.toml"))
        'my.toml: no such file or directory'
    """
    if error.strerror is None:
        return str(error)
    reason = error.strerror[:1].lower() + error.strerror[1:]
    return reason if error.filename is None else f"{os.fspath(error.filename)}: {reason}"


def one_line(error: object, limit: int = 300) -> str:
    """Return a message in one line that a terminal can show as it is, or an error's type if it has no message.

    Many libraries begin with a line that says nothing and go on with the reasons; all of it is kept, up to ``limit``
    characters. Control characters are shown, not carried out: messages hold names out of files.
    """
    text = printable(" ".join(str(error).split()))
    if not text:
        return type(error).__name__
    return text if len(text) <= limit else text[: limit - 1] + "…"


def printable(text: str, keep: str = "") -> str:
    r"""Escape what a terminal would carry out or cannot show, except for the characters in ``keep``.

    Control and format characters (the escape character, line breaks, changes of the writing direction), lone
    surrogates, and characters that are none.

    Examples:
        >>> printable("a\x1b[31mb\n")
        'a\\x1b[31mb\\n'
    """
    if text.isprintable():  # the words of a vocabulary nearly always are
        return text
    return "".join(c if c in keep or not _is_control(c) else ascii(c)[1:-1] for c in text)


def _is_control(character: str) -> bool:
    category = unicodedata.category(character)
    return category[0] == "C" or category in ("Zl", "Zp")
