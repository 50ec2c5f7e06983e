"""Calls of `generate` where PEFT's own fails or gives wrong tokens: right here, or one clear error."""

import copy

import pytest
import torch
from generating import (
    BATCH,
    NEW,
    counted_tokens,
    patched,
    random_ids,
    reason_given,
    row_of,
    speaker,
    tokens,
    two_adapters,
)
from marks import slow_unless
from parity import make_batch
from tiny_models import build, pair, with_prompt
from transformers import DynamicCache, GenerationConfig, StaticCache

import softprompt
from softprompt.generation import call

ROW = row_of(BATCH, 0)
STATIC = ["bloom", "llama", "gpt2", "opt", "qwen2", "gemma2", "mpt", "falcon", "qwen2-window", "gptj"]


def conversation(model, batch=BATCH, **kwargs):
    """The ids and the cache after one turn."""
    out = tokens(model, batch, return_dict_in_generate=True, **kwargs)
    return out.sequences, out.past_key_values


def longer(batch, sequences, new_ids):
    """The batch of the next turn: all ids so far, then new ones."""
    ids = torch.cat([sequences, new_ids], 1)
    later = torch.ones(ids.shape[0], ids.shape[1] - batch["attention_mask"].shape[1], dtype=torch.long)
    return {"input_ids": ids, "attention_mask": torch.cat([batch["attention_mask"], later], 1)}


# ----------------------------------------------------------------------------------------------- static cache
@pytest.mark.parametrize("name", STATIC)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_static_cache_gives_the_tokens_of_a_growing_one(name, side):
    fast = patched(speaker(name))
    batch = make_batch(side=side, labels=None)
    expected = tokens(fast, batch)
    assert torch.equal(tokens(fast, batch, cache_implementation="static"), expected)
    config = GenerationConfig(cache_implementation="static", max_new_tokens=NEW, pad_token_id=0)
    assert torch.equal(fast.generate(**batch, generation_config=config), expected)


def test_a_static_cache_holds_beams_lengths_and_adapters():
    fast = patched(two_adapters("llama"))
    for options in (
        {"num_beams": 3, "num_return_sequences": 2},
        {"max_new_tokens": None, "max_length": 13},
        {"max_new_tokens": None},
        {"adapter_names": ["long", "default", "long"]},
    ):
        assert torch.equal(tokens(fast, cache_implementation="static", **options), tokens(fast, **options))


def test_a_static_cache_in_compact_positions_is_right():
    fast = patched(speaker("gemma2"), positions="compact")
    assert torch.equal(tokens(fast, cache_implementation="static"), tokens(fast))


@pytest.mark.parametrize("name", ["gpt_neo", "falcon-alibi"])
def test_models_that_are_wrong_with_a_static_cache_say_so(name):
    with pytest.raises(ValueError, match="wrong tokens with a static cache"):
        tokens(patched(speaker(name)), cache_implementation="static")


def test_an_empty_cache_of_the_user_is_filled_with_the_prompt():
    fast = patched(speaker("qwen2-window"))
    config = fast.get_base_model().config
    expected = tokens(fast)
    for cache in (DynamicCache(config=config), DynamicCache(), StaticCache(config=config, max_cache_len=32)):
        assert torch.equal(tokens(fast, past_key_values=cache), expected)
        assert int(cache.get_seq_length()) == 4 + 8 + NEW - 1


def test_a_static_cache_without_room_is_an_error():
    fast = patched(speaker("llama"))
    config = fast.get_base_model().config
    tokens(fast, past_key_values=StaticCache(config=config, max_cache_len=19))
    with pytest.raises(ValueError, match="room for 18 tokens; prompt, text and continuation take 19"):
        tokens(fast, past_key_values=StaticCache(config=config, max_cache_len=18))


@pytest.mark.parametrize("implementation", ["paged", "offloaded_static"])
def test_caches_that_cannot_hold_a_prompt_are_an_error(implementation):
    with pytest.raises(ValueError, match="cannot hold a prompt"):
        tokens(patched(speaker("llama")), cache_implementation=implementation)


def test_two_kinds_of_cache_at_once_are_an_error():
    with pytest.raises(ValueError, match="not both"):
        tokens(patched(speaker("llama")), cache_implementation="static", past_key_values=DynamicCache())


