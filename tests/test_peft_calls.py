"""Calls of a patched model: every argument and setting of PEFT's forward gives PEFT's result."""

import warnings

import pytest
import torch
from parity import assert_close, assert_same_step, make_batch, prompt_of, step
from tiny_models import pair, prompt_config, prompted
from torch import nn

import softprompt

BATCH = make_batch(side="left", labels="everywhere")


@pytest.fixture
def models():
    stock, fast = pair(prompted("llama"))
    return stock, softprompt.patch(fast, on_unsupported="error")


def test_accumulated_gradients_equal_those_of_one_large_batch(models):
    stock, fast = models
    parts = [make_batch((7, 3), seed=1), make_batch((4, 6), seed=2, width=8)]
    count = sum(int((part["labels"] != -100).sum()) for part in parts)
    fast.zero_grad()
    for part in parts:
        fast(**part, num_items_in_batch=count).loss.backward()
    whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    step(stock, whole)
    assert_close(prompt_of(fast).grad, prompt_of(stock).grad, 2e-5, "accumulated gradient")


def test_a_scaled_loss_scales_the_gradient(models):
    _, fast = models
    grad = step(fast, BATCH).grads.popitem()[1]
    fast.zero_grad()
    (fast(**BATCH).loss * -0.25).backward()
    assert_close(prompt_of(fast).grad, -0.25 * grad, 1e-12, "scaled gradient")


def test_the_graph_can_be_kept_for_a_second_backward(models):
    _, fast = models
    loss = fast(**BATCH).loss
    (first,) = torch.autograd.grad(loss, prompt_of(fast), retain_graph=True)
    (second,) = torch.autograd.grad(loss, prompt_of(fast))
    assert torch.equal(first, second)


def test_return_dict_false_gives_a_tuple(models):
    stock, fast = models
    for batch in (BATCH, {**BATCH, "labels": None, "use_cache": False}):
        expected = stock(**batch, return_dict=False)
        got = fast(**batch, return_dict=False)
        assert isinstance(got, tuple)
        if batch["labels"] is not None:
            assert_close(got[0], expected[0], 2e-6, "loss")
        else:
            assert len(got) == len(expected) == 1
    by_position = fast(BATCH["input_ids"], BATCH["attention_mask"], None, BATCH["labels"], None, None, False)
    assert_close(by_position[0], stock(**BATCH).loss, 2e-6, "loss")


def test_the_configuration_may_ask_for_tuples(models):
    _, fast = models
    loss = fast(**BATCH).loss
    fast.get_base_model().config.return_dict = False
    assert torch.equal(fast(**BATCH)[0], loss)


def test_input_embeddings_get_the_gradient_of_peft(models):
    grads = []
    for model in models:
        torch.manual_seed(2)
        embeds = torch.randn(*BATCH["input_ids"].shape, 48, dtype=torch.float64, requires_grad=True)
        rest = {name: BATCH[name] for name in ("attention_mask", "labels")}
        model(inputs_embeds=embeds, **rest).loss.backward()
        grads.append(embeds.grad[BATCH["attention_mask"].bool()])
    assert grads[0].norm() > 0
    assert_close(grads[1], grads[0], 2e-5, "gradient of the embeddings")


def test_masks_of_every_dtype_mean_the_same(models):
    stock, fast = models
    for dtype in (torch.bool, torch.int32, torch.uint8, torch.float32, torch.float64):
        batch = {**BATCH, "attention_mask": BATCH["attention_mask"].to(dtype)}
        assert_same_step(fast, stock, batch)
    for dtype in (torch.int32, torch.int16):
        batch = {**BATCH, "labels": BATCH["labels"].to(dtype)}
        assert_close(step(fast, batch).loss, step(stock, BATCH).loss, 2e-6, "loss")
    batch = {**BATCH, "input_ids": BATCH["input_ids"].int()}
    assert_same_step(fast, stock, batch)


def test_tensors_need_not_be_contiguous(models):
    stock, fast = models
    wide = {name: value.repeat_interleave(2, 1)[:, ::2] for name, value in BATCH.items()}
    tall = {name: value.t().contiguous().t() for name, value in BATCH.items()}
    assert_same_step(fast, stock, wide)
    assert_same_step(fast, stock, tall)


ADAPTERS = {"default": 4, "longer": 9, "short": 1}


@pytest.fixture(params=["llama", "bloom", "mistral-window"])
def several(request):
    stock = prompted(request.param)
    torch.manual_seed(5)
    for adapter, length in list(ADAPTERS.items())[1:]:
        stock.add_adapter(adapter, prompt_config(stock.get_base_model(), length))
    stock.prompt_encoder.double()
    stock, fast = pair(stock)
    return stock, softprompt.patch(fast, on_unsupported="error")


