"""Every architecture on its fast route: PEFT's loss, logits at real tokens and prompt gradient."""

import functools

import pytest
import torch
from parity import assert_close, assert_same_step, make_batch, prompt_of, step
from tiny_models import PACKED, PADDED, pair, prompted

import softprompt

BATCHES = {
    "right padding, answers": make_batch(),
    "left padding, answers": make_batch(side="left"),
    "right padding, all tokens": make_batch(labels="everywhere"),
    "left padding, all tokens": make_batch(side="left", labels="everywhere"),
    "left padding, first tokens": make_batch(side="left", labels="first"),
    "right padding, first tokens": make_batch(labels="first"),
    "right padding, pads too": make_batch(labels="pads"),
    "left padding, pads too": make_batch(side="left", labels="pads"),
    "holes": make_batch(side="left", labels="everywhere", holes=True),
    "no pads": make_batch((6, 6), labels="everywhere", width=6),
}
MODELS = [(name, None) for name in (*PACKED, *PADDED)] + [
    (name, "eager") for name in ("gemma2", "gpt2", "bloom", "mistral-window", "opt")
]
IDS = [name if implementation is None else f"{name}-{implementation}" for name, implementation in MODELS]


@functools.lru_cache(maxsize=1)
def stock_and_fast(name, implementation):
    stock, fast = pair(prompted(name, implementation=implementation))
    return stock, softprompt.patch(fast, on_unsupported="error")


@pytest.mark.parametrize("name, implementation", MODELS, ids=IDS)
def test_a_patched_model_gives_the_numbers_of_peft(name, implementation):
    stock, fast = stock_and_fast(name, implementation)
    assert softprompt.explain(fast).route == ("padded" if name in PADDED else "packed")
    for title, batch in BATCHES.items():
        try:
            assert_same_step(fast, stock, batch)
        except AssertionError as error:
            raise AssertionError(f"{title}: {error}") from error


@pytest.mark.parametrize("name, implementation", MODELS, ids=IDS)
def test_a_batch_without_a_mask_has_no_pads(name, implementation):
    stock, fast = stock_and_fast(name, implementation)
    batch = make_batch((6, 6), width=6)
    del batch["attention_mask"]
    assert_same_step(fast, stock, batch)


@pytest.mark.parametrize("name, implementation", MODELS, ids=IDS)
def test_fp32_models_agree_to_fp32_accuracy(name, implementation):
    stock, fast = pair(prompted(name, torch.float32, implementation))
    softprompt.patch(fast, on_unsupported="error")
    assert_same_step(fast, stock, make_batch(side="left", labels="everywhere"), bound=3e-5)


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("side", ["left", "right"])
def test_compact_positions_equal_each_row_alone_without_padding(name, side):
    stock, fast = pair(prompted(name))
    softprompt.patch(fast, positions="compact")
    lengths = (7, 2, 5)
    batch = make_batch(lengths, side, labels="everywhere")
    got = step(fast, batch, num_items_in_batch=1)
    loss, grad = 0.0, 0.0
    for row in range(len(lengths)):
        real = batch["attention_mask"][row].bool()
        alone = {key: value[row : row + 1, real] for key, value in batch.items()}
        one = step(stock, alone, num_items_in_batch=1)
        loss, grad = loss + one.loss.double(), grad + prompt_of(stock).grad.clone()
        columns = torch.cat([torch.ones(4, dtype=torch.bool), real])
        assert_close(got.logits[row, columns], one.logits[0], 2e-5, f"logits of row {row}")
    assert_close(got.loss, loss, 2e-6, "loss")
    assert_close(prompt_of(fast).grad, grad, 2e-5, "prompt gradient")