# -------------------------------------------------------------------------------------- drafted continuations
@pytest.mark.parametrize(
    "name, positions",
    [(name, "padded") for name in ("bloom", "llama", "gpt2", "opt", "qwen2-window", "gemma2", "gptj")]
    + [(name, "compact") for name in ("bloom", "llama", "qwen2-window")],
)
def test_assisted_decoding_gives_the_tokens_of_greedy_decoding(name, positions):
    if name == "qwen2-window" and not call.CHUNKS_BEHIND_A_CACHE:
        pytest.skip("transformers before 5.21: a RuntimeError")
    fast = patched(speaker(name), positions=positions)
    one = {name: value[1:2] for name, value in BATCH.items()}  # with pads
    for row in (ROW, one):
        expected = tokens(fast, row, max_new_tokens=12)
        for assistant in (build("llama"), fast.get_base_model()):
            assistant.generation_config.eos_token_id = None
            got = tokens(fast, row, max_new_tokens=12, assistant_model=assistant)
            assert torch.equal(got, expected)
        assert torch.equal(tokens(fast, row, max_new_tokens=12, prompt_lookup_num_tokens=3), expected)


def test_an_assistant_that_knows_the_text_saves_steps():
    base = build("llama")
    base.generation_config.eos_token_id = None
    fast = patched(with_prompt(base))
    with torch.no_grad():  # a prompt that hardly matters, so that the bare model drafts well
        fast.prompt_encoder["default"].embedding.weight.mul_(1e-3)
    row = {"input_ids": random_ids(1, 12), "attention_mask": torch.ones(1, 12, dtype=torch.long)}
    with counted_tokens(fast) as alone:
        expected = tokens(fast, row, max_new_tokens=24)
    assistant = copy.deepcopy(base)
    with counted_tokens(fast) as assisted:
        assert torch.equal(tokens(fast, row, max_new_tokens=24, assistant_model=assistant), expected)
    assert len(assisted) < len(alone)


def test_prompt_lookup_on_a_repeating_text_saves_steps():
    fast = patched(speaker("llama"))
    row = {"input_ids": random_ids(1, 3).repeat(1, 6), "attention_mask": torch.ones(1, 18, dtype=torch.long)}
    tokens(fast, row)
    with counted_tokens(fast) as counts:
        tokens(fast, row, prompt_lookup_num_tokens=3)
    assert max(counts[1:]) == 4


@pytest.mark.parametrize("option", ["assistant_early_exit", "use_mtp"])
def test_drafts_of_the_models_own_layers_are_an_error(option):
    with pytest.raises(ValueError, match=f"{option} drafts with layers of this model"):
        tokens(patched(speaker("llama")), ROW, **{option: 1})


def test_a_model_with_a_prompt_as_the_assistant_is_an_error():
    fast = patched(speaker("llama"))
    with pytest.raises(ValueError, match="cannot be the assistant"):
        build("llama").generate(**ROW, max_new_tokens=NEW, assistant_model=fast)


# -------------------------------------------------------------------------------------------- chunked prefill
CHUNKED = pytest.mark.skipif(not call.CHUNKS_BEHIND_A_CACHE, reason="needs transformers 5.21")


@CHUNKED
@pytest.mark.parametrize(
    "name",
    slow_unless(["bloom", "qwen2-window"], ["bloom", "llama", "gpt2", "opt", "qwen2-window", "gemma2"]),
)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_a_prefill_in_chunks_gives_the_same_tokens(name, side, chunk):
    stock, fast = pair(speaker(name))
    batch = make_batch(side=side, labels=None)
    assert torch.equal(tokens(patched(fast), batch, prefill_chunk_size=chunk), tokens(stock, batch))


@CHUNKED
def test_a_prefill_in_chunks_in_compact_positions_is_right_or_an_error():
    fast = patched(speaker("llama"), positions="compact")
    assert torch.equal(tokens(fast, prefill_chunk_size=3), tokens(fast))
    fast = patched(speaker("qwen2-window"), positions="compact")
    assert torch.equal(tokens(fast, ROW, prefill_chunk_size=3), tokens(fast, ROW))
    with pytest.raises(softprompt.UnsupportedModelError, match="leave out prefill_chunk_size"):
        tokens(fast, prefill_chunk_size=3)


@CHUNKED
def test_a_prefill_in_chunks_takes_beams_and_a_static_cache():
    stock, fast = pair(speaker("llama"))
    patched(fast)
    assert torch.equal(tokens(fast, prefill_chunk_size=3, num_beams=2), tokens(stock, num_beams=2))
    assert torch.equal(tokens(fast, prefill_chunk_size=3, cache_implementation="static"), tokens(stock))


