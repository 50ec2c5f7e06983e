"""Calls that something transforms or traces give what PEFT's forward gives there."""

import pytest
import seq2seq_models
import torch
from parity import assert_close, make_batch, prompt_of, real_columns
from tiny_models import pair, prompted
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.func import functional_call, grad, jacrev, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

import softprompt

BATCH = make_batch(side="left", labels="everywhere")


@pytest.fixture(params=["llama", "opt", "mamba"])
def twins(request):
    """A PEFT model and its patched twin; eager attention, since SDPA has no forward-mode AD on a CPU."""
    stock, fast = pair(prompted(request.param))
    softprompt.patch(fast, on_unsupported="fallback")
    for model in (stock, fast):
        if request.param == "llama":
            model.get_base_model().set_attn_implementation("eager")
    return stock, fast


def trainable(model):
    return {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}


def loss_of(model, batch=BATCH):
    return lambda values: functional_call(model, values, (), batch).loss


def assert_both(twins, run, bound=1e-5, said=None):
    """What `run` makes of both models is the same, and the patched one says why it was PEFT's forward."""
    stock, fast = twins
    expected, got = run(stock), run(fast)
    for number, (ours, theirs) in enumerate(zip(got, expected, strict=True)):
        assert theirs.isfinite().all()
        assert theirs.abs().max() > 0
        assert_close(ours, theirs, bound, f"result {number}")
    reasons = [reason for reason, _ in softprompt.explain(fast).fallbacks]
    assert [said in reason for reason in reasons] == ([True] if said else [])


# ------------------------------------------------------------------------------------------------ torch.func
def test_grad_gives_pefts_gradient(twins):
    assert_both(twins, lambda m: list(grad(loss_of(m))(trainable(m)).values()), said="torch.func")


def test_jacrev_gives_pefts_gradient(twins):
    assert_both(twins, lambda m: list(jacrev(loss_of(m))(trainable(m)).values()), said="torch.func")


def test_vmap_gives_each_row_its_own_gradient():
    stock, fast = pair(prompted("llama"))
    softprompt.patch(fast)
    for model in (stock, fast):
        model.get_base_model().set_attn_implementation("eager")

    def of_rows(model):
        def of_row(values, ids, labels):
            return loss_of(model, {"input_ids": ids[None], "labels": labels[None]})(values)

        rows = vmap(grad(of_row), in_dims=(None, 0, 0))
        return list(rows(trainable(model), BATCH["input_ids"], BATCH["labels"]).values())

    assert of_rows(fast)[0].shape[0] == 3
    assert_both((stock, fast), of_rows, said="torch.func")


def test_jvp_gives_pefts_derivative():
    stock, fast = pair(prompted("llama"))
    softprompt.patch(fast)
    for model in (stock, fast):
        model.get_base_model().set_attn_implementation("eager")

    def along_ones(model):
        values = trainable(model)
        return jvp(loss_of(model), (values,), ({name: torch.ones_like(v) for name, v in values.items()},))

    assert_both((stock, fast), along_ones, said="torch.func")


def test_an_encoder_decoder_is_transformed_as_pefts_is():

    stock, fast = pair(seq2seq_models.prompted("t5"))
    softprompt.patch(fast)
    batch = seq2seq_models.seq2seq_batch()
    assert_both(
        (stock, fast), lambda m: list(grad(loss_of(m, batch))(trainable(m)).values()), said="torch.func"
    )


