"""PEFT's own generate where PEFT does not find the cache, or cannot ask it for its length."""

import functools

import pytest
import torch
from generating import BATCH, NEW, reason_given, row_of, speaker, tokens
from peft import MultitaskPromptTuningConfig, PrefixTuningConfig, get_peft_model
from tiny_models import build, pair, prompt_config

import softprompt
from softprompt.engine.runner import UnsupportedModelError
from softprompt.generation import stock as stock_generate
from softprompt.generation.stock import right_options
from softprompt.tasks.inference import label_texts

ROW = row_of(BATCH, 0)


@pytest.fixture
def renamed(monkeypatch):
    """Makes models whose cache PEFT does not know by its name, as those of transformers 5.24."""
    if not stock_generate.PEFT_KNOWS_CACHE:
        return lambda model: model
    monkeypatch.setattr(stock_generate, "PEFT_KNOWS_CACHE", False)
    monkeypatch.setattr(stock_generate, "CACHE", "kept")

    def rename(model):
        base = model.get_base_model()
        prepare, forward = base.prepare_inputs_for_generation, base.forward

        def inputs_of(*args, **kwargs):
            inputs = prepare(*args, **kwargs)
            return {"kept" if name == "past_key_values" else name: value for name, value in inputs.items()}

        @functools.wraps(forward)
        def own_forward(*args, kept=None, **kwargs):
            if kept is not None:
                kwargs["past_key_values"] = kept
            return forward(*args, **kwargs)

        model.base_model_prepare_inputs_for_generation = inputs_of
        base.forward = own_forward
        return model

    return rename


@pytest.mark.parametrize("name", ["lfm2", "recurrent_gemma", "qwen3_next"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"do_sample": True}], ids=str)
def test_peft_finds_a_cache_that_was_renamed(renamed, name, options):
    stock, fast = pair(speaker(name))
    expected = tokens(stock, ROW, use_cache=False, **options)
    renamed(stock)
    assert not torch.equal(tokens(stock, ROW, use_cache=True, **options), expected)
    renamed(softprompt.patch(fast))
    message, got = reason_given(fast, ROW, **options)
    assert "without a cache" not in message
    assert torch.equal(got, expected)


def test_a_prompt_for_each_task_is_in_the_cache_once(renamed):
    base = speaker("llama").get_base_model()
    config = MultitaskPromptTuningConfig(
        **prompt_config(base).to_dict() | {"peft_type": None, "num_tasks": 3}
    )
    stock, fast = pair(get_peft_model(base, config).double().eval())
    tasks = {"task_ids": torch.tensor([2, 0, 1])}
    expected = tokens(stock, use_cache=False, **tasks)
    renamed(softprompt.patch(fast))
    assert torch.equal(reason_given(fast, **tasks)[1], expected)


def test_a_prefix_is_in_the_cache_that_the_model_gets(renamed):
    base = build("llama", torch.float64)
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    stock, fast = pair(get_peft_model(base, config).double().eval())
    expected = ROW["input_ids"]
    for _ in range(NEW):  # PEFT's forward puts the prefix in front by itself
        expected = torch.cat([expected, stock(input_ids=expected).logits[:, -1:].argmax(-1)], 1)
    renamed(softprompt.patch(fast))
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(reason_given(fast, ROW, **options)[1], expected)


def test_a_prompt_behind_bos_is_in_the_cache_once(renamed):
    fast = softprompt.patch(speaker("llama"), placement="after_bos")
    batch = {**ROW, "input_ids": ROW["input_ids"].clone()}
    batch["input_ids"][:, 0] = fast.get_base_model().config.bos_token_id
    expected = tokens(fast, batch, use_cache=False)
    renamed(fast)
    assert torch.equal(tokens(fast, batch), expected)


# Their cache holds recurrent states alone.
STATES_ALONE = ["mamba", "mamba2"]


@pytest.mark.parametrize("name", STATES_ALONE)
def test_a_cache_of_states_alone_is_left_out(name):
    stock, fast = pair(speaker(name))
    expected = tokens(stock, ROW, use_cache=False)
    assert not torch.equal(tokens(stock, ROW, use_cache=True), expected)
    message, got = reason_given(softprompt.patch(fast), ROW)
    assert "without a cache, of which PEFT cannot ask whether it has the prompt" in message
    assert torch.equal(got, expected)
    assert torch.equal(tokens(fast, ROW, use_cache=True), expected)


@pytest.mark.parametrize("name", ["lfm2", "llama", "gpt2"])
def test_a_cache_that_tells_its_length_is_used(monkeypatch, name):
    model = speaker(name)
    monkeypatch.setattr(stock_generate, "PEFT_KNOWS_CACHE", True)
    assert right_options(model) == {}
    assert right_options(model.get_base_model()) == {}
    monkeypatch.setattr(stock_generate, "PEFT_KNOWS_CACHE", False)
    assert right_options(model) == {"use_cache": False}
    assert right_options(softprompt.patch(model)) == {}


class Writes:
    """An encoder of one task, which gives ids as texts."""

    pad_token_id, stop_token_ids, max_target, max_prompt = 0, [96], 5, 8

    class task:
        positions, padding = "padded", "longest"

    def prompt(self, text):
        return [int(word) for word in text.split()]

    def decode(self, ids):
        return " ".join(map(str, ids))


@pytest.mark.parametrize("name", [*STATES_ALONE, "lfm2", "llama"])
def test_labels_that_plain_peft_writes_are_those_without_a_cache(renamed, name):
    model = speaker(name)
    texts = ["5 9 12", "44 3 71"]
    prompts = torch.tensor([Writes().prompt(text) for text in texts])
    options = {"attention_mask": torch.ones_like(prompts), "max_new_tokens": 5, "use_cache": False}
    options |= {"do_sample": False, "eos_token_id": 96, "pad_token_id": 0}
    expected = [Writes().decode(ids) for ids in model.generate(prompts, **options)[:, 3:].tolist()]
    assert label_texts(renamed(model), Writes(), texts, batch_size=2) == expected


def test_what_peft_does_wrongly_is_refused_where_its_inputs_were_replaced():
    model = softprompt.patch(speaker("llama"))
    own = model.prepare_inputs_for_generation
    model.prepare_inputs_for_generation = lambda *args, **kwargs: own(*args, **kwargs)
    message, _ = reason_given(model, ROW)
    assert "prepare_inputs_for_generation was replaced on the instance" in message
    with pytest.raises(UnsupportedModelError, match="a static cache needs a prompt that is computed"):
        tokens(model, ROW, cache_implementation="static")
