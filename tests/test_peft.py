"""`patch`, `unpatch`, `patched`: what they change, what they leave alone, and what survives them."""

import copy
import inspect
import io

import peft
import pytest
import torch
from parity import assert_same_step, make_batch, prompt_of, step
from peft import PeftModel, PeftModelForCausalLM
from tiny_models import pair, prompted

import softprompt
from softprompt import state

BATCH = make_batch(side="left", labels="everywhere")


@pytest.fixture
def model():
    return prompted("llama")


@pytest.fixture
def models(model):
    return pair(model)


def public_state(module):
    """What a patch could leave behind: classes, instance attributes and the attention implementation."""
    return {
        name: (
            type(m),
            {key: id(value) for key, value in m.__dict__.items()},
            getattr(getattr(m, "config", None), "_attn_implementation", None),
        )
        for name, m in module.named_modules()
    }


def is_patched(model):
    return type(model) is not PeftModelForCausalLM


def test_patching_returns_the_same_model_and_patching_again_changes_the_options(models):
    stock, fast = models
    assert softprompt.patch(fast) is fast
    cls = type(fast)
    left = {key: value.clone() for key, value in step(fast, BATCH).grads.items()}
    softprompt.patch(fast, positions="compact")
    assert type(fast) is cls
    assert not torch.allclose(step(fast, BATCH).grads.popitem()[1], left.popitem()[1], rtol=1e-3)
    softprompt.patch(fast)
    assert_same_step(fast, stock, BATCH)


def test_unpatching_restores_the_class_the_attributes_and_the_outputs_bit_for_bit(models):
    stock, fast = models
    before = public_state(fast)
    softprompt.patch(fast)
    step(fast, BATCH)
    assert softprompt.unpatch(fast) is fast
    assert public_state(fast) == before
    expected, got = step(stock, BATCH), step(fast, BATCH)
    assert torch.equal(got.loss, expected.loss)
    assert torch.equal(got.logits, expected.logits)
    assert all(torch.equal(got.grads[name], grad) for name, grad in expected.grads.items())


def test_unpatching_a_model_that_is_not_patched_does_nothing(model):
    before = public_state(model)
    softprompt.unpatch(softprompt.unpatch(model))
    assert public_state(model) == before


def test_patched_takes_the_patch_back_at_the_end_of_the_block(model):
    before = public_state(model)
    with softprompt.patched(model, on_unsupported="error") as inside:
        assert inside is model
        assert is_patched(model)
    assert public_state(model) == before
    with pytest.raises(KeyError), softprompt.patched(model):
        raise KeyError
    assert public_state(model) == before


def test_patched_on_a_patched_model_restores_its_options(models):
    stock, fast = models
    softprompt.patch(fast)
    with softprompt.patched(fast, positions="compact"), pytest.raises(AssertionError):
        assert_same_step(fast, stock, BATCH)
    assert is_patched(fast)
    assert_same_step(fast, stock, BATCH)


def test_nothing_outside_the_instance_is_touched(models):
    other, fast = models
    classes = [type(m) for m in fast.modules()] + [PeftModel, peft.peft_model.PeftModelForCausalLM]
    before = {cls: dict(vars(cls)) for cls in classes}
    others = public_state(other)
    inner = public_state(fast.get_base_model())
    softprompt.patch(fast)
    step(fast, BATCH)
    assert public_state(other) == others
    assert public_state(fast.get_base_model()) == inner
    for cls, attributes in before.items():
        assert {k: v for k, v in vars(cls).items() if not k.startswith("_abc")} == {
            k: v for k, v in attributes.items() if not k.startswith("_abc")
        }


@pytest.mark.parametrize("name", ["llama", "bloom", "gptj", "falcon", "mamba"])
def test_an_exception_inside_the_model_leaves_it_as_it_was(name):
    fast = prompted(name)
    softprompt.patch(fast)
    base = fast.get_base_model()
    last = next(m for m in reversed(list(base.base_model.modules())) if isinstance(m, torch.nn.Linear))
    step(fast, BATCH)
    before = public_state(fast)
    handle = last.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fast(**BATCH)
    handle.remove()
    assert public_state(fast) == before
    step(fast, BATCH)


@pytest.mark.parametrize("move_first", [True, False])
@pytest.mark.parametrize(
    "dtype, bound", [(torch.float64, 2e-6), (torch.bfloat16, 4e-2)], ids=["float64", "bfloat16"]
)
def test_a_model_may_be_cast_before_and_after_patching(dtype, bound, move_first):
    stock, fast = pair(prompted("llama", torch.float32))
    if move_first:
        softprompt.patch(fast.to(dtype))
    else:
        step(softprompt.patch(fast), BATCH)
        fast.to(dtype)
    assert softprompt.explain(fast).route == "packed"
    assert_same_step(fast, stock.to(dtype), BATCH, bound=bound)


