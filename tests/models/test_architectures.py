"""Every architecture: a patched model gives PEFT's loss, logits and gradient, on its route."""

import re

import architectures
import pytest
import torch
from marks import slow_unless
from parity import make_batch, prompt_of, real_columns, relative_error, step
from tiny_models import pair, prompted

import softprompt

BOUND = 1e-5
LABELS = ("answer", "everywhere", "first")
SIDES = ("left", "right")


# What the models of tiny_models.py, which other tests run, do not have.
QUICK = (
    "xglm",
    "mixtral-window",
    "deepseek_v3",
    "llama4_text",
    "gemma3n_text-shared-keys",
    "cohere2",
    "mamba",
)


def model_of(name, dtype=torch.float32):
    return prompted(name, dtype, architectures=architectures.ARCHITECTURES)


def largest_error(got, expected, batch):
    """Of the loss, the logits at prompts and tokens, and the gradient, each relative to its norm."""
    columns = real_columns(batch, expected.logits.shape[1] - batch["input_ids"].shape[1])
    assert got.grads.keys() == expected.grads.keys()
    pairs = [(got.loss, expected.loss), (got.logits[columns], expected.logits[columns])]
    pairs += [(got.grads[name], grad) for name, grad in expected.grads.items()]
    return max(relative_error(*values) for values in pairs)


@pytest.mark.parametrize("name", slow_unless(QUICK, [*architectures.PACKED, *architectures.PADDED]))
def test_a_step_is_that_of_peft_on_the_expected_route(name, record):
    stock, fast = pair(model_of(name))
    softprompt.patch(fast)
    report = softprompt.explain(fast)
    errors = {}
    for side in SIDES:
        for labels in LABELS:
            batch = make_batch(side=side, labels=labels)
            errors[side, labels] = largest_error(step(fast, batch), step(stock, batch), batch)
    record(
        name=name,
        model=type(fast.get_base_model()).__name__,
        route=report.route,
        reason=report.reason,
        seam=dict(report.details).get("attention"),
        padded=max(errors.values()),
    )
    assert report.route == ("padded" if name in architectures.PADDED else "packed"), report
    assert max(errors.values()) <= BOUND, errors
    assert not softprompt.explain(fast).fallbacks


@pytest.mark.parametrize("name", slow_unless(QUICK, architectures.PACKED))
def test_compact_positions_give_each_row_what_it_gives_alone(name, record):
    stock, fast = pair(model_of(name))
    softprompt.patch(fast, positions="compact")
    worst = 0.0
    for side in SIDES:
        batch = make_batch(side=side, labels="everywhere")
        fast.zero_grad()
        output = fast(**batch)
        output.loss.backward()
        stock.zero_grad()
        losses, count = [], int((batch["labels"] != -100).sum())
        for row in range(batch["input_ids"].shape[0]):
            tokens = batch["attention_mask"][row].bool()
            alone = {key: value[row, tokens][None] for key, value in batch.items()}
            losses.append(stock(**alone).loss * int((alone["labels"] != -100).sum()) / count)
        sum(losses).backward()
        pairs = [(output.loss, sum(losses)), (prompt_of(fast).grad, prompt_of(stock).grad)]
        worst = max([worst, *(relative_error(got.detach(), right.detach()) for got, right in pairs)])
    record(name=name, compact=worst)
    assert worst <= BOUND


@pytest.mark.parametrize("name", architectures.NO_REFERENCE)
def test_without_a_reference_the_gradient_is_the_slope_of_the_loss(name, record):
    stock, fast = pair(model_of(name, torch.float64))
    softprompt.patch(fast)
    batch, prompt = make_batch(side="right"), prompt_of(fast)
    got = step(fast, batch)
    with torch.no_grad():
        assert relative_error(got.loss, stock(**batch).loss) <= BOUND
        direction = torch.randn(prompt.shape, generator=torch.Generator().manual_seed(0), dtype=prompt.dtype)
        slopes = []
        for sign in (1, -1):
            prompt.add_(direction, alpha=sign * 1e-3)
            slopes.append(sign * fast(**batch).loss / 2e-3)
            prompt.sub_(direction, alpha=sign * 1e-3)
    (gradient,) = got.grads.values()
    error = relative_error((gradient * direction).sum(), sum(slopes))
    report = softprompt.explain(fast)
    record(
        name=name,
        model=type(fast.get_base_model()).__name__,
        route=report.route,
        reason=f"{report.reason}; PEFT cannot train it, so the slope of the loss is compared",
        seam=dict(report.details).get("attention"),
        padded=error,
    )
    assert report.route == "padded"
    assert error <= 1e-3  # its states are fp32


@pytest.mark.parametrize("name", architectures.STOCK)
def test_a_model_that_peft_cannot_train_keeps_its_own_error(name, record):
    stock, fast = pair(model_of(name))
    messages = []
    for model in (stock, softprompt.patch(fast)):
        with pytest.raises((RuntimeError, TypeError, ValueError)) as failure:
            step(model, make_batch())
        messages.append(re.split(r"[:.]", str(failure.value))[0])  # what follows names tensors of the moment
    record(
        name=name,
        model=type(fast.get_base_model()).__name__,
        route="stock",
        reason=f"PEFT cannot train it either: {messages[0]}",
        seam="the model's own",
        padded=None,
    )
    assert messages[0] == messages[1]


def test_llama4_is_packed_as_far_as_its_attention_has_one_scale():
    stock, fast = pair(prompted("llama4_text", architectures=architectures.ARCHITECTURES, floor_scale=64))
    softprompt.patch(fast)
    short, long = make_batch((7, 3, 5)), make_batch((7, 3, 5, 9, 8, 7))
    for batch in (short, long):
        got, expected = step(fast, batch), step(stock, batch)
        assert largest_error(got, expected, batch) <= BOUND
    ((reason, count),) = softprompt.explain(fast).fallbacks
    assert "scales its attention by the place in the row, from 60 rows on" in reason
    assert count == 1
