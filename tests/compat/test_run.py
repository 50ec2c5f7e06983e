"""What the environments of `make compat` ask pip for."""

import importlib.util
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def run():
    spec = importlib.util.spec_from_file_location("compat_run", Path(__file__).with_name("run.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_oldest_environment_has_the_lower_bounds_of_the_package(run):
    bounds = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    assert {line.replace("==", ">=") for line in run.requirements("oldest")[:3]} == set(bounds)


@pytest.mark.parametrize("package", ["torch", "transformers", "peft"])
def test_an_environment_pins_only_the_package_that_it_is_named_after(run, package):
    wanted = run.requirements(f"oldest-{package}")
    assert [line.split("==")[0] for line in wanted if "==" in line] == [package]


def test_the_newest_environment_pins_nothing(run):
    assert not any("=" in line for line in run.requirements("newest"))


def test_the_tests_of_an_environment_exist(run):
    assert all((ROOT / name).exists() for name in run.TESTS)


def test_an_unknown_environment_is_refused(run, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["run.py", "older"])
    with pytest.raises(SystemExit):
        run.main()
    assert "unknown environments older; there are oldest, oldest-torch" in capsys.readouterr().err