def test_functional_call_alone_takes_the_fast_route(twins):
    def with_other_prompts(model):
        values = {name: (2 * value).requires_grad_() for name, value in trainable(model).items()}
        loss = loss_of(model)(values)
        return [loss, *torch.autograd.grad(loss, list(values.values()))]

    assert_both(twins, with_other_prompts)


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_batched_gradients_are_those_of_peft(backend):
    stock, fast = pair(prompted("llama"))
    softprompt.patch(fast, on_unsupported="error", backend=backend)
    real = real_columns(BATCH, 4)

    def of_the_loss(model):
        weights = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
        loss = model(**BATCH).loss.double()
        return torch.autograd.grad(loss, [prompt_of(model)], weights, is_grads_batched=True)

    def of_the_logits(model):
        logits = model(**BATCH).logits[real]
        directions = torch.randn(3, *logits.shape, dtype=logits.dtype, generator=torch.manual_seed(0))
        return torch.autograd.grad(logits, [prompt_of(model)], directions, is_grads_batched=True)

    assert_both((stock, fast), of_the_loss)
    assert_both((stock, fast), of_the_logits, bound=1e-4)


def test_dual_tensors_get_pefts_tangent():
    stock, fast = pair(prompted("llama"))
    softprompt.patch(fast)
    for model in (stock, fast):
        model.get_base_model().set_attn_implementation("eager")

    def tangent(model):
        with torch.autograd.forward_ad.dual_level():
            dual = {
                name: torch.autograd.forward_ad.make_dual(value, torch.ones_like(value))
                for name, value in trainable(model).items()
            }
            return [torch.autograd.forward_ad.unpack_dual(loss_of(model)(dual)).tangent]

    assert_both((stock, fast), tangent, said="forward-mode")


# -------------------------------------------------------------------------------------------------- tracing
class Loss(nn.Module):
    """What `torch.jit.trace` takes: tensors in and out."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask, labels):
        return self.model(
            input_ids=input_ids, attention_mask=attention_mask, labels=labels, use_cache=False
        ).loss


def test_a_trace_serves_batches_of_other_shapes():
    stock, fast = pair(prompted("llama"))
    softprompt.patch(fast)
    other = make_batch((9, 4), labels="everywhere")

    def traced(model):
        trace = torch.jit.trace(Loss(model), tuple(BATCH.values()), check_trace=False)
        return [trace(*other.values()).detach()]

    assert_both((stock, fast), traced, said="torch.jit.trace")
    assert_close(traced(fast)[0], stock(**other).loss.detach(), 1e-5, "loss of the trace")


def test_fake_tensors_have_pefts_shapes(twins):
    shapes = []
    for model in twins:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            output = model(**{name: mode.from_tensor(value) for name, value in BATCH.items()})
        shapes.append((output.logits.shape, output.loss.shape, output.logits.dtype))
    assert shapes[0] == shapes[1]
    assert shapes[0][:2] == (torch.Size([3, 12, 97]), torch.Size([]))
    assert "fake and meta tensors" in softprompt.explain(twins[1]).fallbacks[0][0]


def test_a_graph_of_proxies_serves_other_tokens():
    stock, fast = pair(prompted("llama"))
    softprompt.patch(fast)
    for model in (stock, fast):
        for value in model.parameters():
            value.requires_grad_(False)
    ids = BATCH["input_ids"]

    def logits_of(model):
        def call(input_ids):
            return model(input_ids=input_ids, use_cache=False).logits + 0

        fake = FakeTensorMode(allow_non_fake_inputs=True)
        with fake:
            graph = make_fx(call)(fake.from_tensor(ids))
        return [graph((ids + 1) % 97)]

    assert_both((stock, fast), logits_of, said="fake and meta tensors")


def test_behind_a_transform_steps_are_fast_again(twins):
    stock, fast = twins
    grad(loss_of(fast))(trainable(fast))
    stock.zero_grad()
    fast.zero_grad()
    before = softprompt.explain(fast).fallbacks
    for model in twins:
        model(**BATCH).loss.backward()
    assert softprompt.explain(fast).fallbacks == before
    assert_close(prompt_of(fast).grad, prompt_of(stock).grad, 1e-5, "gradient")


def test_with_errors_asked_for_a_transform_is_one():
    fast = softprompt.patch(prompted("llama"), on_unsupported="error")
    with pytest.raises(softprompt.UnsupportedModelError, match=r"a torch\.func transform"):
        grad(loss_of(fast))(trainable(fast))