def test_a_transformers_that_cuts_without_regard_to_the_cache_is_refused(monkeypatch):
    monkeypatch.setattr(call, "CHUNKS_BEHIND_A_CACHE", False)
    with pytest.raises(ValueError, match=r"needs transformers 5\.21"):
        tokens(patched(speaker("llama")), prefill_chunk_size=3)


def test_a_cache_has_one_name(monkeypatch):
    monkeypatch.setattr(call, "NAMES", ("cache", "past_key_values"))
    cache = DynamicCache()
    with pytest.raises(ValueError, match="the cache was given twice"):
        call._cache_of(dict.fromkeys(("cache", "past_key_values"), cache))


# ---------------------------------------------------------------------------------------------- conversations
@pytest.mark.parametrize(
    "name",
    slow_unless(
        ["bloom", "llama", "gemma2"],
        ["bloom", "llama", "gpt2", "opt", "qwen2", "gemma2", "qwen2-window", "mpt"],
    ),
)
@pytest.mark.parametrize("positions, side", [("padded", "left"), ("padded", "right"), ("compact", "right")])
def test_a_conversation_goes_on_from_its_cache(name, positions, side):
    fast = patched(speaker(name), positions=positions)
    batch = make_batch(side=side, labels=None)
    sequences, cache = conversation(fast, batch)
    turn = longer(batch, sequences, random_ids(3, 5, seed=4))
    expected = tokens(fast, turn)
    with counted_tokens(fast) as counts:
        sequences, cache = conversation(fast, turn, past_key_values=cache)
    assert torch.equal(sequences, expected)
    assert counts[0] == 3 * (5 + 1)
    turn = longer(turn, sequences, random_ids(3, 2, seed=5))
    assert torch.equal(tokens(fast, turn, past_key_values=cache), tokens(fast, turn))


def test_a_conversation_takes_the_new_ids_alone_with_the_whole_mask():
    fast = patched(speaker("llama"))
    sequences, cache = conversation(fast)
    turn = longer(BATCH, sequences, random_ids(3, 5, seed=4))
    new = {"input_ids": turn["input_ids"][:, -6:], "attention_mask": turn["attention_mask"]}
    got = tokens(fast, new, past_key_values=cache)
    assert torch.equal(got[:, -NEW:], tokens(fast, turn)[:, -NEW:])


def test_a_conversation_of_sampled_sequences_of_two_adapters_in_a_static_cache_goes_on():
    fast = patched(two_adapters("llama"))
    options = {"do_sample": True, "num_return_sequences": 2, "adapter_names": ["long", "default", "long"]}
    cache = StaticCache(config=fast.get_base_model().config, max_cache_len=64)
    sequences, cache = conversation(fast, past_key_values=cache, **options)
    batch = {name: value.repeat_interleave(2, 0) for name, value in BATCH.items()}
    turn = longer(batch, sequences, random_ids(6, 3))
    names = {"adapter_names": ["long", "long", "default", "default", "long", "long"]}
    assert torch.equal(tokens(fast, turn, past_key_values=cache, **names), tokens(fast, turn, **names))


def test_a_conversation_that_drafts_goes_on():
    fast = patched(speaker("qwen2-window"))
    sequences, cache = conversation(fast, ROW, prompt_lookup_num_tokens=3)
    turn = longer(ROW, sequences, random_ids(1, 5))
    got = tokens(fast, turn, past_key_values=cache, prompt_lookup_num_tokens=3)
    assert torch.equal(got, tokens(fast, turn))


def test_pads_inside_a_conversation_are_right_or_an_error():
    fast = patched(speaker("llama"))
    sequences, cache = conversation(fast)
    turn = longer(BATCH, sequences, random_ids(3, 5, seed=4))
    turn["attention_mask"][1, -5:-3] = 0
    assert torch.equal(tokens(fast, turn, past_key_values=cache), tokens(fast, turn))
    softprompt.patch(fast, positions="compact")
    sequences, cache = conversation(fast)
    with pytest.raises(ValueError, match="no pads inside a conversation"):
        tokens(fast, turn, past_key_values=cache)


def used(model, **options):
    sequences, cache = conversation(model, **options)
    return cache, longer(BATCH, sequences[:3], random_ids(3, 5))


