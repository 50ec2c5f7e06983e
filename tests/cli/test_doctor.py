import importlib.metadata
import json
from pathlib import Path

import pytest
import torch

import softprompt
from softprompt.cli import main
from softprompt.ops import registry


@pytest.fixture
def native(monkeypatch):
    """Sets what is found of the native ops, by the name of the module that holds them."""

    def hold(module):
        monkeypatch.setitem(registry._NATIVE_MODULES, "cpu", module)
        registry.native_availability.cache_clear()

    yield hold
    registry.native_availability.cache_clear()


def diagnosis(capsys):
    assert main(["doctor", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_doctor_names_versions_devices_and_the_choice_of_auto(capsys):
    found = diagnosis(capsys)
    versions = {finding["name"]: finding["detail"] for finding in found["packages"]}
    assert versions["torch"] == importlib.metadata.version("torch")
    assert {"softprompt", "transformers", "peft", "triton"} <= set(versions)
    assert found["devices"][0]["name"] == "cpu"
    assert found["chosen"]["cpu"] == ("native" if registry.native_availability("cpu").usable else "reference")
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    for part in (
        "packages",
        "devices",
        "back ends on cpu (auto takes",
        "to build the native ops",
        "reference",
    ):
        assert part in text


def test_doctor_says_how_to_build_native_ops_that_are_missing(capsys, native):
    native("softprompt._native_of_nothing")
    found = diagnosis(capsys)
    finding = next(finding for finding in found["backends"]["cpu"] if finding["name"] == "native")
    assert finding["state"] == "unusable"
    assert "are not built" in finding["detail"]
    assert finding["fix"].startswith("pip install --no-build-isolation .")
    assert found["chosen"]["cpu"] == "reference"


def test_a_module_from_other_sources_is_refused_instead_of_called(capsys, native, tmp_path, monkeypatch):
    (tmp_path / "module_of_another_time.py").write_text("INTERFACE = 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    native("module_of_another_time")
    availability = registry.native_availability("cpu")
    assert not availability.usable
    assert "was built from other sources (interface 0, expected" in availability.reason
    with pytest.raises(ValueError, match=r"backend='native' cannot be used: .* was built from other sources"):
        registry.choose_backend("embed_prompt", "native", torch.device("cpu"))


def test_a_module_that_does_not_load_gives_its_reason(native, tmp_path, monkeypatch):
    (tmp_path / "broken_module.py").write_text("raise ImportError('undefined symbol: at_something')\n")
    monkeypatch.syspath_prepend(tmp_path)
    native("broken_module")
    assert "does not load: undefined symbol: at_something" in registry.native_availability("cpu").reason


def test_doctor_fails_where_a_required_back_end_is_missing(capsys, native):
    native("softprompt._native_of_nothing")
    assert main(["doctor", "--require", "native"]) == 2
    assert "--require native: it cannot be used on cpu" in capsys.readouterr().err


def test_a_package_that_is_too_old_is_named_with_the_command_that_mends_it(capsys, monkeypatch):
    from softprompt import diagnosis as module

    version = module.importlib.metadata.version
    monkeypatch.setattr(
        module.importlib.metadata, "version", lambda name: "0.1.0" if name == "peft" else version(name)
    )
    finding = next(finding for finding in diagnosis(capsys)["packages"] if finding["name"] == "peft")
    assert finding["state"] == "unusable"
    assert finding["detail"].startswith("0.1.0, expected >=")
    assert finding["fix"].startswith("pip install 'peft>=")


def test_doctor_serves_a_copy_of_the_sources_that_is_not_installed(capsys, monkeypatch):
    from softprompt import diagnosis as module

    version = module.importlib.metadata.version

    def version_of(name):
        if name == "softprompt":
            raise module.importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(module.importlib.metadata, "version", version_of)
    sources = Path(__file__).parents[2]  # also where the package under test is installed elsewhere
    monkeypatch.setattr(module, "__file__", str(sources / "softprompt" / "diagnosis.py"))
    details = {finding["name"]: finding["detail"] for finding in diagnosis(capsys)["packages"]}
    assert details["softprompt"] == f"{softprompt.__version__}, not installed: used from {sources}"
    assert details["torch"] == importlib.metadata.version("torch")
    assert {"transformers", "peft"} <= set(details)


def test_doctor_looks_for_compilers_where_the_build_does(capsys, tmp_path, monkeypatch):
    for name in ("ccache", "nvcc"):
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text("#!/bin/sh\n")
        program.chmod(0o755)
    monkeypatch.setenv("CXX", f"{tmp_path}/bin/ccache g++")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setattr("torch.version.cuda", "13.0")
    found = {finding["name"]: finding["detail"] for finding in diagnosis(capsys)["build"]}
    assert found["C++ compiler"] == f"{tmp_path}/bin/ccache"
    assert found["nvcc"] == f"{tmp_path}/bin/nvcc"
