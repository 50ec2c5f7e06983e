"""`generate` of a patched model: PEFT's tokens, with the prompt computed once."""

import pytest
import torch
from generating import (
    BATCH,
    NEW,
    PEFTS_CACHE,
    counted_tokens,
    patched,
    random_ids,
    row_of,
    speaker,
    tokens,
    two_adapters,
)
from marks import slow_unless
from parity import make_batch, prompt_of
from tiny_models import PACKED, pair, with_prompt
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessor,
    StoppingCriteriaList,
)
from transformers.generation import MaxLengthCriteria
from transformers.generation.streamers import BaseStreamer

from softprompt.engine import plan_for
from softprompt.engine.states import prompt_states
from softprompt.generation.prefill import filled_cache, prefill_for
from softprompt.tiny import model_path

METHODS = {
    "greedy": {"do_sample": False},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "samples": {"do_sample": True, "num_return_sequences": 2, "top_k": 0},
    "sampled beams": {"do_sample": True, "num_beams": 2},
    "penalties": {"repetition_penalty": 1.7, "no_repeat_ngram_size": 2},
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    "name", slow_unless(["bloom", "gemma2"], ["bloom", "llama", "gpt2", "opt", "qwen2", "gemma2"])
)
def test_padded_positions_give_pefts_tokens(name, side, method):
    stock, fast = pair(speaker(name))
    patched(fast)
    batch = make_batch(side=side, labels=None)
    expected = tokens(stock, batch, **METHODS[method])
    assert len(expected[:, -NEW:].unique()) > 2
    assert torch.equal(tokens(fast, batch, **METHODS[method]), expected)


@pytest.mark.parametrize("name", [name for name in PACKED if name not in ("bloom", "llama", "gpt2", "opt")])
def test_other_architectures_give_pefts_tokens(name):
    stock, fast = pair(speaker(name))
    assert torch.equal(tokens(patched(fast)), tokens(stock))


@pytest.mark.parametrize("name", [*PACKED])
def test_compact_positions_give_the_tokens_of_each_row_alone(name):
    stock, fast = pair(speaker(name))
    patched(fast, positions="compact")
    for side in ("left", "right"):
        batch = make_batch(side=side, labels=None)
        got = tokens(fast, batch)
        assert torch.equal(got[:, :-NEW], batch["input_ids"])
        for row in range(3):
            alone = tokens(stock, row_of(batch, row))
            assert torch.equal(got[row, -NEW:], alone[0, -NEW:])


def test_compact_positions_leave_out_holes_in_a_text():
    stock, fast = pair(speaker("mistral-window"))
    batch = make_batch(side="left", labels=None, holes=True)
    got = tokens(patched(fast, positions="compact"), batch)
    for row in range(3):
        assert torch.equal(got[row, -NEW:], tokens(stock, row_of(batch, row))[0, -NEW:])


def test_logits_are_pefts_in_every_step():
    stock, fast = pair(speaker("llama"))
    patched(fast)
    options = {"return_dict_in_generate": True, "output_logits": True}
    expected, got = tokens(stock, **options), tokens(fast, **options)
    for step_of_peft, step in zip(expected.logits, got.logits, strict=True):
        torch.testing.assert_close(step, step_of_peft, rtol=1e-6, atol=1e-6)


# ------------------------------------------------------------------------------------------- what it computes
LONG = {"llama": {"max_position_embeddings": 256}}


@pytest.mark.parametrize("name", ["bloom", "llama"])
@pytest.mark.parametrize("positions", ["padded", "compact"])
def test_prefill_computes_the_prompt_once_and_no_pads(name, positions):
    lengths = tuple(1 + row % 5 for row in range(32))
    batch = make_batch(lengths, side="left", labels=None)
    fast = patched(speaker(name, num_virtual_tokens=100, **LONG.get(name, {})), positions=positions)
    tokens(fast, BATCH, max_new_tokens=1)
    prompt = prompt_of(fast)
    with torch.no_grad():
        prompt.add_(1.0)
    with counted_tokens(fast) as counts:
        tokens(fast, batch, max_new_tokens=1)
    assert sum(counts) == 100 + sum(lengths)
    with counted_tokens(fast) as counts:
        tokens(fast, batch, max_new_tokens=1)
    assert sum(counts) == sum(lengths)


