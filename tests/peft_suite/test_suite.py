"""The script that runs PEFT's own tests: it patches, compares, and does not pass where it ran nothing."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "run.py"
CASES = """
import pytest
import torch
from peft import LoraConfig, PeftModelForCausalLM, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM

PROMPT = (PromptTuningConfig, {"num_virtual_tokens": 3})
LORA = (LoraConfig, {"r": 2})


def made(config_cls, config_kwargs):
    model = AutoModelForCausalLM.from_pretrained("someone/tiny-random-LlamaForCausalLM")
    return get_peft_model(model, config_cls(task_type="CAUSAL_LM", **config_kwargs))


@pytest.mark.parametrize("config_cls,config_kwargs", [PROMPT, LORA])
def test_step(config_cls, config_kwargs):
    ids = torch.tensor([[5, 6, 7]])
    made(config_cls, config_kwargs)(input_ids=ids, labels=ids).loss.backward()


@pytest.mark.parametrize("config_cls,config_kwargs", [PROMPT])
def test_class(config_cls, config_kwargs):
    assert type(made(config_cls, config_kwargs)) is PeftModelForCausalLM


def test_of_an_unknown_model():
    AutoModelForCausalLM.from_pretrained("someone/no-such-kind")
    raise AssertionError(PromptTuningConfig)
"""


def run(*arguments):
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.slow(seconds=30)
def test_cases_on_prompts_are_run_with_and_without_the_patch(tmp_path):
    """Of a tree in miniature: one case passes both ways, one notices the patch, one fails both ways."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_models.py").write_text(CASES)
    (tmp_path / "tests" / "test_other.py").write_text("def test_of_something_else():\n    assert False\n")
    done = run(tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "| tests/test_models.py | 3 | 2 | 0 | 1 | 1 | 0 | 2 |" in done.stdout
    assert "passes without the patch only: tests/test_models.py::test_class" in done.stdout
    assert "fails without the patch, too: tests/test_models.py::test_of_an_unknown_model" in done.stdout
    assert "models: 2 x packed: PeftModelForCausalLM" in done.stdout
    assert "calls: 1 x fast forward of a causal model" in done.stdout
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["test_models.py", "test_other.py", "tests"]


def test_a_folder_without_such_tests_is_named(tmp_path):
    done = run(tmp_path)
    assert done.returncode == 2
    assert "is no PEFT source tree" in done.stdout


@pytest.fixture(scope="module")
def script():
    import importlib.util

    spec = importlib.util.spec_from_file_location("peft_suite_run", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def record(outcomes, models=None, calls=None):
    return {
        "outcomes": outcomes,
        "reasons": {},
        "not_collected": {},
        "models": {"packed: A": 1} if models is None else models,
        "calls": {"fast forward": 1} if calls is None else calls,
    }


@pytest.mark.parametrize(
    "stock, patched, wrong",
    [
        ({"a": "passed", "b": "failed"}, record({"a": "passed", "b": "failed"}), []),
        ({"a": "passed"}, record({"a": "skipped"}), ["passes without the patch only: a"]),
        ({"a": "passed"}, record({}), ["passes without the patch only: a: it did not run"]),
        ({"a": "failed"}, record({"a": "failed"}), ["no case passes without the patch"]),
        ({"a": "passed"}, record({"a": "passed"}, models={"stock: A": 2}), ["no model was patched"]),
        ({"a": "passed"}, record({"a": "passed"}, calls={"PEFT's own": 2}), ["no call took the fast route"]),
    ],
    ids=["all is well", "lost", "missing", "nothing passes", "nothing patched", "nothing fast"],
)
def test_a_run_that_loses_cases_or_says_nothing_fails(script, stock, patched, wrong):
    got = script.verdict(record(stock), patched)
    assert len(got) == len(wrong)
    assert all(line.startswith(start) for line, start in zip(got, wrong, strict=True))
