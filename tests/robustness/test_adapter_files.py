"""Damaged and hostile adapter folders: one clear error, and nothing in them is ever run."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import save_file
from tiny_models import build

import softprompt
from softprompt.prompts.adapters import read_adapter

P, H = 3, 48
GOOD = torch.linspace(-1, 1, P * H).view(P, H)
CONFIG = {
    "peft_type": "PROMPT_TUNING",
    "task_type": "CAUSAL_LM",
    "num_virtual_tokens": P,
    "token_dim": H,
    "num_transformer_submodules": 1,
    "num_layers": 1,
    "num_attention_heads": 1,
}


class Payload:
    """Makes a file where it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def folder_with(path, tensors=None, config=CONFIG):
    path.mkdir(exist_ok=True)
    text = config if isinstance(config, str) else json.dumps(config)
    (path / "adapter_config.json").write_text(text)
    save_file({"prompt_embeddings": GOOD} if tensors is None else tensors, path / "adapter_model.safetensors")
    return path


def through_peft(path):
    return softprompt.patch(PeftModel.from_pretrained(build("llama"), str(path)))


def test_a_good_folder_is_read_both_ways(tmp_path):
    path = folder_with(tmp_path / "good")
    assert torch.equal(read_adapter(path)[1], GOOD)
    assert torch.equal(through_peft(path).prompt_encoder["default"].embedding.weight, GOOD)


def test_a_tensor_file_cut_anywhere_is_refused(tmp_path):
    path = folder_with(tmp_path / "cut")
    file = path / "adapter_model.safetensors"
    whole = file.read_bytes()
    base = build("llama")
    for length in (*range(0, 120, 7), len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=f"the adapter in {path} cannot be read"):
            read_adapter(path)
        with pytest.raises(Exception, match=r"(?i)safetensor|header|deseriali|incomplete|buffer"):
            PeftModel.from_pretrained(base, str(path))


def test_a_configuration_cut_anywhere_is_refused(tmp_path):
    text = json.dumps(CONFIG)
    path = folder_with(tmp_path / "cut")
    for length in range(0, len(text), 9):
        (path / "adapter_config.json").write_text(text[:length])
        with pytest.raises(ValueError, match="cannot be read"):
            read_adapter(path)


CONFIGS = {
    "a list": [CONFIG],
    "a word": "PROMPT_TUNING",
    "nothing": None,
    "a type that is a number": CONFIG | {"peft_type": 7},
    "an unknown type": CONFIG | {"peft_type": "PROMPTS"},
    "a type of a list": CONFIG | {"peft_type": ["PROMPT_TUNING"]},
    "tokens in words": CONFIG | {"num_virtual_tokens": "three"},
    "tokens in a list": CONFIG | {"num_virtual_tokens": [3]},
    "fewer tokens than none": CONFIG | {"num_virtual_tokens": -3},
    "half a token": CONFIG | {"num_virtual_tokens": 2.5},
    "submodules in words": CONFIG | {"num_transformer_submodules": "one"},
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_configuration_of_wrong_types_is_refused(tmp_path, config):
    path = folder_with(tmp_path / "typed", config=json.dumps(config))
    with pytest.raises(ValueError, match=f"the adapter in {path}"):
        read_adapter(path)


TENSORS = {
    "another length": ({"prompt_embeddings": GOOD[:2]}, "2 virtual tokens, its configuration says 3"),
    "three dimensions": ({"prompt_embeddings": GOOD[None]}, "no floating-point prompt_embeddings"),
    "one dimension": ({"prompt_embeddings": GOOD[0]}, "no floating-point prompt_embeddings"),
    "whole numbers": ({"prompt_embeddings": GOOD.long()}, "no floating-point prompt_embeddings"),
    "another key": ({"prompts": GOOD}, "no floating-point prompt_embeddings"),
    "no tensor": ({}, "no floating-point prompt_embeddings"),
    "not a number": ({"prompt_embeddings": GOOD * torch.nan}, "are not finite"),
    "infinite": ({"prompt_embeddings": GOOD * torch.inf}, "are not finite"),
}


@pytest.mark.parametrize("tensors, message", TENSORS.values(), ids=TENSORS)
def test_a_tensor_that_is_no_prompt_is_refused(tmp_path, tensors, message):
    path = folder_with(tmp_path / "odd", tensors)
    with pytest.raises(ValueError, match=f"the adapter in {path} has .*{message}"):
        read_adapter(path)


def test_tensors_beside_the_prompt_do_no_harm(tmp_path):
    path = folder_with(tmp_path / "more", {"prompt_embeddings": GOOD, "something": torch.zeros(2)})
    assert torch.equal(read_adapter(path)[1], GOOD)


def pickled(file, marker, how):
    if how == "torch":
        torch.save({"prompt_embeddings": Payload(marker)}, file)
    elif how == "torch, old format":
        torch.save({"prompt_embeddings": Payload(marker)}, file, _use_new_zipfile_serialization=False)
    else:
        file.write_bytes(pickle.dumps(Payload(marker)))


@pytest.mark.parametrize("how", ["torch", "torch, old format", "pickle"])
@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.safetensors"])
def test_a_pickled_payload_is_not_run(tmp_path, name, how):
    path, marker = tmp_path / "hostile", tmp_path / "was-run"
    folder_with(path)
    (path / "adapter_model.safetensors").unlink()
    pickled(path / name, marker, how)
    with pytest.raises(ValueError, match=f"the adapter in {path} cannot be read"):
        read_adapter(path)
    with pytest.raises(Exception, match=r"(?i)weights.?only|header|deseriali|pickle"):
        through_peft(path)
    assert not marker.exists()
    pickle.loads(pickle.dumps(Payload(marker)))
    assert marker.exists()  # which it would have made
