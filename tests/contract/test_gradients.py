"""Statements 13 to 15 of the contract: the gradient of the prompt, and settings of the base model."""

import copy
import functools
import warnings

import pytest
import torch
from parity import assert_close, assert_same_step, make_batch, prompt_of, step
from peft import get_peft_model
from tiny_models import build, pair, prompt_config, prompted, with_prompt

import softprompt

BATCH = make_batch(side="left", labels="everywhere")
P = 4


@functools.cache
def built(name, dtype=torch.float64):
    return prompted(name, dtype)


def models(name="llama", dtype=torch.float64):
    stock, fast = pair(built(name, dtype))
    return stock, softprompt.patch(fast, on_unsupported="error")


@pytest.mark.parametrize("name", ["llama", "mamba"])
def test_13_the_gradient_is_the_sum_over_the_rows(name):
    stock, fast = models(name)
    prompt, base = prompt_of(stock), stock.get_base_model()
    per_row = prompt.detach().repeat(3, 1, 1).requires_grad_()
    embeds = base.get_input_embeddings()(BATCH["input_ids"])
    base(
        inputs_embeds=torch.cat([per_row, embeds], 1),
        attention_mask=torch.cat([torch.ones(3, P, dtype=torch.int64), BATCH["attention_mask"]], 1),
        labels=torch.cat([torch.full((3, P), -100), BATCH["labels"]], 1),
    ).loss.backward()
    grads = step(fast, BATCH).grads
    assert list(grads) == ["prompt_encoder.default.embedding.weight"]  # no buffers for the base model
    assert_close(next(iter(grads.values())), per_row.grad.sum(0), 2e-5, "gradient")
    assert_same_step(fast, stock, BATCH)


def test_13_the_gradient_of_a_bf16_model_is_fp32_and_as_exact_as_pefts():
    truth, _ = pair(with_prompt(build("llama", torch.bfloat16)))
    stock, fast = copy.deepcopy(truth), copy.deepcopy(truth)
    for model in (stock, fast):
        model.prompt_encoder.float()
    true = step(truth.double(), BATCH).grads.popitem()[1]
    softprompt.patch(fast, on_unsupported="error")
    expected, got = (step(model, BATCH).grads.popitem()[1] for model in (stock, fast))
    assert got.dtype == expected.dtype == torch.float32
    assert (got - true).norm() <= 2 * (expected - true).norm()


def test_13_gradients_accumulate_over_micro_batches():
    stock, fast = models(dtype=torch.float32)
    for number in range(3):
        batch = make_batch(labels="everywhere", seed=number)
        for model in (stock, fast):
            model(**batch, num_items_in_batch=40).loss.backward()
    assert prompt_of(fast).grad.dtype == torch.float32
    assert_close(prompt_of(fast).grad, prompt_of(stock).grad, 2e-5, "accumulated gradient")


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("moment", ["before wrapping", "after patching"])
def test_14_gradient_checkpointing_gives_the_same_gradient(moment, reentrant):
    def made(checkpointing):
        base = build("llama")
        switch = functools.partial(
            base.gradient_checkpointing_enable, gradient_checkpointing_kwargs={"use_reentrant": reentrant}
        )
        if checkpointing and moment == "before wrapping":
            switch()
        return with_prompt(base), switch

    plain, _ = made(False)
    stock, switch_stock = made(True)
    fast, switch_fast = made(True)
    softprompt.patch(fast, on_unsupported="error")
    if moment == "after patching":
        switch_stock()
        switch_fast()
    for model in (plain, stock, fast):
        model.train()
    assert_same_step(fast, stock, BATCH)
    assert_same_step(fast, plain, BATCH)


def test_14_autocast_gives_bf16_logits_and_an_fp32_loss():
    stock, fast = models(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        expected, got = step(stock, BATCH), step(fast, BATCH)
    assert got.loss.dtype == expected.loss.dtype == torch.float32
    assert got.logits.dtype == expected.logits.dtype == torch.bfloat16
    assert_close(got.loss, expected.loss, 3e-2, "loss")
    assert [grad.dtype for grad in got.grads.values()] == [torch.float32]


def test_15_modes_reach_the_base_model_and_its_dropout():
    """The masks of the prompt are drawn once per step and not per row, so only the expectation is PEFT's."""
    stock, fast = models("gpt2-dropout")
    for model in (stock, fast):
        model.train()
        assert all(module.training for module in model.modules())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert step(model, BATCH).loss != step(model, BATCH).loss
        model.eval()
        assert not any(module.training for module in model.modules())
    assert_same_step(fast, stock, BATCH)


def neftune(module, args, output):
    """Noise that depends on the shape of the padded batch, as NEFTune's does."""
    noise = torch.sin(torch.arange(output.numel(), dtype=output.dtype)).view(output.shape)
    return output + 5 * noise / (output.shape[1] * output.shape[2]) ** 0.5


@pytest.mark.parametrize("name", ["llama", "gemma", "mamba"])
def test_15_a_hook_on_the_embedding_acts_as_in_peft(name):
    stock, fast = models(name)
    quiet = step(fast, BATCH).loss
    for model in (stock, fast):
        model.get_base_model().get_input_embeddings().register_forward_hook(neftune)
    assert_same_step(fast, stock, BATCH)
    assert (step(fast, BATCH).loss - quiet).abs() > 1e-3


def test_15_weights_that_a_hook_brings_are_read_when_they_are_there():
    """Like offloading or ZeRO-3: outside of the module's call the embedding is empty."""
    stock, fast = models()
    embedding = fast.get_base_model().get_input_embeddings()
    weight = embedding.weight.data

    def bring(module, args):
        module.weight.data = weight

    def take(module, args, output):
        module.weight.data = torch.full_like(weight, float("nan"))

    embedding.register_forward_pre_hook(bring)
    embedding.register_forward_hook(take)
    take(embedding, None, None)
    assert_same_step(fast, stock, BATCH)


class Doubled(torch.nn.Embedding):
    """An embedding whose call is not a look-up in its table."""

    def forward(self, input_ids):
        return super().forward(input_ids) * 2


def test_15_an_embedding_of_another_class_is_called():
    models = []
    for _ in range(2):
        base = build("llama")
        doubled = Doubled(97, 48).double()
        doubled.load_state_dict(base.get_input_embeddings().state_dict())
        base.set_input_embeddings(doubled.requires_grad_(False))
        torch.manual_seed(3)
        models.append(get_peft_model(base, prompt_config(base)).double())
    stock, fast = models
    softprompt.patch(fast, on_unsupported="error")
    assert_same_step(fast, stock, BATCH)
