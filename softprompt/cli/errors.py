"""What the command line says when it cannot do what it was asked to."""

import os
from importlib.util import find_spec

EXTRA_PACKAGES = ("accelerate", "datasets", "matplotlib", "pandas", "rich")


class UsageError(Exception):
    """A request that cannot be met; the message is one line with the problem and the remedy. Exit code 2."""


OUT_OF_MEMORY = (
    "the memory is not enough for this: give a smaller --batch-size, --max-length or --num-virtual-tokens, "
    "or --bf16"
)


# What numpy, torch and safetensors say where a file ends too early; none of it names an error of the system.
_CUT_SHORT = ("requested and", "inline_container", "PytorchStreamWriter", "I/O error")


def what_the_machine_lacks(error: BaseException) -> str | None:
    """Return the line for an error that is the machine's and not the program's, None for any other."""
    if is_out_of_memory(error):
        return OUT_OF_MEMORY
    if any(words in str(error) for words in _CUT_SHORT):
        return f"a file could not be written, is the disk full? ({' '.join(str(error).split())})"
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there is no memory left, on the CPU or on a GPU."""
    # By its name: the command line shows its help without waiting for torch.
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or "can't allocate memory" in str(error)


def require_extra() -> None:
    """Raise UsageError naming the packages of the extra `cli` that are not installed."""
    missing = [name for name in EXTRA_PACKAGES if find_spec(name) is None]
    if missing:
        raise UsageError(
            f"{', '.join(missing)} is not installed: run pip install '.[cli]' in the folder of softprompt's "
            "sources"
        )


def refuse_several_processes() -> None:
    """Raise UsageError behind torchrun or `accelerate launch`, which start the command several times."""
    processes = os.environ.get("WORLD_SIZE", "1")
    if processes != "1":
        raise UsageError(
            f"the command line runs in one process, and WORLD_SIZE is {processes}: start it without torchrun "
            "or accelerate launch; docs/distributed.md has a script for several processes"
        )
