"""The states of prompts and texts, and caches that begin with them."""

import pytest
import torch
from generating import speaker
from tiny_models import build
from transformers import DynamicCache

from softprompt.engine import plan_for
from softprompt.engine.states import LayerStates, TextStates, joined, prompt_states
from softprompt.generation.prefill import Prefill, describe, fill, filled_cache, prefill_for


def random_states(layers, tokens, heads=2):
    parts = [torch.randn(1, heads, tokens, 8) for _ in range(2 * layers)]
    return LayerStates(tuple(parts[:layers]), tuple(parts[layers:]))


def test_the_states_of_a_prompt_are_those_of_the_models_own_cache():
    base = build("qwen2-window")
    prompt = torch.randn(9, 48, dtype=torch.float64)
    states = prompt_states(base, prompt)
    cache = base(inputs_embeds=prompt[None], past_key_values=DynamicCache(), use_cache=True).past_key_values
    assert states.num_tokens == 9  # also of the layer whose window is 6
    for layer, key, value in zip(cache.layers, states.keys, states.values, strict=True):
        torch.testing.assert_close(key, layer.keys)
        torch.testing.assert_close(value, layer.values)


@pytest.mark.parametrize("name", ["llama", "qwen2-window"])
def test_a_filled_cache_goes_on_like_the_models_own(name):
    base = build(name)
    prompt = torch.randn(9, 48, dtype=torch.float64)
    states = prompt_states(base, prompt)
    own = DynamicCache(config=base.config)
    base(inputs_embeds=prompt[None], past_key_values=own, use_cache=True)
    copied = DynamicCache(config=base.config)
    fill(copied, states, 1)
    ids = torch.tensor([[5, 7]])
    expected = base(input_ids=ids, past_key_values=own, use_cache=True).logits
    for cache in (filled_cache(base, states, 1), copied):
        assert cache.get_seq_length() == 9
        got = base(input_ids=ids, past_key_values=cache, use_cache=True).logits
        torch.testing.assert_close(got, expected)


def test_prompts_are_joined_in_their_order():
    first, second = random_states(2, 3), random_states(2, 5)
    both = joined([first, second])
    assert torch.equal(both.keys[1], torch.cat([first.keys[1], second.keys[1]], 2))
    assert torch.equal(both.values[0], torch.cat([first.values[0], second.values[0]], 2))


def test_a_decoder_with_more_or_fewer_attentions_than_states_is_an_error():
    texts = TextStates(random_states(1, 3))
    part = torch.randn(1, 2, 4, 8)
    with pytest.raises(ValueError, match="attended 0 times, 1 layers keep states"):
        texts.collected()
    texts.join(part, part, part)
    assert texts.collected().num_tokens == 7
    with pytest.raises(ValueError, match="attends more than 1 times"):
        texts.join(part, part, part)


def test_grouped_heads_are_kept_as_the_models_own_cache_keeps_them():
    prompts = random_states(1, 3, heads=4)
    texts = TextStates(prompts)
    key = torch.randn(1, 2, 5, 8)
    _, joined_key, _ = texts.join(torch.randn(1, 4, 5, 8), key, key)
    assert torch.equal(joined_key[:, :, :3], prompts.keys[0][:, ::2])
    kept = texts.collected().keys[0][:, :, 3:]
    assert torch.equal(kept, key.repeat_interleave(2, 1))


def test_the_way_of_a_model_is_found_once_and_described():
    base = speaker("llama").get_base_model()
    plan = plan_for(base)
    assert prefill_for(base, plan) is prefill_for(base, plan)
    assert describe(Prefill(None, "it rains")) == "PEFT's own: it rains"
    assert describe(Prefill("shared", "it rains")).endswith("texts stay padded: it rains")
