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


@pytest.mark.skipif(sys.platform == "win32", reason="a script of the shell")
@pytest.mark.parametrize("chosen", [None, "/chosen"])
def test_the_toolkit_is_where_nvcc_says_even_if_nvcc_is_a_script_elsewhere(chosen, tmp_path):
    toolkit, programs = tmp_path / "toolkit" / "bin", tmp_path / "bin"
    for folder in (toolkit, programs, tmp_path / "torch" / "utils"):
        folder.mkdir(parents=True)
    nvcc = programs / "nvcc"
    nvcc.write_text(f"#!/bin/sh\necho '#$ TOP={toolkit}/..' >&2\n")
    nvcc.chmod(0o755)
    (tmp_path / "torch" / "__init__.py").write_text("class version:\n    cuda = '13.0'\n")
    (tmp_path / "torch" / "utils" / "cpp_extension.py").write_text(
        "import os\nraise OSError('built with ' + str(os.environ.get('CUDA_HOME')))\n"
    )
    named = {"SOFTPROMPT_NATIVE": "auto", **({} if chosen is None else {"CUDA_HOME": chosen})}
    environment = {
        name: value for name, value in os.environ.items() if name not in ("CUDA_HOME", "CUDA_PATH")
    }
    done = subprocess.run(
        [sys.executable, "setup.py", "--name"],
        cwd=ROOT,
        env={
            **environment,
            "PATH": os.pathsep.join([str(programs), os.environ["PATH"]]),
            "PYTHONPATH": str(tmp_path),
            **named,
        },
        capture_output=True,
        text=True,
    )
    assert f"built with {chosen or toolkit.parent}." in done.stderr
