"""Calls and models that only PEFT's own forward serves: one warning and PEFT's result."""

import functools
import types

import pytest
import torch
from messages import warned
from parity import assert_close, assert_same_step, make_batch, step
from peft import TaskType, get_peft_model
from reasons import ADAPTERS, BATCH, CALLS, pattern_of
from reasons.calls import evaluate_without_labels
from tiny_models import build, pair, prompt_config, prompted
from transformers import LlamaConfig, LlamaForSequenceClassification

import softprompt


@functools.cache
def llama():
    return prompted("llama")


def outcome(model):
    """Logits and gradients of a sum of them (PEFT fits neither labels nor masks to two submodules)."""
    model.zero_grad(set_to_none=True)
    logits = model(input_ids=BATCH["input_ids"], use_cache=False).logits
    logits.square().mean().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), **grads}


def assert_identical(got, expected):
    assert type(got) is type(expected)
    assert got.keys() == expected.keys()
    for name in ("loss", "logits"):
        if expected.get(name) is not None:
            assert torch.equal(got[name], expected[name]), name
    for name in ("hidden_states", "attentions"):
        if expected.get(name) is not None:
            assert all(torch.equal(*both) for both in zip(got[name], expected[name], strict=True)), name


@pytest.mark.parametrize("call, sentence", CALLS.values(), ids=CALLS)
def test_a_call_that_is_not_served_gives_one_warning_and_the_result_of_peft(call, sentence):
    stock, fast = pair(llama())
    softprompt.patch(fast)
    for times in (1, 2):
        got, messages = warned(lambda: call(fast))
        assert_identical(got, call(stock))
        assert len(messages) == (1 if times == 1 else 0)
        ((_, count),) = softprompt.explain(fast).fallbacks
        assert count == times
    assert_same_step(fast, stock, BATCH)


@pytest.mark.parametrize("call, sentence", CALLS.values(), ids=CALLS)
def test_a_call_that_is_not_served_may_be_an_error(call, sentence):
    _, fast = pair(llama())
    softprompt.patch(fast, on_unsupported="error")
    with pytest.raises(softprompt.UnsupportedModelError, match=pattern_of(sentence)):
        call(fast)
    softprompt.patch(fast, positions="compact")
    with pytest.raises(softprompt.UnsupportedModelError, match=pattern_of(sentence)):
        call(fast)


def test_evaluation_without_labels_is_served_where_no_cache_is_wanted():
    stock, fast = pair(llama())
    softprompt.patch(fast, on_unsupported="error")
    real = BATCH["attention_mask"].bool()
    expected = evaluate_without_labels(stock).logits[:, 4:][real]
    with torch.no_grad():
        got = fast.eval()(**(BATCH | {"labels": None, "use_cache": False})).logits[:, 4:][real]
    assert_close(got, expected, 2e-5, "logits")
    fast.get_base_model().config.use_cache = False
    assert_close(evaluate_without_labels(fast).logits[:, 4:][real], expected, 2e-5, "logits")


@pytest.mark.parametrize("make, sentence", ADAPTERS.values(), ids=ADAPTERS)
def test_adapters_that_are_not_served_run_on_the_forward_of_peft(make, sentence):
    stock, fast = pair(make())
    _, messages = warned(lambda: softprompt.patch(fast))
    for times in (1, 2):
        got, more = warned(lambda: outcome(fast))
        messages += more
        expected = outcome(stock)
        assert got.keys() == expected.keys()
        assert all(torch.equal(got[name], value) for name, value in expected.items())
        assert len(messages) == 1, f"after call {times}"
    report = softprompt.explain(fast)
    assert (report.route, report.fallbacks) == ("stock", ((report.reason, 2),))
    with pytest.raises(softprompt.UnsupportedModelError, match=pattern_of(sentence)):
        outcome(softprompt.patch(fast, on_unsupported="error"))
    softprompt.unpatch(fast)
    assert torch.equal(outcome(fast)["logits"], outcome(stock)["logits"])


def test_a_forward_that_was_replaced_on_the_instance_stays():
    stock, fast = pair(llama())

    def doubled(self, *args, **kwargs):
        output = type(self).forward(self, *args, **kwargs)
        return type(output)(loss=output.loss * 2, logits=output.logits)

    fast.forward = types.MethodType(doubled, fast)
    _, messages = warned(lambda: softprompt.patch(fast))
    assert len(messages) == 1
    assert "replaced on the instance" in messages[0]
    assert torch.equal(step(fast, BATCH).loss, 2 * step(stock, BATCH).loss)
    assert softprompt.explain(fast).route == "stock"
    with pytest.raises(softprompt.UnsupportedModelError, match="replaced on the instance"):
        softprompt.patch(fast, on_unsupported="error")


def test_a_classifier_is_left_alone():
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        pad_token_id=0,
        num_labels=2,
    )
    base = LlamaForSequenceClassification(config)
    peft_config = prompt_config(base)
    peft_config.task_type = TaskType.SEQ_CLS
    model = get_peft_model(base, peft_config).eval()
    before = model(input_ids=BATCH["input_ids"], attention_mask=BATCH["attention_mask"]).logits
    cls = type(model)
    _, messages = warned(lambda: softprompt.patch(model))
    assert len(messages) == 1
    assert "not a causal language model" in messages[0]
    assert type(model) is cls
    assert torch.equal(
        model(input_ids=BATCH["input_ids"], attention_mask=BATCH["attention_mask"]).logits, before
    )
    with pytest.raises(softprompt.UnsupportedModelError, match="not a causal language model"):
        softprompt.patch(model, on_unsupported="error")


def test_a_model_whose_own_forward_fails_on_soft_prompts_is_left_alone():
    base = build("llama")
    base.model.layers[0].mlp.register_forward_hook(
        lambda module, args, output: output if args[0].shape[1] != 10 else 1 / 0
    )
    model = get_peft_model(base, prompt_config(base, 3))
    _, messages = warned(lambda: softprompt.patch(model))
    assert len(messages) == 1
    assert "own forward fails on soft prompts: ZeroDivisionError" in messages[0]
    assert softprompt.explain(model).route == "stock"
    loss, messages = warned(lambda: model(**BATCH).loss)
    assert torch.isfinite(loss)
    assert messages == []


def test_a_model_that_mixes_positions_within_a_row_is_found_out_by_the_self_check():
    """A layer that looks at absolute rows cannot be packed: the padded route serves it."""
    stock, fast = pair(llama())
    for model in (stock, fast):
        model.get_base_model().model.layers[0].register_forward_hook(
            lambda module, args, output: output.cumsum(1)
        )
    softprompt.patch(fast, on_unsupported="error")
    report = softprompt.explain(fast)
    assert report.route == "padded"
    assert any("packed/interface" in row and "off by" in row for row in report.rejected)
    assert_same_step(fast, stock, make_batch(side="right"))
