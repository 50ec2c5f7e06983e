"""Gradient checkpointing recomputes layers in the backward pass: the packed attention has to be back."""

import pytest
import torch
from marks import slow_unless
from parity import assert_close, assert_same_step, make_batch, prompt_of, real_columns, step
from peft import get_peft_model
from tiny_models import build, pair, prompt_config, prompted
from torch.utils.checkpoint import checkpoint

import softprompt

BATCH = make_batch(side="left", labels="everywhere")
MODELS = [
    "bloom",
    "llama",
    "gpt2",
    "mistral-window",
    "gemma2",
    "qwen2-window",
    "opt",
    "falcon",
    "gptj",
    "lfm2",
]


def switch_on(model, reentrant):
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})


@pytest.mark.parametrize(
    "name, moment",
    slow_unless(
        lambda case: case[0] in ("bloom", "llama", "gemma2", "mamba"),
        [(name, "after wrapping") for name in MODELS]
        + [(name, moment) for name in ("bloom", "llama") for moment in ("before wrapping", "after a step")],
    ),
)
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_recomputed_layers_give_the_gradient_of_peft(name, moment, reentrant):
    plain = prompted(name)
    if moment == "before wrapping":
        base = build(name)
        switch_on(base, reentrant)
        model = get_peft_model(base, prompt_config(base)).double()
        with torch.no_grad():
            prompt_of(model).copy_(prompt_of(plain))
    else:
        model = plain
    stock, fast = pair(model)
    softprompt.patch(fast, on_unsupported="error")
    if moment == "after a step":
        step(fast, BATCH)
    if moment != "before wrapping":
        switch_on(stock.get_base_model(), reentrant)
        switch_on(fast.get_base_model(), reentrant)
    unchecked = step(fast.eval(), BATCH)
    calls = []
    layer = next(m for m in fast.get_base_model().modules() if getattr(m, "gradient_checkpointing", False))
    assert layer is not None
    inner = [
        m for m in fast.get_base_model().modules() if type(m).__name__.endswith(("MLP", "Linear", "Conv1D"))
    ]
    inner[0].register_forward_hook(lambda *_: calls.append(1))
    stock.train()
    fast.train()
    assert_same_step(fast, stock, BATCH, use_cache=False)
    assert len(calls) >= 2, "nothing was recomputed"
    checked = step(fast, BATCH)
    assert torch.equal(checked.loss, unchecked.loss)
    for grad, expected in zip(checked.grads.values(), unchecked.grads.values(), strict=True):
        assert_close(grad, expected, 1e-12, "gradient with and without recomputation")


@pytest.fixture(params=["llama", "bloom"])
def models(request):
    stock, fast = pair(prompted(request.param))
    softprompt.patch(fast, on_unsupported="error")
    for model in (stock, fast):
        switch_on(model.get_base_model(), False)
        model.train()
    return stock, fast


def test_the_attention_of_the_model_is_put_back_after_the_backward(models):
    _, fast = models
    config = fast.get_base_model().config
    before = config._attn_implementation
    loss = fast(**BATCH).loss
    assert config._attn_implementation == before
    loss.backward()
    assert config._attn_implementation == before
    assert all("forward" not in m.__dict__ for m in fast.get_base_model().modules())


def test_the_graph_can_be_kept_for_a_second_backward(models):
    _, fast = models
    loss = fast(**BATCH).loss
    (first,) = torch.autograd.grad(loss, prompt_of(fast), retain_graph=True)
    (second,) = torch.autograd.grad(loss, prompt_of(fast))
    assert first.norm() > 0
    assert torch.equal(first, second)
    with pytest.raises(RuntimeError, match="backward through"):
        torch.autograd.grad(loss, prompt_of(fast))


def test_two_forwards_may_be_alive_at_the_same_time(models):
    stock, fast = models
    other = make_batch(side="right", seed=8)
    alone = [step(stock, batch).grads.popitem()[1] for batch in (BATCH, other)]
    fast.zero_grad()
    losses = [fast(**batch).loss for batch in (BATCH, other)]
    sum(losses).backward()
    assert_close(prompt_of(fast).grad, sum(alone), 2e-5, "prompt gradient")


def test_accumulated_steps_add_up(models):
    _, fast = models
    grad = step(fast, BATCH).grads.popitem()[1]
    fast.zero_grad()
    for _ in range(3):
        fast(**BATCH).loss.backward()
    assert_close(prompt_of(fast).grad, 3 * grad, 1e-12, "prompt gradient")


