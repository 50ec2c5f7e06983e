"""What the environments of run.py ask pip for."""

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
    pinned = {line.replace("==", ">=") for line in run.requirements("oldest")[:3]}
    # What all of them depend on themselves comes with them.
    assert pinned == {line for line in bounds if not line.startswith("filelock")}


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


def test_the_table_names_failures_and_keeps_the_rest_of_the_page(run, tmp_path):
    entry = {
        "versions": {"torch": "1", "transformers": "2", "peft": "3"},
        "tests": 9,
        "failures": 1,
        "errors": 2,
        "skipped": 4,
        "packed": 5,
        "largest_error": 1.4e-6,
    }
    page = tmp_path / "page.md"
    page.write_text(f"before\n{run.BEGIN}\nold\n{run.END}\nafter\n")
    run.write_page({"newest": entry}, page)
    text = page.read_text()
    assert "| newest | 1 | 2 | 3 | 9 | 3 | 4 | 5 | 1e-06 |" in text
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text


def test_a_page_without_marks_is_refused(run, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("nothing\n")
    with pytest.raises(ValueError, match="has no <!-- environments:begin -->"):
        run.write_page({}, page)
