"""What a patched model keeps for later calls of `generate`, and what the patch leaves alone."""

import copy
import gc
import io
import pickle
import warnings
import weakref

import pytest
import torch
from attribute_changes import ON_CODE, ON_INSTANCES, STEERING, steer, steering_of
from generating import PEFTS_CACHE, counted_tokens, patched, speaker, tokens, two_adapters
from parity import make_batch, prompt_of
from peft import LoraConfig
from tiny_models import build, pair
from torch.overrides import TorchFunctionMode

import softprompt
from softprompt.engine.guard import guard_of


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


@pytest.mark.parametrize("change", ON_INSTANCES, ids=lambda change: change.__name__)
def test_a_change_that_touches_no_weight_is_noticed(change):
    stock, fast = pair(speaker("llama"))
    before = tokens(patched(fast))
    for model in (stock, fast):
        change(model.get_base_model())
    expected = tokens(stock)
    assert not torch.equal(expected, before)
    assert torch.equal(tokens(fast), expected)
    assert torch.equal(tokens(fast), expected)


@pytest.mark.parametrize("change", ON_CODE, ids=lambda change: change.__name__)
def test_other_code_is_noticed(change, monkeypatch):
    stock, fast = pair(speaker("llama"))
    before = tokens(patched(fast))
    change(monkeypatch.setattr)
    expected = tokens(stock)
    assert not torch.equal(expected, before)
    assert torch.equal(tokens(fast), expected)
    monkeypatch.undo()
    assert torch.equal(tokens(fast), before)


@pytest.mark.parametrize("change", STEERING, ids=lambda change: change.__name__)
def test_what_a_module_of_the_users_own_looks_at_is_noticed(change, monkeypatch):
    stock, fast = pair(speaker("llama"))
    for model in (stock, fast):
        steer(model.get_base_model())
    before = tokens(patched(fast))
    known = fast._softprompt.prompts["default"]
    assert torch.equal(tokens(fast), before)
    assert fast._softprompt.prompts["default"] is known
    for model in (stock, fast):
        change(model.get_base_model(), monkeypatch.setattr)
    expected = tokens(stock)
    assert not torch.equal(expected, before)
    assert torch.equal(tokens(fast), expected)


def test_a_steering_vector_that_is_written_through_data_is_noticed():
    stock, fast = pair(speaker("llama"))
    for model in (stock, fast):
        steer(model.get_base_model())
    before = tokens(patched(fast))
    for model in (stock, fast):
        steering_of(model.get_base_model()).vectors[0].data.add_(1.0)
    expected = tokens(stock)
    assert not torch.equal(expected, before)
    assert torch.equal(tokens(fast), expected)


def test_settings_of_the_configuration_are_noticed():
    stock, fast = pair(speaker("gemma2"))
    before = tokens(patched(fast))
    for model in (stock, fast):
        model.config.sliding_window = 20
    expected = tokens(stock)
    assert not torch.equal(expected, before)
    assert torch.equal(tokens(fast), expected)


def test_a_mode_that_changes_what_functions_do_is_noticed():
    class Doubled(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            return 2 * result if function is torch.nn.functional.silu else result

    stock, fast = pair(speaker("llama"))
    before = tokens(patched(fast))
    with Doubled():
        expected = tokens(stock)
        assert torch.equal(tokens(fast), expected)
    assert not torch.equal(expected, before)
    assert torch.equal(tokens(fast), before)


def test_a_prompt_is_kept_where_nothing_counts_for_it():
    """What other calls leave on a model, a head that changes, and a number that is set to what it was."""
    fast = patched(speaker("llama"))
    tokens(fast)
    number = fast._softprompt.prompts["default"].number
    base = fast.get_base_model()
    with counted_tokens(fast) as counts:
        base.generation_config.top_k = 7
        base.warnings_issued = {"estimate_tokens": True}
        norm = base.model.layers[0].input_layernorm
        norm.variance_epsilon = float(str(norm.variance_epsilon))
        base.lm_head.weight.neg_()
        base.config.use_cache = not base.config.use_cache
        tokens(fast, max_new_tokens=1)
    assert counts == [7 + 3 + 5 - 3, 3]
    assert fast._softprompt.prompts["default"].number == number
    norm.variance_epsilon = 1.0
    tokens(fast)
    assert fast._softprompt.prompts["default"].number != number


def test_what_a_kept_prompt_was_computed_from_may_go():
    body = build("llama").model
    snapshot = guard_of(body).snapshot()
    assert snapshot.same(guard_of(body).snapshot())
    gone = [weakref.ref(body.layers[1]), weakref.ref(body.layers[1].mlp.up_proj.weight)]
    body.layers = body.layers[:1]
    gc.collect()
    assert [reference() for reference in gone] == [None, None]
    assert not snapshot.same(guard_of(body).snapshot())


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
