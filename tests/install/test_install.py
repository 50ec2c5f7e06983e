"""Fresh virtual environments: whatever is missing, the package installs and says what it can do.

Run by .ci/run, since they take minutes; the isolated build fetches setuptools. The environments see
torch and the other dependencies of this one through a .pth file, but install the package themselves.
"""

import json
import os
import shutil
import stat
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

pytestmark = pytest.mark.install
ROOT = Path(__file__).parents[2]
NOT_BUILT = "the native ops for cpu are not built"


@pytest.fixture
def sources(tmp_path):
    """A copy of the files that git knows."""
    names = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    copy = tmp_path / "sources"
    for name in names:
        if (ROOT / name).exists():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)
    return copy


class Environment:
    """A virtual environment that sees the packages of this one, but not its softprompt."""

    def __init__(self, folder: Path) -> None:
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        self.python = folder / "bin" / "python"
        self.folder = folder
        purelib = Path(self.run("import sysconfig; print(sysconfig.get_paths()['purelib'])").strip())
        for old in purelib.glob("setuptools*"):  # Python 3.11 brings one that is too old for this project
            shutil.rmtree(old)
        # Behind its own packages, and without the .pth files there, one of which is an editable softprompt.
        (purelib / "of_this_environment.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")

    def install(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
        """`pip install`, with what the build says."""
        environment = {**os.environ, "PATH": f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}"}
        environment.pop("SOFTPROMPT_NATIVE", None)
        return subprocess.run(
            [
                str(self.python),
                "-m",
                "pip",
                "install",
                "--verbose",
                "--no-deps",
                "--force-reinstall",
                *arguments,
            ],
            capture_output=True,
            text=True,
            cwd=self.folder,
            env={**environment, **variables},
        )

    def run(self, code: str) -> str:
        """What Python prints, far from the sources."""
        done = subprocess.run(
            [str(self.python), "-c", code], capture_output=True, text=True, cwd=self.folder, check=True
        )
        return done.stdout

    def native(self) -> dict:
        """Whether the native ops can be used, why not, and where the package lies."""
        return json.loads(
            self.run(
                "import json, softprompt\n"
                "from softprompt.ops.registry import availability\n"
                "found = availability('native', 'cpu')\n"
                "from softprompt.ops.pack_layout import pack_layout\n"
                "import torch\n"
                "counts = pack_layout(torch.ones(2, 3), [4]).counts.tolist()\n"
                "print(json.dumps([found.usable, found.reason, softprompt.__file__, counts]))"
            )
        )


@pytest.fixture
def environment(tmp_path):
    return Environment(tmp_path / "environment")


def script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IEXEC)
    return path


def check(environment: Environment, *, usable: bool, reason: str, inside: Path) -> None:
    found_usable, found_reason, file, counts = environment.native()
    assert found_usable == usable, found_reason
    assert reason in found_reason
    assert Path(file).is_relative_to(inside)
    assert counts == [6, 0, 0, 3, 7]


def test_with_a_compiler_and_torch_the_native_ops_are_built(environment, sources):
    done = environment.install("--no-build-isolation", str(sources))
    assert done.returncode == 0, done.stdout + done.stderr
    check(environment, usable=True, reason="_native_cpu is built", inside=environment.folder)


def test_without_a_compiler_the_package_installs_without_them(environment, sources, tmp_path):
    nothing = tmp_path / "no-tools"
    nothing.mkdir()
    path = f"{environment.folder / 'bin'}{os.pathsep}{nothing}"
    done = environment.install("--no-build-isolation", str(sources), PATH=path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "softprompt is installed without the native ops" in done.stdout + done.stderr
    check(environment, usable=False, reason=NOT_BUILT, inside=environment.folder)


def test_a_broken_compiler_is_a_warning_that_says_how_to_build_later(environment, sources, tmp_path):
    compiler = script(tmp_path / "broken", "echo 'internal compiler error: out of luck' >&2; exit 4")
    done = environment.install("--no-build-isolation", str(sources), CXX=str(compiler), CC=str(compiler))
    assert done.returncode == 0, done.stdout + done.stderr
    said = " ".join((done.stdout + done.stderr).split())
    assert "softprompt is installed without the native ops softprompt._native_cpu (optional)" in said
    assert "To build them later: pip install torch 'setuptools>=77' ninja" in said
    check(environment, usable=False, reason=NOT_BUILT, inside=environment.folder)


def test_a_broken_compiler_is_an_error_where_they_are_required(environment, sources, tmp_path):
    compiler = script(tmp_path / "broken", "exit 4")
    done = environment.install(
        "--no-build-isolation", str(sources), CXX=str(compiler), CC=str(compiler), SOFTPROMPT_NATIVE="require"
    )
    assert done.returncode != 0
    assert "SOFTPROMPT_NATIVE=require: the native ops softprompt._native_cpu cannot be built" in (
        done.stdout + done.stderr
    )


def test_they_can_be_skipped(environment, sources):
    done = environment.install("--no-build-isolation", str(sources), SOFTPROMPT_NATIVE="skip")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ninja" not in done.stdout
    check(environment, usable=False, reason=NOT_BUILT, inside=environment.folder)


def test_an_isolated_build_has_no_torch_and_says_what_to_do(environment, sources):
    done = environment.install(str(sources))
    assert done.returncode == 0, done.stdout + done.stderr
    said = " ".join((done.stdout + done.stderr).split())
    assert "softprompt is installed without its native ops (optional): No module named 'torch'" in said
    assert "pip install --no-build-isolation" in said
    check(environment, usable=False, reason=NOT_BUILT, inside=environment.folder)


def test_an_editable_installation_builds_them_beside_the_sources(environment, sources):
    done = environment.install("--no-build-isolation", "--editable", str(sources))
    assert done.returncode == 0, done.stdout + done.stderr
    check(environment, usable=True, reason="_native_cpu is built", inside=sources)


def test_the_source_distribution_holds_what_the_build_needs(environment, sources, tmp_path):
    built = subprocess.run(
        [
            sys.executable,
            "-c",
            f"from setuptools import build_meta as b; print(b.build_sdist({str(tmp_path)!r}))",
        ],
        cwd=sources,
        capture_output=True,
        text=True,
        check=True,
    )
    archive = tmp_path / built.stdout.splitlines()[-1]
    shutil.rmtree(sources)
    done = environment.install("--no-build-isolation", str(archive), SOFTPROMPT_NATIVE="require")
    assert done.returncode == 0, done.stdout + done.stderr
    check(environment, usable=True, reason="_native_cpu is built", inside=environment.folder)