def test_beams_do_not_multiply_the_prefill():
    fast = patched(speaker("llama"))
    tokens(fast)
    with counted_tokens(fast) as counts:
        tokens(fast, max_new_tokens=1, num_beams=4)
    assert counts == [7 + 3 + 5 - 3, 3 * 4]


def test_one_prefill_serves_models_whose_attention_is_their_own():
    fast = patched(speaker("gptj"))
    base = fast.get_base_model()
    if prefill_for(base, plan_for(base)).way == "packed":
        pytest.skip("this transformers lets the packed row reach its attention")
    tokens(fast)
    with counted_tokens(fast) as counts:
        tokens(fast, max_new_tokens=1)
    assert counts == [BATCH["input_ids"].numel()]


def test_all_rows_share_the_memory_of_the_prompt_until_they_grow():
    base = speaker("qwen2-window", 12).get_base_model()
    states = prompt_states(base, torch.randn(12, 48, dtype=torch.float64))
    cache = filled_cache(base, states, 32)
    for layer, key in zip(cache.layers, states.keys, strict=True):
        assert layer.keys.shape[0] == 32
        assert layer.keys.untyped_storage().data_ptr() == key.untyped_storage().data_ptr()


# -------------------------------------------------------------------------------------- arguments of generate
@PEFTS_CACHE
def test_max_length_counts_the_ids_alone():
    stock, fast = pair(speaker("llama"))
    config = GenerationConfig(max_length=12, pad_token_id=0)
    for options in ({"max_length": 11}, {"generation_config": config}, {}):
        expected = stock.generate(**BATCH, **options)
        assert torch.equal(patched(fast).generate(**BATCH, **options), expected)


def test_processors_and_criteria_see_the_ids_of_the_user():
    seen = []

    class Look(LogitsProcessor):
        def __call__(self, input_ids, scores):
            seen.append(input_ids.clone())
            return scores

    fast = patched(speaker("llama"))
    criteria = StoppingCriteriaList([MaxLengthCriteria(10)])
    out = fast.generate(**BATCH, max_new_tokens=5, logits_processor=[Look()], stopping_criteria=criteria)
    assert out.shape[1] == 10
    assert [ids.shape[1] for ids in seen] == [8, 9]
    assert torch.equal(seen[0], BATCH["input_ids"])


def test_a_streamer_gets_what_it_gets_from_peft():
    class Streamer(BaseStreamer):
        def __init__(self):
            self.got = []

        def put(self, value):
            self.got.append(value.tolist())

        def end(self):
            self.got.append("end")

    stock, fast = pair(speaker("llama"))
    expected, got = Streamer(), Streamer()
    row = row_of(BATCH, 0)
    tokens(stock, row, streamer=expected)
    tokens(patched(fast), row, streamer=got)
    assert got.got == expected.got


def test_an_end_token_stops_each_row_as_in_peft():
    stock, fast = pair(speaker("llama"))
    free = tokens(stock)
    end = {"eos_token_id": int(free[0, -5])}
    assert torch.equal(tokens(patched(fast), **end), tokens(stock, **end))
    assert (tokens(fast, **end) == 0).any()


@PEFTS_CACHE
def test_positional_ids_a_missing_mask_and_a_missing_text_are_as_in_peft():
    stock, fast = pair(speaker("llama"))
    patched(fast)
    ids = BATCH["input_ids"].masked_fill(BATCH["attention_mask"] == 0, 0)  # the pad token gives the mask
    expected = stock.generate(input_ids=ids, max_new_tokens=NEW)
    assert torch.equal(fast.generate(ids, max_new_tokens=NEW), expected)
    assert not torch.equal(
        expected, fast.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW)
    )
    assert torch.equal(fast.generate(max_new_tokens=NEW), stock.generate(max_new_tokens=NEW))


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.int32])
def test_masks_and_ids_of_any_dtype_are_as_in_peft(dtype):
    stock, fast = pair(speaker("llama"))
    batch = {"input_ids": BATCH["input_ids"].int(), "attention_mask": BATCH["attention_mask"].to(dtype)}
    assert torch.equal(tokens(patched(fast), batch), tokens(stock))


