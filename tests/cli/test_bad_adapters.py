"""Adapter folders of someone else: `predict` refuses in one line what it would compute nonsense with."""

import json

import pytest
import torch
from peft import PromptTuningConfig
from safetensors.torch import save_file

P, H = 3, 32
GOOD = torch.linspace(-1, 1, P * H).view(P, H)
CONFIG = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P, token_dim=H).to_dict()
TASK = {
    "text_column": "Tweet text",
    "label_column": "Label",
    "labels": ["x", "y"],
    "template": "{text_column} : {text} Label : ",
    "max_length": 64,
    "padding": "longest",
    "end_token": "pad",
    "positions": "padded",
    "training": {},
}


@pytest.fixture
def predict(run, model_folder, tmp_path, make_table):
    def call(*more, tensor=GOOD, config=None, task=None, file=None):
        folder = tmp_path / "adapter"
        folder.mkdir()
        (folder / "adapter_config.json").write_text(
            config if isinstance(config, str) else json.dumps(CONFIG | (config or {}), default=str)
        )
        save_file({"prompt_embeddings": tensor}, folder / "adapter_model.safetensors")
        if file is not None:
            whole = (folder / "adapter_model.safetensors").read_bytes()
            (folder / "adapter_model.safetensors").write_bytes(file(whole))
        content = (
            task
            if isinstance(task, bytes)
            else json.dumps(TASK | {"model": str(model_folder)} | (task or {})).encode()
        )
        (folder / "softprompt.json").write_bytes(content)
        data, output = make_table([("one",)], header=("Tweet text",)), tmp_path / "p.csv"
        code, out, err = run("predict", "--adapter", folder, "--data", data, "--output", output, *more)
        return code, out, err, folder, output

    return call


def test_a_good_adapter_is_used(predict):
    code, _, err, _, output = predict()
    assert (code, err) == (0, "")
    assert output.is_file()


ADAPTERS = {
    "not a number": (
        {"tensor": torch.where(torch.arange(P * H).view(P, H) == 7, torch.nan, GOOD)},
        "the adapter in {folder} has values that are not finite",
    ),
    "too large for fp32": (
        {"tensor": GOOD.double() * 1e300},
        "the adapter in {folder} has values that are not finite",
    ),
    "whole numbers": (
        {"tensor": GOOD.long()},
        "the adapter in {folder} has no floating-point prompt_embeddings of shape [P, H]",
    ),
    "another length": (
        {"tensor": GOOD[:2]},
        "the adapter in {folder} has 2 virtual tokens, its configuration says 3",
    ),
    "another width": (
        {"tensor": torch.zeros(P, 2 * H)},
        "the adapter {folder} does not fit the model {model}: its virtual tokens are 64 numbers wide, the "
        "model's tokens 32; give the --model that it was trained with",
    ),
    "a cut file": (
        {"file": lambda whole: whole[:100]},
        "the adapter in {folder} cannot be read: ...",
    ),
    "an empty file": (
        {"file": lambda whole: b""},
        "the adapter in {folder} cannot be read: ...",
    ),
    "a configuration that is a list": (
        {"config": "[]"},
        "the adapter in {folder} cannot be read: ...",
    ),
    "another type": (
        {"config": {"peft_type": "P_TUNING"}},
        "the adapter in {folder} is of type P_TUNING, expected PROMPT_TUNING",
    ),
    "another task type": (
        {"config": {"task_type": "SEQ_CLS", "num_transformer_submodules": 1}},
        "the adapter in {folder} is for models of the task type SEQ_CLS, expected CAUSAL_LM",
    ),
}


@pytest.mark.filterwarnings("ignore:Unexpected keyword arguments:UserWarning")
@pytest.mark.parametrize("more", [[], ["--score"]], ids=["generate", "score"])
@pytest.mark.parametrize("changes, message", ADAPTERS.values(), ids=ADAPTERS)
def test_a_bad_adapter_is_one_line_and_writes_nothing(predict, model_folder, changes, message, more):
    code, out, err, folder, output = predict(*more, **changes)
    assert (code, out) == (2, "")
    expected = f"softprompt: {message.format(folder=folder, model=model_folder)}\n"
    if expected.endswith("...\n"):  # what json or safetensors say
        assert err.count("\n") == 1
        err = err[: len(expected) - 4] + "...\n"
    assert err == expected
    assert not output.exists()


NO_TASK = "{folder}/softprompt.json is not a file that `softprompt train` wrote ({why}): train again"
TASKS = {
    "not UTF-8": (b"\xff", "'utf-8' codec can't decode byte 0xff in position 0: invalid start byte"),
    "too deep": (
        b"[" * 100_000,
        "maximum recursion depth exceeded while decoding a JSON array from a unicode string",
    ),
    "labels in one word": ({"labels": "xy"}, "labels is 'xy'"),
    "labels of numbers": ({"labels": [1, 2]}, "a label must be a text that is not blank, got 1"),
    "no labels": ({"labels": []}, "a classification task needs at least one label"),
    "a model of no name": ({"model": None}, "model is None"),
    "a length in words": (
        {"max_length": "64"},
        "max_length must be a whole number of at least 1, got '64'",
    ),
    "unknown positions": ({"positions": "x"}, "positions must be one of 'padded', 'compact', got 'x'"),
    "unknown padding": ({"padding": 3}, "padding must be one of 'max_length', 'longest', got 3"),
    "an unknown end": ({"end_token": "q"}, "end_token must be one of 'pad', 'eos', got 'q'"),
    "a column of no name": ({"text_column": 7}, "text_column must be a text, got 7"),
}


@pytest.mark.parametrize("task, why", TASKS.values(), ids=TASKS)
def test_a_bad_task_is_one_line_and_writes_nothing(predict, task, why):
    code, out, err, folder, output = predict(task=task)
    assert (code, out) == (2, "")
    assert err == f"softprompt: {NO_TASK.format(folder=folder, why=why)}\n"
    assert not output.exists()