@pytest.mark.parametrize("moment", ["before", "after"])
def test_disable_adapter_gives_the_bare_model(models, moment):
    stock, fast = models
    bare = stock.get_base_model()(**BATCH)
    if moment == "after":
        softprompt.patch(fast)
    with fast.disable_adapter():
        inside = fast(**BATCH)
        tokens = fast.generate(input_ids=BATCH["input_ids"], max_new_tokens=3)
    if moment == "before":
        softprompt.patch(fast)
    assert torch.equal(inside.logits, bare.logits)
    assert torch.equal(inside.loss, bare.loss)
    assert torch.equal(
        tokens, stock.get_base_model().generate(input_ids=BATCH["input_ids"], max_new_tokens=3)
    )
    assert_same_step(fast, stock, BATCH)
    with fast.disable_adapter():
        assert torch.equal(fast(**BATCH).logits, bare.logits)
    assert_same_step(fast, stock, BATCH)


def test_patching_inside_disable_adapter_leaves_the_bare_model_and_says_so(models):
    stock, fast = models
    bare = stock.get_base_model()(**BATCH)
    with fast.disable_adapter():
        with pytest.warns(UserWarning, match="forward was replaced on the instance"):
            softprompt.patch(fast)
        assert torch.equal(fast(**BATCH).logits, bare.logits)
    assert_same_step(fast, stock, BATCH)
    softprompt.patch(fast, on_unsupported="error")
    assert_same_step(fast, stock, BATCH)


def test_unpatching_after_disable_adapter_gives_peft_again(models):
    stock, fast = models
    softprompt.patch(fast)
    with fast.disable_adapter():
        pass
    softprompt.unpatch(fast)
    assert torch.equal(step(fast, BATCH).loss, step(stock, BATCH).loss)


def saved_and_loaded(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, saved_and_loaded], ids=["deepcopy", "torch.save"])
def test_a_copy_is_patched_and_independent(models, duplicate):
    stock, fast = models
    softprompt.patch(fast, on_unsupported="error")
    step(fast, BATCH)
    with fast.disable_adapter():
        pass
    twin = duplicate(fast)
    assert is_patched(twin)
    assert softprompt.explain(twin).patched
    assert prompt_of(twin).data_ptr() != prompt_of(fast).data_ptr()
    assert_same_step(twin, stock, BATCH)
    with torch.no_grad():
        prompt_of(twin).mul_(0)
    softprompt.unpatch(twin)
    assert_same_step(fast, stock, BATCH)
    assert not is_patched(twin)


def test_the_options_of_a_copy_are_those_of_the_original(model):
    softprompt.patch(model, positions="compact")
    twin = copy.deepcopy(model)
    assert torch.equal(step(twin, BATCH).loss, step(model, BATCH).loss)


def test_training_and_evaluation_mode_agree_with_peft(models):
    stock, fast = models
    softprompt.patch(fast)
    assert_same_step(fast.train(), stock.train(), BATCH)
    assert_same_step(fast.eval(), stock.eval(), BATCH)
    assert not any(m.training for m in fast.modules())


def test_the_plan_leaves_training_flags_and_random_state_alone(model):
    model.train()
    model.get_base_model().model.layers[1].eval()
    flags = [m.training for m in model.modules()]
    torch.manual_seed(1)
    state = torch.get_rng_state()
    softprompt.patch(model)
    assert [m.training for m in model.modules()] == flags
    assert torch.equal(torch.get_rng_state(), state)
    assert prompt_of(model).grad is None


def test_type_and_signature_are_those_of_peft(model):
    stock = inspect.signature(model.forward)
    softprompt.patch(model)
    assert isinstance(model, PeftModelForCausalLM)
    assert type(model).__name__ == "PeftModelForCausalLM"
    assert model.peft_config["default"].is_prompt_learning
    signature = inspect.signature(model.forward)
    assert [*signature.parameters][:8] == [*stock.parameters][:8]
    assert set(signature.parameters) - set(stock.parameters) == {"adapter_names"}


def test_a_hook_on_the_wrapper_still_runs(model):
    softprompt.patch(model)
    seen = []
    model.register_forward_hook(lambda module, args, output: seen.append(output.loss.item()))
    loss = step(model, BATCH).loss
    assert seen == [loss.item()]


def test_patching_again_and_again_leaves_nothing_behind():
    model = prompted("llama")
    for _ in range(3):
        softprompt.patch(model)
        with softprompt.patched(model, positions="compact"):
            assert state.model_named(state.state_of(model).name) is model
        assert state.model_named(state.state_of(model).name) is model
        softprompt.unpatch(model)
    assert not [name for name, known in state._MODELS.items() if known is model]
