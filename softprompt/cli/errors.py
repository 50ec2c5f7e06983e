"""What the command line says when it cannot do what it was asked to."""

from importlib.util import find_spec

EXTRA_PACKAGES = ("accelerate", "datasets", "matplotlib", "pandas", "rich")


class UsageError(Exception):
    """A request that cannot be met; the message is one line with the problem and the remedy. Exit code 2."""


def require_extra() -> None:
    """Raise UsageError naming the packages of the extra `cli` that are not installed."""
    missing = [name for name in EXTRA_PACKAGES if find_spec(name) is None]
    if missing:
        raise UsageError(f'{", ".join(missing)} is not installed: run pip install "softprompt[cli]"')
