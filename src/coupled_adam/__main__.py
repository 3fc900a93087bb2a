"""``coupled-adam`` and ``python -m coupled_adam``."""

import sys


def main() -> None:
    """Run the command line, or say in one line which extra it needs."""
    try:
        from coupled_adam import cli
    except ImportError as error:
        sys.exit(f"coupled-adam: {error}; the command line needs pip install 'coupled-adam[lm]'")
    cli.main()


if __name__ == "__main__":
    main()
