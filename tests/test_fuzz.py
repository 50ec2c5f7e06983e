"""Random batches through a patched model and, adapter by adapter, through PEFT."""

import functools
import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from parity import assert_close, prompt_of
from tiny_models import VOCABULARY, pair, prompt_config, prompted

import softprompt

ADAPTERS = {"default": 4, "one": 1, "six": 6}
MODELS = ["llama", "gpt2", "bloom", "mistral-window"]


@functools.cache
def models(name, positions):
    stock = prompted(name)
    torch.manual_seed(5)
    for adapter, length in ADAPTERS.items():
        if adapter != "default":
            stock.add_adapter(adapter, prompt_config(stock.get_base_model(), length))
    stock.prompt_encoder.double()
    stock, fast = pair(stock)
    return stock, softprompt.patch(fast, on_unsupported="error", positions=positions)


@st.composite
def batches(draw):
    """Texts of any length on any side, holes, labels on any columns (pads too), an adapter for each row."""
    num_rows, width = draw(st.integers(1, 5)), draw(st.integers(0, 9))
    side = draw(st.sampled_from(["left", "right", "holes", "none"]))
    seed = draw(st.integers(0, 2**16))
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(0, VOCABULARY, (num_rows, width), generator=generator)
    if side == "holes":
        mask = torch.rand(num_rows, width, generator=generator) < draw(st.sampled_from([0.3, 0.8]))
    else:
        lengths = torch.tensor(draw(st.lists(st.integers(0, width), min_size=num_rows, max_size=num_rows)))
        column = torch.arange(width)
        column = column if side == "right" else width - 1 - column
        mask = column < lengths[:, None]
    share = draw(st.sampled_from([0.0, 0.2, 1.0]))
    labelled = torch.rand(num_rows, width, generator=generator) < share
    where = draw(st.sampled_from(["anywhere", "text", "first"]))
    if where == "text":
        labelled &= mask
    elif where == "first":
        labelled &= mask & (mask.cumsum(1) == 1)
    batch = {"input_ids": input_ids, "labels": torch.where(labelled, input_ids, -100)}
    if side != "none":
        batch["attention_mask"] = mask.to(draw(st.sampled_from([torch.int64, torch.bool, torch.float32])))
    names = draw(st.lists(st.sampled_from(list(ADAPTERS)), min_size=num_rows, max_size=num_rows))
    return batch, names


def peft_result(stock, batch, names):
    """Summed loss, prompt gradients, and the logits of each row."""
    stock.zero_grad(set_to_none=True)
    loss, logits = torch.zeros((), dtype=torch.float64), {}
    for adapter in ADAPTERS:
        rows = [row for row, name in enumerate(names) if name == adapter]
        if not rows:
            continue
        stock.set_adapter(adapter)
        output = stock(**{key: value[rows] for key, value in batch.items()}, num_items_in_batch=1)
        output.loss.backward()
        loss = loss + output.loss.detach()
        logits |= dict(zip(rows, output.logits.detach(), strict=True))
    return loss, {a: prompt_of(stock, a).grad for a in ADAPTERS}, logits


def assert_close_sums(got, expected, what):
    """PEFT's loss goes through fp32 logits, so a text that is predicted well has few right digits."""
    error = float((got - expected).norm())
    assert error <= 2e-5 * float(expected.norm()) + 1e-5, f"{what} is off by {error:.1e}"


def check(stock, fast, batch, names):
    loss, grads, logits = peft_result(stock, batch, names)
    fast.zero_grad(set_to_none=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="softprompt: every label")
        output = fast(**batch, adapter_names=names, num_items_in_batch=1)
    output.loss.backward()
    assert_close_sums(output.loss.detach(), loss, "loss")
    for adapter, grad in grads.items():
        got = prompt_of(fast, adapter).grad
        if adapter not in names:
            assert got is None
        else:
            assert_close_sums(got, grad, f"gradient of {adapter}")
    width = batch["input_ids"].shape[1]
    longest = max(ADAPTERS[name] for name in names)
    mask = batch.get("attention_mask", torch.ones(len(names), width)).bool()
    for row, name in enumerate(names):
        kept = torch.cat([torch.ones(ADAPTERS[name], dtype=torch.bool), mask[row]])
        got = output.logits[row, longest - ADAPTERS[name] :].detach()
        assert_close(got[kept], logits[row][kept], 2e-5, f"logits of row {row}")


ANYTHING = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@pytest.mark.parametrize("name", MODELS)
@ANYTHING
@given(drawn=batches())
def test_any_batch_gives_the_result_of_peft(name, drawn):
    check(*models(name, "padded"), *drawn)


@pytest.mark.parametrize("name", MODELS)
@settings(ANYTHING, max_examples=20)
@given(drawn=batches())
def test_any_compact_batch_equals_its_rows_without_pads(name, drawn):
    batch, names = drawn
    stock, fast = models(name, "compact")
    mask = batch.pop("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    loss, grads = torch.zeros((), dtype=torch.float64), dict.fromkeys(ADAPTERS, 0)
    for row, adapter in enumerate(names):
        alone = {key: value[row][mask[row]][None] for key, value in batch.items()}
        one_loss, one_grads, _ = peft_result(stock, alone, [adapter])
        loss = loss + one_loss
        grads[adapter] = grads[adapter] + one_grads[adapter]
    fast.zero_grad(set_to_none=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="softprompt: every label")
        output = fast(**batch, attention_mask=mask, adapter_names=names, num_items_in_batch=1)
    output.loss.backward()
    assert_close_sums(output.loss.detach(), loss, "loss")
    for adapter in set(names):
        assert_close_sums(prompt_of(fast, adapter).grad, grads[adapter], f"gradient of {adapter}")