@pytest.mark.parametrize("side", ["left", "right"])
def test_each_row_may_name_its_adapter(several, side):
    stock, fast = several
    names = ["longer", "default", "short", "longer"]
    batch = make_batch((6, 3, 5, 4), side, "everywhere")
    for parameter in stock.parameters():
        parameter.grad = None
    loss = torch.zeros((), dtype=torch.float64)
    logits = []
    for row, adapter in enumerate(names):
        stock.set_adapter(adapter)
        output = stock(**{k: v[row : row + 1] for k, v in batch.items()}, num_items_in_batch=5)
        output.loss.backward()
        loss += output.loss.detach()
        logits.append(output.logits.detach()[0])
    got = step(fast, batch, adapter_names=names, num_items_in_batch=5)
    assert_close(got.loss, loss, 2e-6, "loss")
    for adapter in ADAPTERS:
        assert_close(prompt_of(fast, adapter).grad, prompt_of(stock, adapter).grad, 2e-5, adapter)
    for row, adapter in enumerate(names):
        real = batch["attention_mask"][row].bool()
        columns = got.logits[row, -len(real) :][real]
        assert_close(columns, logits[row][-len(real) :][real], 2e-5, f"logits of row {row}")
        prompt = got.logits[row, :9][9 - ADAPTERS[adapter] :]
        assert_close(prompt, logits[row][: ADAPTERS[adapter]], 2e-5, f"prompt logits of row {row}")


def test_adapter_names_do_not_change_the_active_adapter(several):
    _, fast = several
    fast.set_adapter("short")
    expected = step(fast, BATCH).loss
    fast(**BATCH, adapter_names=["longer"] * 3)
    assert fast.active_adapter == "short"
    assert torch.equal(step(fast, BATCH).loss, expected)


def test_adapter_names_on_the_padded_route_need_one_length():
    stock = prompted("mamba")
    torch.manual_seed(5)
    stock.add_adapter("other", prompt_config(stock.get_base_model(), 4))
    stock.prompt_encoder.double()
    stock, fast = pair(stock)
    softprompt.patch(fast)
    batch = make_batch(labels="everywhere")
    names = ["other", "default", "other"]
    loss = 0
    for row, adapter in enumerate(names):
        stock.set_adapter(adapter)
        output = stock(**{k: v[row : row + 1] for k, v in batch.items()}, num_items_in_batch=5)
        output.loss.backward()
        loss = loss + output.loss.detach()
    assert_close(step(fast, batch, adapter_names=names, num_items_in_batch=5).loss, loss, 2e-6, "loss")
    for adapter in ("other", "default"):
        assert_close(prompt_of(fast, adapter).grad, prompt_of(stock, adapter).grad, 2e-5, adapter)
    fast.add_adapter("longer", prompt_config(fast.get_base_model(), 6))
    with pytest.raises(ValueError, match=r"one length.*\[4, 6\]"):
        fast(**batch, adapter_names=["other", "longer", "other"])


@pytest.mark.parametrize("part", ["model", "model.norm", "model.layers.1.mlp"])
def test_a_hook_inside_the_model_acts_once(part):
    stock, fast = pair(prompted("llama"))
    for model in (stock, fast):
        module = model.get_base_model().get_submodule(part)
        module.register_forward_hook(lambda module, args, output: scaled(output))
    softprompt.patch(fast, on_unsupported="error")
    assert_same_step(fast, stock, BATCH)
    assert len(module._forward_hooks) == 1


def scaled(output):
    if isinstance(output, torch.Tensor):
        return output * 1.3
    output.last_hidden_state = output.last_hidden_state * 1.3
    return output


def test_a_hook_on_the_head_acts(models):
    stock, fast = models
    step(fast, BATCH)
    for model in models:
        model.get_base_model().lm_head.register_forward_hook(lambda module, args, output: output * 0.5)
    assert_same_step(fast, stock, BATCH)


@pytest.mark.parametrize(
    "part",
    ["model.norm.weight", "model.layers.0.mlp.up_proj.weight", "lm_head.weight", "model.embed_tokens.weight"],
)
@pytest.mark.parametrize("moment", ["before", "after"])
def test_trainable_weights_of_the_model_get_their_gradients(part, moment):
    stock, fast = pair(prompted("llama"))
    if moment == "after":
        step(softprompt.patch(fast, on_unsupported="error"), BATCH)
    for model in (stock, fast):
        model.get_base_model().get_parameter(part).requires_grad_(True)
    if moment == "before":
        softprompt.patch(fast, on_unsupported="error")
    assert_same_step(fast, stock, BATCH)
    assert part in "".join(step(fast, BATCH).grads)