def test_caches_that_do_not_fit_the_call_are_an_error():
    fast = patched(two_adapters("llama"))
    cache, turn = used(fast)
    with pytest.raises(ValueError, match="holds the prompts of adapters default; the call asks for long"):
        tokens(fast, turn, past_key_values=cache, adapter_names=["long"] * 3)
    with pytest.raises(ValueError, match="holds 3 rows, the call has 1 rows"):
        tokens(fast, {name: value[:1] for name, value in turn.items()}, past_key_values=cache)
    with pytest.raises(ValueError, match="with 2 sequences each"):
        tokens(fast, turn, past_key_values=cache, num_beams=2)
    with pytest.raises(ValueError, match="holds 15 tokens of the conversation"):
        tokens(fast, BATCH, past_key_values=cache)
    with pytest.raises(ValueError, match=r"got \[3, 18\] for input_ids of \[3, 21\]"):
        tokens(fast, turn | {"attention_mask": turn["attention_mask"][:, :18]}, past_key_values=cache)
    mask = torch.ones_like(turn["attention_mask"])
    with pytest.raises(ValueError, match="differs from that of the call that began"):
        tokens(fast, turn | {"attention_mask": mask}, past_key_values=cache)
    with pytest.raises(ValueError, match=r"alone, without prefill_chunk_size|needs transformers 5\.21"):
        tokens(fast, turn, past_key_values=cache, prefill_chunk_size=4)
    with torch.no_grad():
        fast.prompt_encoder["default"].embedding.weight.add_(1.0)
    with pytest.raises(ValueError, match="as they were before they changed"):
        tokens(fast, turn, past_key_values=cache)


def test_caches_of_beams_of_other_positions_and_of_other_models_are_an_error():
    fast = patched(speaker("llama"))
    cache, turn = used(fast, num_beams=2)
    with pytest.raises(ValueError, match="left by beam search"):
        tokens(fast, turn, past_key_values=cache)
    cache, turn = used(fast)
    softprompt.patch(fast, positions="compact")
    with pytest.raises(ValueError, match="another setting"):
        tokens(fast, turn, past_key_values=cache)
    foreign = fast.get_base_model()(**BATCH, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="not begun by this model's generate"):
        tokens(fast, turn, past_key_values=foreign)
    with pytest.raises(ValueError, match="must be a transformers Cache, got tuple"):
        tokens(fast, turn, past_key_values=((1, 2),))


# ---------------------------------------------------------------------------------------------- inputs_embeds
@pytest.mark.parametrize("name", ["bloom", "llama", "gpt2", "opt", "qwen2-window", "gemma2", "gptj"])
@pytest.mark.parametrize("positions", ["padded", "compact"])
def test_embeddings_of_a_text_give_the_tokens_of_its_ids(name, positions):
    fast = patched(speaker(name), positions=positions)
    embeds = fast.get_input_embeddings()(BATCH["input_ids"])
    batch = {"inputs_embeds": embeds, "attention_mask": BATCH["attention_mask"]}
    for options in ({}, {"num_beams": 2}, {"cache_implementation": "static"}):
        expected = tokens(fast, **options)
        assert torch.equal(tokens(fast, batch, **options), expected[:, -NEW:])
        assert torch.equal(tokens(fast, BATCH | batch, **options), expected)


def test_embeddings_do_not_go_with_chunks_or_ids_of_another_shape():
    fast = patched(speaker("llama"))
    batch = {"inputs_embeds": fast.get_input_embeddings()(BATCH["input_ids"])}
    with pytest.raises(ValueError, match="cannot be used with inputs_embeds"):
        tokens(fast, batch, prefill_chunk_size=2)
    with pytest.raises(ValueError, match="input_ids beside inputs_embeds"):
        tokens(fast, batch | {"input_ids": random_ids(3, 2)})


# ------------------------------------------------------------------------------------ what goes to PEFT's own
@pytest.mark.parametrize(
    "options, reason",
    [
        ({"use_cache": False}, "use_cache=False was asked for"),
        (
            {"output_hidden_states": True, "return_dict_in_generate": True},
            "output_hidden_states was asked for",
        ),
    ],
)
def test_calls_that_are_not_served_are_pefts_with_one_warning(options, reason):
    stock, fast = pair(speaker("llama"))
    softprompt.patch(fast)
    message, got = reason_given(fast, **options)
    assert reason in message
    expected = tokens(stock, **options)
    if not torch.is_tensor(expected):
        got, expected = got.sequences, expected.sequences
    assert torch.equal(got, expected)
    assert any(reason in text for text, _ in softprompt.explain(fast).fallbacks)
    softprompt.patch(fast, on_unsupported="error")
    with pytest.raises(softprompt.UnsupportedModelError, match=reason):
        tokens(fast, **options)


def test_a_model_that_counts_the_places_of_its_row_keeps_pefts_generate():
    stock, fast = pair(speaker("llama"))
    for model in (stock, fast):
        norm = model.get_base_model().model.norm
        norm.register_forward_hook(lambda module, args, out: out / args[0].shape[1])
    softprompt.patch(fast)
    message, got = reason_given(fast)
    assert "no packed variant passed the self-check" in message
    assert torch.equal(got, tokens(stock))


