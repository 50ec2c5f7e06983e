"""The parts of `python -m benchmarks gpu`."""

import sys
from pathlib import Path

import pytest

from benchmarks import gpu
from benchmarks.__main__ import main


@pytest.fixture
def commands(monkeypatch):
    """What a pass would run, in order."""
    commands = []

    class Done:
        returncode = 0

    def run(command, *, cwd, env):
        commands.append((command, env))
        return Done

    monkeypatch.setattr(gpu.subprocess, "run", run)
    return commands


@pytest.mark.parametrize("part", gpu.PARTS)
def test_a_part_runs_what_is_there(part, commands, tmp_path):
    assert gpu.run_parts([part], gpu.Pass(tmp_path, "abc", seconds=30)) == 0
    assert commands
    for command, environment in commands:
        assert environment["SOFTPROMPT_NATIVE"] == "require"
        assert "TRITON_INTERPRET" not in set(environment) - set(gpu.os.environ)
        assert sys.executable in command
        for word in command:
            if word.startswith("tests/") or word == "setup.py":
                assert (gpu.ROOT / word).exists()


def test_the_cases_of_a_pass_can_be_chosen(commands, tmp_path):
    gpu.run_parts(["steps", "kernels"], gpu.Pass(tmp_path, None, ["8b"], ["embed-article"], 30))
    (steps, _), (kernels, _) = commands
    assert steps[-4:] == ["--cases", "8b", "--budget", "30"]
    assert kernels[-4:] == ["--cases", "embed-article", "--budget", "30"]


def test_a_rehearsal_is_of_toys_in_a_folder_of_its_own(commands, tmp_path):
    folder = tmp_path / "rehearsal"
    gpu.run_parts(gpu.REHEARSED, gpu.Pass(folder, rehearsal=True))
    runs = [command for command, _ in commands if "run" in command]
    assert runs
    assert all("--tiny" in command and "--budget" not in command for command in runs)
    assert all(environment["TRITON_INTERPRET"] == "1" for _, environment in commands)
    assert (folder / "README.md").exists()
    report = next(command for command, _ in commands if "report" in command)
    assert str(Path("benchmarks/results").resolve()) not in report


def test_all_parts_run_even_where_one_fails(monkeypatch, tmp_path, capsys):
    codes = iter((1, 0, 0))

    class Done:
        def __init__(self):
            self.returncode = next(codes)

    monkeypatch.setattr(gpu.subprocess, "run", lambda *args, **options: Done())
    assert gpu.run_parts(["tests", "steps", "kernels"], gpu.Pass(tmp_path)) == 1
    assert "failed: tests" in capsys.readouterr().err
    assert next(codes, None) is None


def test_without_a_gpu_a_pass_is_refused(monkeypatch, capsys):
    monkeypatch.setattr("benchmarks.__main__.has_gpu", lambda: False)
    assert main(["gpu"]) == 2
    assert "--rehearse" in capsys.readouterr().err
