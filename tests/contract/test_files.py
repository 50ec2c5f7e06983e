"""Statements 20 and 21 of the contract: adapter files go both ways, byte for byte."""

import filecmp
import functools
import json
import shutil
import warnings

import pytest
import torch
from parity import assert_same_step, make_batch, outcome, prompt_of
from peft import PeftModel, PeftModelForCausalLM, get_peft_model
from safetensors.torch import load_file
from tiny_models import build, pair, prompt_config, prompted

import softprompt

BATCH = make_batch(side="left", labels="everywhere")
FILES = ["README.md", "adapter_config.json", "adapter_model.safetensors"]


@functools.cache
def built():
    return prompted("llama", torch.float32)


def models():
    stock, fast = pair(built())
    return stock, softprompt.patch(fast, on_unsupported="error")


def files_of(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def assert_same_files(one, other):
    assert files_of(one) == files_of(other)
    for name in files_of(one):
        assert filecmp.cmp(one / name, other / name, shallow=False), name


def test_20_the_files_are_the_same_and_are_read_both_ways(tmp_path):
    stock, fast = models()
    for name, model in (("stock", stock), ("fast", fast)):
        model.save_pretrained(tmp_path / name)
    assert files_of(tmp_path / "fast") == FILES
    assert_same_files(tmp_path / "fast", tmp_path / "stock")
    assert list(load_file(tmp_path / "fast" / "adapter_model.safetensors")) == ["prompt_embeddings"]
    theirs = PeftModel.from_pretrained(stock.get_base_model(), tmp_path / "fast")
    ours = softprompt.patch(PeftModel.from_pretrained(fast.get_base_model(), tmp_path / "stock"))
    assert torch.equal(prompt_of(theirs), prompt_of(fast))
    assert torch.equal(prompt_of(ours), prompt_of(stock))
    assert_same_step(ours, stock, BATCH, 2e-6)


def test_20_bin_files_are_read_both_ways(tmp_path):
    stock, fast = models()
    for name, model in (("stock", stock), ("fast", fast)):
        with torch.no_grad():
            prompt_of(model).mul_(2 if name == "fast" else 1)
        model.save_pretrained(tmp_path / name, safe_serialization=False)
    assert files_of(tmp_path / "fast") == ["README.md", "adapter_config.json", "adapter_model.bin"]
    for model, folder, other in ((stock, "fast", fast), (fast, "stock", stock)):
        expected = prompt_of(other).detach().clone()
        model.load_adapter(tmp_path / folder, "theirs")
        assert torch.equal(prompt_of(model, "theirs"), expected)


def test_20_other_adapters_have_folders_and_may_be_selected(tmp_path):
    for name, model in zip(("stock", "fast"), models(), strict=True):
        torch.manual_seed(5)
        model.add_adapter("long", prompt_config(model.get_base_model(), 7))
        model.save_pretrained(tmp_path / name / "all")
        model.save_pretrained(tmp_path / name / "one", selected_adapters=["long"])
    assert_same_files(tmp_path / "fast", tmp_path / "stock")
    assert [name for name in files_of(tmp_path / "fast" / "one") if "/" in name] == [
        f"long/{name}" for name in FILES if name != "README.md"
    ]


def changed_config(folder, **changes):
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in (config | changes).items() if v != "removed"}))


@pytest.mark.parametrize(
    "changes",
    [{"a_key_of_the_future": 1}, {"tokenizer_kwargs": "removed", "peft_version": "removed"}],
    ids=["unknown keys", "missing keys"],
)
def test_20_unknown_and_missing_keys_of_the_configuration_are_as_in_peft(changes, tmp_path):
    stock, fast = models()
    fast.save_pretrained(tmp_path)
    changed_config(tmp_path, **changes)
    expected, got = (outcome(model.load_adapter, tmp_path, "old") for model in (stock, fast))
    assert got.error == expected.error is None
    assert got.warnings == expected.warnings
    assert bool(got.warnings) == ("a_key_of_the_future" in changes)
    assert torch.equal(prompt_of(fast, "old"), prompt_of(fast))


def with_saved_head():
    base = build("llama", torch.float32)
    config = prompt_config(base)
    config.modules_to_save = ["lm_head"]
    torch.manual_seed(3)
    return get_peft_model(base, config)


def test_20_modules_to_save_have_the_same_keys(tmp_path):
    stock, fast = pair(with_saved_head())
    softprompt.patch(fast)
    assert_same_step(fast, stock, BATCH, 2e-6)
    for name, model in (("stock", stock), ("fast", fast)):
        model.save_pretrained(tmp_path / name)
    assert_same_files(tmp_path / "fast", tmp_path / "stock")
    keys = set(load_file(tmp_path / "fast" / "adapter_model.safetensors"))
    assert keys == {"prompt_embeddings", "base_model.lm_head.weight"}


@pytest.mark.parametrize("damage", ["no weights", "another shape"])
def test_20_files_that_do_not_fit_are_the_same_error(damage, tmp_path):
    stock, fast = models()
    fast.save_pretrained(tmp_path / "whole")
    if damage == "no weights":
        (tmp_path / "whole" / "adapter_model.safetensors").unlink()
    else:
        changed_config(tmp_path / "whole", num_virtual_tokens=5)
    shutil.copytree(tmp_path / "whole", tmp_path / "broken")
    expected, got = (outcome(model.load_adapter, tmp_path / "broken", "new") for model in (stock, fast))
    assert expected.error is not None
    assert got.error[0] is expected.error[0]


def test_21_a_loaded_model_is_in_evaluation_and_inference_mode(tmp_path):
    models()[1].save_pretrained(tmp_path)
    stock, fast = (PeftModel.from_pretrained(build("llama", torch.float32), tmp_path) for _ in range(2))
    softprompt.patch(fast, on_unsupported="error")
    for model in (stock, fast):
        assert isinstance(model, PeftModelForCausalLM)
        assert not model.training
        assert model.peft_config["default"].inference_mode
        assert prompt_of(model).requires_grad
    assert_same_step(fast, stock, BATCH, 2e-6)


def test_21_a_trainable_adapter_is_the_error_of_peft(tmp_path):
    stock, fast = models()
    fast.save_pretrained(tmp_path)
    expected, got = (
        outcome(type(model).from_pretrained, model.get_base_model(), tmp_path, is_trainable=True)
        for model in (stock, fast)
    )
    assert got.error == expected.error
    assert got.error[0] is ValueError


def test_21_a_saved_prompt_is_trained_further_as_in_peft(tmp_path):
    stock, fast = models()
    with torch.no_grad():
        prompt_of(fast).mul_(2)
    fast.save_pretrained(tmp_path)
    for model in (stock, fast):
        with torch.no_grad():
            prompt_of(model).zero_()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.load_adapter(tmp_path, "default")
    assert prompt_of(fast).any()
    assert_same_step(fast, stock, BATCH, 2e-6)