@pytest.mark.parametrize("name", ["mamba", "lfm2"])
def test_stateful_models_keep_pefts_generate(name):
    stock, fast = pair(speaker(name))
    softprompt.patch(fast)
    message, got = reason_given(fast, ROW)
    assert "state" in message
    assert torch.equal(got, tokens(stock, ROW, use_cache=False))
    with pytest.raises(softprompt.UnsupportedModelError, match="adapter_names has no stock generate"):
        tokens(fast, ROW, adapter_names=["default"])
    with pytest.raises(softprompt.UnsupportedModelError, match="inputs_embeds needs a prompt"):
        fast.generate(inputs_embeds=fast.get_input_embeddings()(ROW["input_ids"]), max_new_tokens=2)
    with pytest.raises(softprompt.UnsupportedModelError, match="assisted decoding needs a prompt"):
        tokens(fast, ROW, prompt_lookup_num_tokens=2)
    softprompt.patch(fast, on_unsupported="error")
    with pytest.raises(softprompt.UnsupportedModelError, match="state"):
        tokens(fast, ROW)


def test_dynamic_rotary_embeddings_past_their_length_keep_pefts_generate():
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    stock, fast = pair(speaker("llama", rope_parameters=rope, max_position_embeddings=24))
    softprompt.patch(fast)
    assert torch.equal(tokens(fast, max_new_tokens=12), tokens(stock, max_new_tokens=12))
    assert softprompt.explain(fast).fallbacks == ()
    message, got = reason_given(fast, max_new_tokens=13)
    assert "rotary embedding changes beyond 24 positions" in message
    assert torch.equal(got, tokens(stock, max_new_tokens=13))


def test_dropout_and_checkpointing_in_training_mode_are_refused():
    fast = softprompt.patch(speaker("gpt2-dropout"))
    fast.train()
    message, _ = reason_given(fast)
    assert "training mode with dropout" in message
    fast = softprompt.patch(speaker("llama"))
    fast.get_base_model().gradient_checkpointing_enable()
    fast.train()
    with pytest.raises(softprompt.UnsupportedModelError, match=r"call model.eval\(\) before generate"):
        tokens(fast)
    fast.eval()
    tokens(fast)


# ------------------------------------------------------------------------------------------------ wrong input
@pytest.mark.parametrize(
    "change, error, match",
    [
        (
            {"input_ids": torch.full((3, 8), 97)},
            IndexError,
            r"input_ids\[0, 0\] = 97 is outside the vocabulary",
        ),
        ({"attention_mask": torch.ones(3, 12)}, ValueError, "without the prompt, got shape"),
        ({"attention_mask": torch.ones(3, 1, 8)}, ValueError, r"attention_mask must be \[B, L\]"),
        ({"attention_mask": [[1]]}, ValueError, "attention_mask must be a tensor, got list"),
        ({"input_ids": torch.zeros(3, 0).long(), "attention_mask": None}, ValueError, "texts are empty"),
        ({"inputs": BATCH["input_ids"]}, ValueError, "given twice"),
        ({"input_ids": random_ids(1, 70), "attention_mask": None}, ValueError, "the model has 64 positions"),
    ],
)
def test_wrong_input_is_a_clear_error(change, error, match):
    with pytest.raises(error, match=match):
        tokens(patched(speaker("gpt2")), BATCH | change)


def test_a_row_without_tokens_in_compact_positions_is_an_error():
    fast = patched(speaker("llama"), positions="compact")
    with pytest.raises(ValueError, match="row 1 has no token"):
        tokens(fast, make_batch((4, 0, 2), side="left", labels=None))


def test_a_continuation_beyond_the_position_table_is_an_error_when_it_gets_there():
    stock, fast = pair(speaker("gpt2"))
    patched(fast)
    row = {"input_ids": random_ids(1, 55), "attention_mask": torch.ones(1, 55, dtype=torch.long)}
    assert torch.equal(tokens(fast, row, max_new_tokens=6), tokens(stock, row, max_new_tokens=6))
    with pytest.raises(ValueError, match=r"has reached 6 tokens, but .* positions for 5"):
        tokens(fast, row, max_new_tokens=7)
    end = {"eos_token_id": int(tokens(fast, row, max_new_tokens=6)[0, -1]), "max_length": 1000}
    assert tokens(fast, row, max_new_tokens=None, **end).shape[1] <= 61
