"""Errors that the user can fix: one line that names the value and the remedy."""

import importlib.util


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


def one_line(error: BaseException, limit: int = 200) -> str:
    """Return the first line of an error's message, or its type if it has none."""
    lines = str(error).strip().splitlines()
    return lines[0][:limit] if lines else type(error).__name__
