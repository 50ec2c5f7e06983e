"""What a patched model keeps for later calls of `generate`, and what the patch leaves alone."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from generating import PEFTS_CACHE, patched, speaker, tokens, two_adapters
from parity import make_batch, prompt_of
from peft import LoraConfig
from tiny_models import pair

import softprompt


# ---------------------------------------------------------------------------------------------- what it keeps
def change_in_place(model):
    with torch.no_grad():
        prompt_of(model).mul_(-1.0)


def change_behind_autograd(model):
    prompt_of(model).data.mul_(-1.0)


def change_the_parameter(model):
    embedding = model.prompt_encoder["default"].embedding
    embedding.weight = torch.nn.Parameter(-embedding.weight.detach())


def change_the_weights(model):
    with torch.no_grad():
        model.get_base_model().get_output_embeddings().weight.neg_()
        for parameter in model.get_base_model().base_model.layers.parameters():
            parameter.mul_(-1.0)


def change_the_weights_behind_autograd(model):
    for parameter in model.get_base_model().base_model.layers.parameters():
        parameter.data.mul_(-1.0)


def change_the_weights_twice_to_new_memory(model):
    for _ in range(2):
        for parameter in model.get_base_model().base_model.layers.parameters():
            parameter.data = parameter.data * -1.1


def train_a_step(model):
    optimizer = torch.optim.SGD([prompt_of(model)], lr=10.0)
    batch = make_batch()
    model(**batch).loss.backward()
    optimizer.step()


@pytest.mark.parametrize(
    "change",
    [
        change_in_place,
        change_behind_autograd,
        change_the_parameter,
        change_the_weights,
        change_the_weights_behind_autograd,
        change_the_weights_twice_to_new_memory,
        train_a_step,
    ],
)
def test_a_changed_prompt_or_model_is_computed_again(change):
    stock, fast = pair(speaker("llama"))
    before = tokens(patched(fast))
    change(stock)
    change(fast)
    expected = tokens(stock)
    assert not torch.equal(expected, before)
    assert torch.equal(tokens(fast), expected)


@PEFTS_CACHE
def test_layers_of_lora_in_the_base_model_that_are_switched_or_merged_are_noticed():
    stock, fast = pair(speaker("llama"))
    for model in (stock, fast):
        base = model.get_base_model()
        torch.manual_seed(1)
        for name in ("one", "two"):
            config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
            base.add_adapter(config, name)
        base.to(torch.float64)
    patched(fast)
    seen = []
    for change in (
        lambda base: base.set_adapter("one"),
        lambda base: base.set_adapter("two"),
        lambda base: base.disable_adapters(),
    ):
        for model in (stock, fast):
            change(model.get_base_model())
        seen.append(tokens(stock))
        assert torch.equal(tokens(fast), seen[-1])
    assert len({str(one.tolist()) for one in seen}) == 3


def test_a_cast_model_is_computed_again():
    fast = patched(speaker("llama", dtype=torch.float32))
    tokens(fast)
    fast.to(torch.bfloat16)
    tokens(fast)
    states = fast._softprompt.prompts["default"].states
    assert states.keys[0].dtype == torch.bfloat16


def test_another_active_adapter_and_a_deleted_one_are_noticed():
    stock, fast = pair(two_adapters("llama"))
    patched(fast)
    first = tokens(fast)
    for model in (stock, fast):
        model.set_adapter("long")
    expected = tokens(stock)
    assert not torch.equal(expected, first)
    assert torch.equal(tokens(fast), expected)
    fast.set_adapter("default")
    fast.delete_adapter("long")
    assert torch.equal(tokens(fast), first)
    assert set(fast._softprompt.prompts) == {"default"}


def test_hooks_that_change_their_mind_are_noticed():
    stock, fast = pair(speaker("llama"))
    patched(fast)
    strength = [0.0]
    for model in (stock, fast):
        layer = model.get_base_model().model.layers[0]
        layer.register_forward_hook(lambda module, args, out: out + strength[0] * out.roll(1, -1))
    before = tokens(fast)
    known = fast._softprompt.prompts["default"]
    assert torch.equal(tokens(fast), before)
    assert fast._softprompt.prompts["default"] is known
    strength[0] = 1.0
    expected = tokens(stock)
    assert not torch.equal(expected, before)
    assert torch.equal(tokens(fast), expected)


def test_prompts_that_were_computed_in_inference_mode_serve_calls_outside_of_it():
    stock, fast = pair(speaker("llama"))
    patched(fast)
    with torch.inference_mode():
        inside = tokens(fast)
    assert torch.equal(tokens(fast, num_beams=2), tokens(stock, num_beams=2))
    assert torch.equal(inside, tokens(stock))


# -------------------------------------------------------------------------------------------------- the patch
def test_an_unpatched_model_generates_as_before():
    stock, fast = pair(speaker("llama"))
    tokens(patched(fast))
    softprompt.unpatch(fast)
    assert type(fast) is type(stock)
    assert torch.equal(tokens(fast), tokens(stock))


def test_copies_and_pickles_generate_and_do_not_carry_the_kept_prompt():
    fast = patched(speaker("llama"))
    expected = tokens(fast)
    file = io.BytesIO()
    pickle.dump(fast, file)
    file.seek(0)
    for copied in (copy.deepcopy(fast), pickle.load(file)):
        assert copied._softprompt.prompts == {}
        assert torch.equal(tokens(copied), expected)


def test_autocast_and_training_without_dropout_are_served():
    stock, fast = pair(speaker("llama", dtype=torch.float32))
    patched(fast)
    tokens(fast)
    before = fast._softprompt.prompts["default"]
    with torch.autocast("cpu", torch.bfloat16):
        tokens(fast)
    assert fast._softprompt.prompts["default"] is not before
    for model in (stock, fast):
        model.train()
    assert torch.equal(tokens(fast), tokens(stock))


def test_served_calls_give_no_warning():
    fast = patched(speaker("llama"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokens(fast)
