"""What a record says of the device, the commit and the software."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("torch", "transformers", "peft", "softprompt", "triton", "liger-kernel", "cut-cross-entropy")
_ROOT = Path(__file__).parents[1]
_NAMED = {"commit": "none"}


def describe_device(device: str) -> dict[str, Any]:
    """Name, cores and threads; `folder` is where results of such a device lie."""
    if device == "cuda":
        name = torch.cuda.get_device_name()
        folder = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
        return {
            "kind": device,
            "name": name,
            "cuda": torch.version.cuda,
            "driver": _driver(),
            "folder": folder,
        }
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {
        "kind": device,
        "name": _cpu_name(),
        "cores": cores,
        "threads": torch.get_num_threads(),
        "folder": f"cpu-{cores}-cores",
    }


def _driver() -> str | None:
    """Version of NVIDIA's driver; None where its own program does not say."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.split()
    return lines[0] if done.returncode == 0 and lines else None


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(encoding="utf-8"), flags=re.MULTILINE)
        if found:
            return found[1].strip()
    return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Python and the packages that a time depends on; one that is not installed is left out."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def name_commit(name: str) -> None:
    """Says what `commit` answers in a copy of the files without a repository."""
    _NAMED["commit"] = name


def commit() -> str:
    """Short hash of the commit, with "-modified" where tracked files differ from it.

    Without a repository what `name_commit` said, or "none".
    """
    head = _git("rev-parse", "--short=10", "HEAD")
    if head is None:
        return _NAMED["commit"]
    return f"{head}-modified" if _git("status", "--porcelain", "--untracked-files=no") else head


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(_ROOT), *arguments], capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
