"""Statements 17 to 19 of the contract: generate, and the model without its adapter."""

import functools

import pytest
import torch
from generating import BATCH, NEW, random_ids, row_of, speaker, tokens
from parity import make_batch, outcome
from tiny_models import pair
from transformers import LogitsProcessor

import softprompt
from softprompt.generation.call import CHUNKS_BEHIND_A_CACHE
from softprompt.generation.stock import PEFT_KNOWS_CACHE

# Positions that count pads, positions from the mask, and none (ALiBi).
MODELS = ["llama", "opt", "bloom"]
METHODS = {
    "greedy": {},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "samples": {"do_sample": True, "num_return_sequences": 2},
    "without a cache": {"use_cache": False},
}


@functools.cache
def built(name):
    return speaker(name)


def models(name="llama", on_unsupported="error"):
    stock, fast = pair(built(name))
    return stock, softprompt.patch(fast, on_unsupported=on_unsupported)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", MODELS)
def test_17_the_tokens_are_those_of_peft(name, side, method):
    stock, fast = models(name, "fallback")
    batch = make_batch(side=side, labels=None)
    expected, got = (tokens(model, batch, **METHODS[method]) for model in (stock, fast))
    assert torch.equal(got, expected)
    assert got.shape[1] == batch["input_ids"].shape[1] + NEW  # no virtual tokens
    assert len(got[:, -NEW:].unique()) > 2


def test_17_max_length_counts_the_ids():
    stock, fast = models()
    lengths = {"max_new_tokens": None, "max_length": 12}
    assert torch.equal(tokens(fast, **lengths), tokens(stock, **lengths))
    assert tokens(fast, **lengths).shape[1] == 12


class Seen(LogitsProcessor):
    """Keeps the ids that it was given."""

    def __init__(self):
        self.ids = []

    def __call__(self, input_ids, scores):
        self.ids.append(input_ids.clone())
        return scores


def test_17_processors_see_the_ids():
    seen = []
    for model in models():
        processor = Seen()
        tokens(model, logits_processor=[processor])
        seen.append(processor.ids)
    assert torch.equal(seen[1][0], BATCH["input_ids"])
    assert len(seen[1]) == NEW
    assert all(torch.equal(*both) for both in zip(*seen, strict=True))


class Fails(LogitsProcessor):
    """Raises in the middle of a generation."""

    def __call__(self, input_ids, scores):
        raise ArithmeticError


def test_17_nothing_is_left_on_the_base_model():
    stock, fast = models()
    base = fast.get_base_model()
    before = {name: id(value) for name, value in base.__dict__.items()}
    implementation = base.config._attn_implementation
    for options in ({}, {"logits_processor": [Fails()]}):
        expected, got = outcome(tokens, stock, **options), outcome(tokens, fast, **options)
        assert got.error == expected.error
        assert {name: id(value) for name, value in base.__dict__.items()} == before
        assert base.config._attn_implementation == implementation
    assert torch.equal(tokens(fast), tokens(stock))


# What PEFT fails at or gets wrong: name -> (batch, options)
RIGHT_OR_AN_ERROR = {
    "static cache": (BATCH, {"cache_implementation": "static"}),
    "chunks": (BATCH, {"prefill_chunk_size": 3}),
    "prompt lookup": (row_of(BATCH, 0), {"prompt_lookup_num_tokens": 3}),
}


@pytest.mark.parametrize("batch, options", RIGHT_OR_AN_ERROR.values(), ids=RIGHT_OR_AN_ERROR)
@pytest.mark.parametrize("name", MODELS)
def test_18_what_peft_gets_wrong_is_as_without_a_cache(name, batch, options):
    stock, fast = models(name)
    expected = tokens(stock, batch, use_cache=False)
    theirs = outcome(tokens, stock, batch, **options)
    if "prefill_chunk_size" in options and not CHUNKS_BEHIND_A_CACHE:
        with pytest.raises(ValueError, match=r"needs transformers 5\.21"):
            tokens(fast, batch, **options)
        return
    assert torch.equal(tokens(fast, batch, **options), expected)
    if options.get("cache_implementation") == "static" and PEFT_KNOWS_CACHE:
        assert theirs.error is not None


@pytest.mark.parametrize("name", MODELS)
def test_18_an_assistant_gives_the_tokens_of_the_model_alone(name):
    stock, fast = models(name)
    row = row_of(BATCH, 0)
    got = tokens(fast, row, assistant_model=built(name).get_base_model())
    assert torch.equal(got, tokens(stock, row, use_cache=False))


@pytest.mark.parametrize("name", MODELS)
def test_18_embeddings_of_a_text_give_the_tokens_of_its_ids(name):
    stock, fast = models(name)
    embeds = fast.get_input_embeddings()(BATCH["input_ids"])
    batch = {"inputs_embeds": embeds, "attention_mask": BATCH["attention_mask"]}
    assert outcome(tokens, stock, batch).error is not None
    assert torch.equal(tokens(fast, batch), tokens(stock, use_cache=False)[:, -NEW:])


@pytest.mark.parametrize("name", MODELS)
def test_18_a_conversation_goes_on_from_its_cache(name):
    stock, fast = models(name)
    first = tokens(fast, return_dict_in_generate=True)
    ids = torch.cat([first.sequences, random_ids(3, 4, seed=4)], 1)
    mask = torch.cat([BATCH["attention_mask"], torch.ones(3, NEW + 4, dtype=torch.int64)], 1)
    turn = {"input_ids": ids, "attention_mask": mask}
    expected = tokens(stock, turn, use_cache=False)
    assert torch.equal(tokens(fast, turn, past_key_values=first.past_key_values), expected)


def test_19_without_its_adapter_it_is_the_bare_model():
    stock, fast = models()
    batch = make_batch(side="left", labels="everywhere")
    bare = stock.get_base_model()(**batch)
    expected = tokens(stock.get_base_model())
    for model in (stock, fast):
        with model.disable_adapter():
            output, generated = model(**batch), tokens(model)
        assert torch.equal(output.logits, bare.logits)
        assert torch.equal(output.loss, bare.loss)
        assert not output.loss.requires_grad
        assert torch.equal(generated, expected)
    assert torch.equal(tokens(fast), tokens(stock))
    assert not torch.equal(tokens(fast), expected)