@pytest.mark.parametrize("train_prompt", [True, False])
def test_a_trainable_weight_of_the_model_gets_its_gradient(models, train_prompt):
    for model in models:
        norm = next(p for n, p in model.get_base_model().named_parameters() if "norm" in n)
        norm.requires_grad_(True)
        prompt_of(model).requires_grad_(train_prompt)
    stock, fast = models
    assert_same_step(fast, stock, BATCH, use_cache=False)
    assert len(step(fast, BATCH).grads) == 1 + train_prompt


def test_several_prompts_are_recomputed_with_their_texts(models):
    stock, fast = models
    for model in models:
        torch.manual_seed(5)
        model.add_adapter("longer", prompt_config(model.get_base_model(), 7))
    names = ["default", "longer", "default"]
    for row, adapter in enumerate(names):
        stock.set_adapter(adapter)
        stock(
            **{k: v[row : row + 1] for k, v in BATCH.items()}, num_items_in_batch=1, use_cache=False
        ).loss.backward()
    fast(**BATCH, adapter_names=names, num_items_in_batch=1).loss.backward()
    for adapter in ("default", "longer"):
        assert_close(prompt_of(fast, adapter).grad, prompt_of(stock, adapter).grad, 2e-5, adapter)


def test_without_gradients_nothing_is_recomputed(models):
    stock, fast = models
    with torch.no_grad():
        loss = fast(**BATCH).loss
    assert not loss.requires_grad
    assert_close(loss, step(stock, BATCH, use_cache=False).loss, 2e-6, "loss")


def test_dropout_is_drawn_again_alike():
    """The recomputed masks are the first ones, so the gradient is that of the loss that was returned."""
    _, fast = pair(prompted("gpt2-dropout"))
    softprompt.patch(fast)
    switch_on(fast.get_base_model(), False)
    fast.train()
    grads = []
    for checkpointing in (True, False):
        if not checkpointing:
            fast.get_base_model().gradient_checkpointing_disable()
        torch.manual_seed(7)
        grads.append(step(fast, BATCH).grads.popitem()[1])
    assert_close(grads[0], grads[1], 1e-10, "prompt gradient")


REAL = real_columns(BATCH, 4)


def inside(use):
    return lambda model: checkpoint(use, model(**BATCH).logits, use_reentrant=False)


# How logits meet a function of the user's own that is run again in the backward pass.
USES = {
    "first used inside": inside(lambda logits: logits[REAL].square().mean()),
    "cast inside": inside(lambda logits: logits.float()[REAL].square().mean()),
    "cloned inside": inside(lambda logits: (logits.clone()[REAL].exp() * logits[REAL]).mean()),
    "detached inside": inside(lambda logits: (logits[REAL] * logits.detach()[REAL].softmax(-1)).sum()),
    "one operand of two": inside(
        lambda logits: torch.cat([logits.new_ones(1, 12, 97), logits])[1:][REAL].mean()
    ),
    "found in a closure": lambda model: (
        lambda output: checkpoint(lambda: output.logits[REAL].square().mean(), use_reentrant=False)
    )(model(**BATCH)),
    "used by two functions": lambda model: (
        lambda logits: sum(
            checkpoint(lambda x: x[REAL].square().mean(), logits, use_reentrant=False) for _ in range(2)
        )
    )(model(**BATCH).logits),
    "made and used inside": lambda model: checkpoint(
        lambda ids: model(**{**BATCH, "input_ids": ids}).logits[REAL].square().mean(),
        BATCH["input_ids"],
        use_reentrant=False,
    ),
    "made inside, used outside": lambda model: (
        checkpoint(
            lambda ids: model(**{**BATCH, "input_ids": ids}).logits, BATCH["input_ids"], use_reentrant=False
        )[REAL]
        .square()
        .mean()
    ),
    "made inside, used further inside": lambda model: checkpoint(
        lambda ids: inside(lambda logits: logits[REAL].square().mean())(model),
        BATCH["input_ids"],
        use_reentrant=False,
    ),
}


@pytest.mark.parametrize("loss_of", USES.values(), ids=USES)
def test_logits_in_a_checkpointed_function_give_the_gradient_of_peft(loss_of):
    stock, fast = pair(prompted("llama"))
    softprompt.patch(fast, on_unsupported="error")
    losses = [loss_of(model) for model in (stock, fast)]
    for loss in losses:
        loss.backward()
    assert_close(losses[1].detach(), losses[0].detach(), 2e-6, "loss")
    assert_close(prompt_of(fast).grad, prompt_of(stock).grad, 2e-6, "d(prompt)")
