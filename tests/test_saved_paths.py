"""Adapters whose configuration was given a path in place of a name."""

import json
from pathlib import Path

import pytest
import torch
from parity import prompt_of
from peft import PeftModel, PromptTuningConfig, get_peft_model
from seq2seq_models import build as build_seq2seq
from tiny_models import build
from transformers import AutoModelForCausalLM

import softprompt
from softprompt.tiny import eval_table, model_path, train_table

TEXT = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "the app", "num_virtual_tokens": 3}


def shipped(tokenizer):
    base = AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32)
    config = PromptTuningConfig(task_type="CAUSAL_LM", tokenizer_name_or_path=tokenizer, **TEXT)
    return get_peft_model(base, config)


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_shipped_model_has_a_name_like_any_other_and_its_tables_are_files():
    assert type(model_path()) is str
    assert Path(model_path(), "config.json").is_file()
    assert train_table().is_file()
    assert eval_table().is_file()


def test_plain_peft_saves_an_adapter_of_the_shipped_model(tmp_path):
    shipped(model_path()).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["tokenizer_name_or_path"] == saved["base_model_name_or_path"] == model_path()


def test_a_path_is_saved_as_the_string_that_it_is(tmp_path):
    named, pathed = shipped(model_path()), softprompt.patch(shipped(Path(model_path())))
    pathed.peft_config["default"].base_model_name_or_path = Path(model_path())
    named.save_pretrained(tmp_path / "named")
    pathed.save_pretrained(tmp_path / "pathed")
    assert files(tmp_path / "pathed") == files(tmp_path / "named")
    base = AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32)
    loaded = PeftModel.from_pretrained(base, tmp_path / "pathed")
    assert torch.equal(prompt_of(loaded), prompt_of(pathed))


@pytest.mark.parametrize("kind", ["CAUSAL_LM", "SEQ_2_SEQ_LM"])
def test_paths_of_every_adapter_are_saved(tmp_path, kind):
    base = build("llama") if kind == "CAUSAL_LM" else build_seq2seq("t5")
    sizes = {"task_type": kind, "num_virtual_tokens": 3}
    model = get_peft_model(base, PromptTuningConfig(**sizes, tokenizer_name_or_path=Path("models", "a")))
    softprompt.patch(model)
    model.add_adapter("b", PromptTuningConfig(**sizes, tokenizer_name_or_path=Path("models", "b")))
    model.save_pretrained(tmp_path)
    first, second = tmp_path / "adapter_config.json", tmp_path / "b" / "adapter_config.json"
    assert json.loads(first.read_text())["tokenizer_name_or_path"] == str(Path("models", "a"))
    assert json.loads(second.read_text())["tokenizer_name_or_path"] == str(Path("models", "b"))
