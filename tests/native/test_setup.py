"""What setup.py does where the native ops cannot even be tried; tests/install installs into environments."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FREE_THREADED = "import sysconfig; sysconfig.get_config_vars()['Py_GIL_DISABLED'] = 1"


def name_of_package(first, folder, mode):
    """`python setup.py --name` with another line of Python first, and with the modules of a folder."""
    return subprocess.run(
        [
            *(sys.executable, "-c"),
            f"{first}; import runpy, sys; sys.argv = ['setup.py', '--name']; runpy.run_path('setup.py')",
        ],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(folder), "SOFTPROMPT_NATIVE": mode},
        capture_output=True,
        text=True,
    )


@pytest.fixture(params=["torch that does not load", "free-threaded"])
def obstacle(request, tmp_path):
    """What stands in the way: a line of Python that makes it, the folder of its modules, and the reason."""
    if request.param == "free-threaded":
        return FREE_THREADED, tmp_path, "a free-threaded Python has no limited API"
    reason = "libcudart.so.99: cannot open shared object file"
    (tmp_path / "torch.py").write_text(f"raise OSError({reason!r})\n")
    return "pass", tmp_path, reason


def test_an_obstacle_is_a_warning(obstacle):
    first, folder, reason = obstacle
    done = name_of_package(first, folder, "auto")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["softprompt"]
    assert f"softprompt is installed without its native ops (optional): {reason}" in done.stderr


def test_an_obstacle_is_an_error_where_they_are_required(obstacle):
    first, folder, reason = obstacle
    done = name_of_package(first, folder, "require")
    assert done.returncode != 0
    assert f"SOFTPROMPT_NATIVE=require: its native ops cannot be built: {reason}" in done.stderr


def test_what_is_skipped_meets_no_obstacle(obstacle):
    first, folder, reason = obstacle
    done = name_of_package(first, folder, "skip")
    assert done.returncode == 0, done.stderr
    assert reason not in done.stderr
