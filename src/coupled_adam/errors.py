"""Errors that the user can fix: one line that names the value and the remedy."""

import importlib.util
import unicodedata


class InputError(ValueError):
    """A bad input. The command line prints the message alone and exits with status 2."""


def require(extra: str, *modules: str) -> None:
    """Raise ImportError naming the optional extra that provides ``modules``, if one of them is not installed."""
    missing = [m for m in modules if importlib.util.find_spec(m) is None]
    if missing:
        raise ImportError(f"{', '.join(missing)} not installed: pip install 'coupled-adam[{extra}]'")


def require_trainer(module: str, package: str) -> None:
    """Raise ImportError naming the package of somebody else's trainer, if that is not installed."""
    if importlib.util.find_spec(module) is None:
        raise ImportError(f"{module} not installed: pip install {package}")


def one_line(error: object, limit: int = 300) -> str:
    """Return a message in one line that a terminal can show as it is, or an error's type if it has no message.

    Many libraries begin with a line that says nothing and go on with the reasons; all of it is kept, up to ``limit``
    characters. Control characters are shown, not carried out: messages hold names out of files.
    """
    text = printable(" ".join(str(error).split()))
    if not text:
        return type(error).__name__
    return text if len(text) <= limit else text[: limit - 1] + "…"


def printable(text: str) -> str:
    r"""Escape what a terminal would carry out or cannot show: ``\x1b`` for the escape character.

    Examples:
        >>> printable("a\x1b[31mb\n")
        'a\\x1b[31mb\n'
    """
    return "".join(c if c in "\n\t" or unicodedata.category(c)[0] != "C" else ascii(c)[1:-1] for c in text)
