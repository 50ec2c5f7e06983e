"""Files of saved prompts, looked at without torch: whether they are there."""

from pathlib import Path

ADAPTER_CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


def check_prompt_path(path: Path) -> None:
    """Raises ValueError unless `path` is an adapter folder of PEFT or a file."""
    if path.is_dir():
        check_adapter_folder(path)
    else:
        check_file(path)


def check_file(path: Path) -> None:
    """Raises ValueError unless `path` is a file."""
    if not path.is_file():
        raise ValueError(f"{path} does not exist: give a .npy file or an adapter folder")


def check_adapter_folder(folder: Path) -> None:
    """Raises ValueError unless a folder has the two files of an adapter."""
    # PEFT would look on the model hub for what a folder lacks.
    if not (folder / ADAPTER_CONFIG).is_file():
        raise ValueError(f"{folder} holds no adapter: expected a folder with {ADAPTER_CONFIG}")
    if not any((folder / name).is_file() for name in WEIGHTS):
        raise ValueError(f"{folder} has no weights: expected {' or '.join(WEIGHTS)} beside {ADAPTER_CONFIG}")
