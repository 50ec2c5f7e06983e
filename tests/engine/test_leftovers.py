"""Models that keep the places of their last `generate`: no later call computes with them."""

import copy

import pytest
import torch
from generating import BATCH, patched, row_of, tokens
from parity import assert_close, make_batch
from tiny_models import VOCABULARY, with_prompt
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

import softprompt

MODELS = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v"]
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 64,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2]},
}
VISION = {"depth": 1, "hidden_size": 32, "embed_dim": 32, "num_heads": 2, "out_hidden_size": 48}


def reader(name):
    """A PEFT model around one that reads pictures too."""
    config = CONFIG_MAPPING[name](text_config=TEXT)
    for key, value in (VISION | {"intermediate_size": 32}).items():
        if hasattr(config.vision_config, key):
            setattr(config.vision_config, key, value)
    base = AutoModelForImageTextToText.from_config(config).double().eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    for parameter in base.parameters():
        parameter.normal_(0, 0.15, generator=generator)
    base.generation_config.eos_token_id = None
    base.generation_config.pad_token_id = 0
    return with_prompt(base).double()


def rows(count):
    return {name: values[:count] for name, values in BATCH.items()}


def leave(model, value, count=2):
    """What a call on pictures leaves."""
    model.get_base_model().model.rope_deltas = torch.full((count, 1), value)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("before", [True, False])
def test_losses_and_tokens_are_those_of_a_model_that_has_not_generated(name, before):
    """Patched before or after another call has left something."""
    stock = reader(name)
    fast = copy.deepcopy(stock)
    if before:
        patched(fast)
    leave(fast, 5)
    patched(fast)
    assert softprompt.explain(fast).route == "packed"
    for side in ("left", "right"):
        batch = make_batch(side=side)
        assert_close(fast(**batch).loss.detach(), stock(**batch).loss.detach(), 1e-6, side)
    assert fast.get_base_model().model.rope_deltas.tolist() == [[5], [5]]
    for count in (3, 1, 2):
        expected = tokens(patched(copy.deepcopy(stock)), rows(count))
        assert torch.equal(tokens(fast, rows(count)), expected)
        assert fast.get_base_model().model.rope_deltas.tolist() == [[5], [5]]
    row = row_of(BATCH, 1)
    assert torch.equal(tokens(fast, row), tokens(stock, row, use_cache=False))


def test_a_call_that_peft_serves_does_not_compute_with_them():
    stock = reader("qwen2_5_vl")
    fast = softprompt.patch(copy.deepcopy(stock))
    leave(fast, 0)
    batch = make_batch(side="left")
    leaving = copy.deepcopy(stock)
    leave(leaving, 0)
    with pytest.raises(RuntimeError, match="size of tensor"):  # what PEFT does with them
        leaving(**batch)
    with pytest.warns(UserWarning, match="output_hidden_states was asked for"):
        got = fast(**batch, output_hidden_states=True).loss
    assert_close(got.detach(), stock(**batch).loss.detach(), 1e-9, "loss")
