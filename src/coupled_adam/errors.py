"""Errors that the user can mend: one line that names the value and the remedy."""

import importlib.util


class InputError(ValueError):
    """A bad input. The command line prints the message alone and exits with 2."""


def require(extra: str, *modules: str) -> None:
    """Raise ImportError naming the optional extra that brings ``modules``, if one of them is not installed."""
    missing = [m for m in modules if importlib.util.find_spec(m) is None]
    if missing:
        raise ImportError(f"{', '.join(missing)} not installed: pip install 'coupled-adam[{extra}]'")