def test_a_tied_trainable_embedding_gets_the_gradient_of_both_uses():
    stock, fast = pair(prompted("gpt2"))
    for model in (stock, fast):
        model.get_base_model().transformer.wte.weight.requires_grad_(True)
    softprompt.patch(fast, on_unsupported="error")
    assert_same_step(fast, stock, BATCH)


def test_a_frozen_prompt_gives_a_loss_without_gradient(models):
    _, fast = models
    prompt_of(fast).requires_grad_(False)
    assert not fast(**BATCH).loss.requires_grad


@pytest.mark.parametrize("part", ["bias", "scale"])
def test_a_changed_head_is_seen(models, part):
    stock, fast = models
    step(fast, BATCH)
    for model in models:
        torch.manual_seed(4)
        old = model.get_base_model().lm_head
        new = nn.Linear(48, old.weight.shape[0], bias=part == "bias").double().requires_grad_(False)
        model.get_base_model().set_output_embeddings(new)
    assert_same_step(fast, stock, BATCH)


@pytest.mark.parametrize("name", ["llama", "bloom", "gpt2"])
def test_autocast_gives_an_fp32_loss_close_to_that_of_peft(name):
    stock, fast = pair(prompted(name, torch.float32))
    softprompt.patch(fast, on_unsupported="error")
    truth = step(stock, BATCH)
    with torch.autocast("cpu", torch.bfloat16):
        expected, got = step(stock, BATCH), step(fast, BATCH)
    assert got.loss.dtype == expected.loss.dtype == torch.float32
    assert got.logits.dtype == expected.logits.dtype
    assert_close(got.loss, truth.loss, 3e-2, "loss")
    (grad,), (expected_grad,), (true_grad,) = (s.grads.values() for s in (got, expected, truth))
    own_error = (expected_grad - true_grad).norm()
    assert (grad - true_grad).norm() < 2 * own_error + 1e-2 * true_grad.norm()


def test_no_grad_gives_a_loss_without_gradient(models):
    stock, fast = models
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            output, expected = fast(**BATCH), stock(**BATCH)
        assert not output.loss.requires_grad
        assert not output.logits.requires_grad
        assert_close(output.loss, expected.loss, 2e-6, "loss")


def test_a_first_call_under_inference_mode_does_not_spoil_later_training():
    stock, fast = pair(prompted("llama"))
    softprompt.patch(fast, on_unsupported="error")
    fast.to(torch.float32)
    with torch.inference_mode():
        fast(**BATCH)
    assert_same_step(fast, stock.float(), BATCH, bound=3e-5)


def test_dropout_of_the_frozen_model_is_announced_once_and_off_in_evaluation():
    stock, fast = pair(prompted("gpt2-dropout"))
    softprompt.patch(fast, on_unsupported="error")
    assert_same_step(fast, stock, BATCH)
    fast.train()
    with pytest.warns(UserWarning, match=r"dropout \(.*p=0.1"):
        fast(**BATCH)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        losses = torch.stack([fast(**BATCH).loss.detach() for _ in range(3)])
    assert losses.std() > 0
    torch.manual_seed(0)
    first = fast(**BATCH).loss
    torch.manual_seed(0)
    assert torch.equal(fast(**BATCH).loss, first)


def test_dropout_has_the_expectation_of_peft():
    stock, fast = pair(prompted("gpt2-dropout", torch.float32))
    softprompt.patch(fast, on_unsupported="error")
    losses = {}
    for name, model in (("stock", stock), ("fast", fast)):
        model.train()
        torch.manual_seed(3)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            losses[name] = torch.stack([model(**BATCH).loss for _ in range(60)])
    spread = (losses["stock"].var() / 60 + losses["fast"].var() / 60).sqrt()
    assert (losses["stock"].mean() - losses["fast"].mean()).abs() < 4 * spread


def test_the_loss_has_no_way_through_the_logits_so_that_their_hooks_see_other_losses_alone(models):
    for model, expected in zip(models, (2, 1), strict=True):
        output, seen = model(**BATCH), []
        output.logits.register_hook(seen.append)
        output.loss.backward(retain_graph=True)
        output.logits.sum().backward()
        assert len(seen) == expected


def test_arguments_by_place_are_those_of_peft_and_then_the_adapters():
    model = softprompt.patch(prompted("llama"))
    batch = make_batch((7, 3), "left", "answer")
    ids, mask, labels = batch["input_ids"], batch["attention_mask"], batch["labels"]
    expected = model(**batch).loss
    assert torch.equal(model(ids, mask, None, labels).loss, expected)
    by_place = model(ids, mask, None, labels, None, None, None, None, ["default"] * 2)
    assert torch.equal(by_place.loss, expected)
    with pytest.raises(TypeError, match="multiple values for argument 'input_ids'"):
        model(ids, mask, input_ids=ids)
    with pytest.raises(TypeError, match="takes 9 positional arguments, but 10 were given"):
        model(*[None] * 10)