def test_stop_strings_end_a_row_as_in_peft():
    base = AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float64)
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    stock, fast = pair(with_prompt(base))
    batch = tokenizer(["the app crashed", "lovely"], padding=True, padding_side="left", return_tensors="pt")
    batch = {name: batch[name] for name in ("input_ids", "attention_mask")}
    free = tokens(stock, batch)
    word = tokenizer.decode(free[0, -NEW + 2])
    options = {"stop_strings": [word], "tokenizer": tokenizer}
    expected = tokens(stock, batch, **options)
    assert not torch.equal(expected, free)
    assert torch.equal(tokens(patched(fast), batch, **options), expected)


def test_positions_of_the_user_are_ignored_with_pefts_warning():
    stock, fast = pair(speaker("llama"))
    patched(fast)
    position_ids = torch.zeros_like(BATCH["input_ids"])
    with pytest.warns(UserWarning, match="Ignoring position ids"):
        got = tokens(fast, position_ids=position_ids)
    assert torch.equal(got, tokens(stock))


def test_a_text_of_one_token_and_a_row_without_tokens_are_as_in_peft():
    stock, fast = pair(speaker("llama"))
    patched(fast)
    one = {"input_ids": random_ids(2, 1), "attention_mask": torch.ones(2, 1, dtype=torch.long)}
    assert torch.equal(tokens(fast, one), tokens(stock, one))
    empty = make_batch((4, 0, 2), side="left", labels=None)
    assert torch.equal(tokens(fast, empty), tokens(stock, empty))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes_take_the_packed_prefill(dtype):
    for name in ("llama", "bloom", "opt", "gemma2"):
        base = speaker(name, dtype=dtype).get_base_model()
        assert prefill_for(base, plan_for(base)).way == "packed"


def test_the_chosen_back_end_serves_the_prefill_too():
    stock, fast = pair(speaker("llama", dtype=torch.float32))
    assert torch.equal(tokens(patched(fast, backend="reference")), tokens(stock))


@pytest.mark.parametrize("seed", range(8))
def test_batches_of_any_shape_are_as_in_peft_and_as_each_row_alone(seed):
    generator = torch.Generator().manual_seed(seed)
    lengths = (torch.randint(0, 9, (4,), generator=generator) + (seed % 2)).tolist()
    side = ("left", "right")[seed % 3 == 0]
    name = ("llama", "opt", "qwen2-window", "bloom")[seed % 4]
    width = max(lengths) + seed % 3
    batch = make_batch(lengths, side=side, labels=None, holes=seed > 3, width=width, seed=seed)
    stock, fast = pair(speaker(name, num_virtual_tokens=1 + seed % 5))
    assert torch.equal(tokens(patched(fast), batch), tokens(stock, batch))
    if min(lengths) > 0:
        got = tokens(patched(fast, positions="compact"), batch)
        for row in range(4):
            assert torch.equal(got[row, -NEW:], tokens(stock, row_of(batch, row))[0, -NEW:])


# -------------------------------------------------------------------------------------- rows of many adapters
@pytest.mark.parametrize("positions", ["padded", "compact"])
@pytest.mark.parametrize("name", ["bloom", "llama", "qwen2-window", "gptj"])
@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 2, "num_return_sequences": 2}], ids=["greedy", "beams"]
)
def test_adapter_names_give_each_row_its_prompt(name, positions, options):
    fast = patched(two_adapters(name), positions=positions)
    names = ["long", "default", "long"]
    mixed = tokens(fast, adapter_names=names, **options)
    expected = {}
    for adapter in ("default", "long"):
        fast.set_adapter(adapter)
        expected[adapter] = tokens(fast, **options)
    count = mixed.shape[0] // 3
    for row, adapter in enumerate(names):
        rows = slice(row * count, (row + 1) * count)
        assert torch.equal(mixed[rows], expected[adapter][rows])
    assert not torch.equal(expected["default"], expected["long"])


def test_wrong_adapter_names_are_an_error():
    fast = patched(two_adapters("llama"))
    with pytest.raises(ValueError, match="one adapter for each of the 3 rows"):
        tokens(fast, adapter_names=["default"])
    with pytest.raises(ValueError, match="unknown adapters nobody"):
        tokens(fast, adapter_names=["default", "nobody", "default"])
    with fast.disable_adapter(), pytest.raises(ValueError, match="disable_adapter"):
        tokens(fast, adapter_names=["default"] * 3)
