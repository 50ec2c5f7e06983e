"""Methods of a model that others keep or wrap, while the patch comes, goes and comes again."""

import copy
import functools
import io
import pickle
import types

import pytest
import torch
from accelerate import Accelerator
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from accelerate.state import AcceleratorState, GradientState, PartialState
from parity import assert_close, make_batch, prompt_of, step
from seq2seq_models import prompted as seq2seq_prompted
from seq2seq_models import seq2seq_batch
from tiny_models import pair, prompted

import softprompt

BATCH = make_batch(side="left", labels="everywhere")


# ----------------------------------------------------------------------------- what is done to a model
def prepared(model):
    """As `Accelerator.prepare`, `Trainer(bf16=True)` and `SFTTrainer` leave it."""
    return Accelerator(cpu=True, mixed_precision="bf16").prepare(model)


def unwrapped(model):
    return Accelerator(cpu=True, mixed_precision="bf16").unwrap_model(
        prepared(model), keep_fp32_wrapper=False
    )


def hooked(model):
    return add_hook_to_module(model, ModelHook())


def kept(model):
    model.my_forward = model.forward
    return model


def wrapped_and_named(model):
    stock = model.forward

    @functools.wraps(stock)
    def forward(*args, **kwargs):
        return stock(*args, **kwargs)

    model.forward = forward
    return model


def wrapped(model):
    stock = model.forward
    model.forward = lambda *args, **kwargs: stock(*args, **kwargs)
    return model


CHANGES = [prepared, unwrapped, hooked, kept, wrapped_and_named, wrapped]
changes = pytest.mark.parametrize("change", CHANGES, ids=[change.__name__ for change in CHANGES])
copied_changes = pytest.mark.parametrize(
    "change", [prepared, unwrapped, hooked, kept], ids=["prepared", "unwrapped", "hooked", "kept"]
)
KINDS = {"causal": (lambda: prompted("llama"), BATCH), "seq2seq": (lambda: seq2seq_prompted("t5"), None)}
kinds = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(autouse=True)
def one_accelerator():
    """The state of accelerate is one for the process, and keeps the precision of an earlier test."""

    def reset():
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()

    reset()
    yield
    reset()


def two(kind):
    make, batch = KINDS[kind]
    return *pair(make()), batch or seq2seq_batch()


def assert_fast_and_right(fast, stock, batch):
    """The packed (or padded) route runs, and gives PEFT's step."""
    report = softprompt.explain(fast)
    assert report.patched
    assert report.route in ("packed", "padded")
    expected, got = step(stock, batch), step(fast, batch)
    bound = 3e-2 if hasattr(fast, "_original_forward") else 2e-6
    assert_close(got.loss.double(), expected.loss.double(), bound, "loss")
    assert got.grads.keys() == expected.grads.keys()
    for name, grad in expected.grads.items():
        assert_close(got.grads[name], grad, 10 * bound, name)
    assert softprompt.explain(fast).fallbacks == report.fallbacks


# ------------------------------------------------------------------------------------------------ the tests
@kinds
@changes
def test_unpatched_behind_a_change_the_model_is_pefts(change, kind):
    stock, fast, batch = two(kind)
    fast = softprompt.unpatch(change(softprompt.patch(fast, on_unsupported="error")))
    stock = change(stock)
    assert not softprompt.explain(fast).patched
    expected, got = step(stock, batch), step(fast, batch)
    assert torch.equal(got.loss, expected.loss)
    assert all(torch.equal(got.grads[name], grad) for name, grad in expected.grads.items())


@changes
def test_a_block_of_patched_may_change_the_model(change):
    stock, fast, batch = two("causal")
    with softprompt.patched(fast):
        fast = change(fast)
        assert_fast_and_right(fast, stock, batch)
    expected = step(change(stock), batch)
    assert torch.equal(step(fast, batch).loss, expected.loss)


@kinds
@changes
def test_a_cell_that_patches_may_run_twice(change, kind):
    stock, fast, batch = two(kind)
    fast = change(softprompt.patch(fast, on_unsupported="error"))
    softprompt.patch(fast, on_unsupported="error", backend="reference")
    assert fast._softprompt.options.backend == "reference"
    assert_fast_and_right(fast, stock, batch)


@changes
def test_patched_again_behind_unpatch_and_a_change(change):
    stock, fast, batch = two("causal")
    fast = softprompt.unpatch(change(softprompt.patch(fast)))
    if change is wrapped:  # which does not say what it wraps, and could wrap anything
        with pytest.warns(UserWarning, match="forward was replaced on the instance"):
            softprompt.patch(fast)
        assert torch.equal(step(fast, batch).loss, step(stock, batch).loss)
        return
    softprompt.patch(fast, on_unsupported="error")
    assert_fast_and_right(fast, stock, batch)


@changes
def test_the_options_of_the_second_patch_count(change):
    _, fast, batch = two("causal")
    compact = softprompt.patch(copy.deepcopy(fast), positions="compact")
    fast = change(softprompt.patch(fast))
    softprompt.patch(fast, positions="compact")
    bound = 3e-2 if change is prepared else 1e-9
    assert_close(step(fast, batch).loss.double(), step(compact, batch).loss.double(), bound, "loss")


@kinds
@copied_changes
def test_a_deep_copy_computes_with_its_own_weights(change, kind):
    stock, fast, batch = two(kind)
    fast = change(softprompt.patch(fast, on_unsupported="error"))
    twin = copy.deepcopy(fast)
    assert_fast_and_right(twin, stock, batch)
    assert prompt_of(fast).grad is None
    with torch.no_grad():
        prompt_of(fast).zero_()
    assert_fast_and_right(twin, stock, batch)


@kinds
def test_a_compiled_model_copies_and_is_saved_without_its_compiled_call(kind):
    stock, fast, batch = two(kind)
    softprompt.patch(fast)
    fast.compile(backend="eager")
    fast(**batch)
    stored = io.BytesIO()
    torch.save(fast, stored)
    stored.seek(0)
    for twin in (
        copy.deepcopy(fast),
        pickle.loads(pickle.dumps(fast)),
        torch.load(stored, weights_only=False),
    ):
        assert twin._compiled_call_impl is None  # as torch's own __getstate__ leaves a copy
        assert_fast_and_right(twin, stock, batch)
        assert prompt_of(twin).grad is not None
        assert prompt_of(fast).grad is None


def test_a_hook_of_accelerate_comes_off_whatever_the_patch_did():
    stock, fast, batch = two("causal")
    fast = hooked(softprompt.patch(fast))
    softprompt.unpatch(fast)
    remove_hook_from_module(fast)
    assert torch.equal(step(fast, batch).loss, step(stock, batch).loss)
    softprompt.patch(fast, on_unsupported="error")
    assert_fast_and_right(fast, stock, batch)


@pytest.mark.parametrize("name", ["forward", "generate", "prepare_inputs_for_generation"])
def test_a_kept_method_is_that_of_the_class_behind_unpatch(name):
    stock, fast, _ = two("causal")
    fast.eval(), stock.eval()
    softprompt.patch(fast)
    method = getattr(fast, name)
    softprompt.unpatch(fast)
    texts = {"input_ids": BATCH["input_ids"], "attention_mask": BATCH["attention_mask"]}
    if name == "forward":
        assert torch.equal(method(**BATCH).loss, stock(**BATCH).loss)
    elif name == "generate":
        assert torch.equal(method(**texts, max_new_tokens=3), stock.generate(**texts, max_new_tokens=3))
    else:
        with softprompt.patched(fast):
            pass
        fast.base_model_prepare_inputs_for_generation = lambda *args, **kwargs: {"input_ids": args[0]}
        fast.peft_config["default"].num_virtual_tokens = 4
        assert method(BATCH["input_ids"])["inputs_embeds"].shape == (3, 12, 48)


def test_a_forward_prepared_before_the_patch_is_refused_by_name():
    fast = prepared(prompted("llama"))
    with pytest.warns(UserWarning, match=r"replaced on the instance .*; call softprompt.patch before"):
        softprompt.patch(fast)
    report = softprompt.explain(fast)
    assert report.route == "stock"
    assert "before" in report.reason


def test_a_forward_of_the_class_replaced_behind_the_patch_is_called(monkeypatch):
    from peft import PeftModelForCausalLM

    stock, fast, batch = two("causal")
    softprompt.patch(fast)
    original = PeftModelForCausalLM.forward

    def doubled(self, *args, **kwargs):
        output = original(self, *args, **kwargs)
        output.loss = 2 * output.loss
        return output

    monkeypatch.setattr(PeftModelForCausalLM, "forward", doubled)
    with pytest.warns(UserWarning, match="has a forward of its own"):
        got = fast(**batch)
    assert torch.equal(got.loss, stock(**batch).loss)
    assert softprompt.explain(fast).route == "stock"
    monkeypatch.undo()
    assert_fast_and_right(fast, stock, batch)


@pytest.mark.parametrize("place", ["instance", "class"])
@pytest.mark.parametrize("name", ["prepare_inputs_for_generation", "generate"])
def test_what_generate_is_made_of_may_be_replaced_behind_the_patch(name, place, monkeypatch):
    from peft import PeftModelForCausalLM

    stock, fast, _ = two("causal")
    stock.eval(), fast.eval()
    softprompt.patch(fast)
    original = getattr(PeftModelForCausalLM, name)

    def one_token_is_never_said(self, *args, **kwargs):
        if name == "generate":
            return original(self, *args, **kwargs | {"bad_words_ids": [[first]]})
        inputs = original(self, *args, **kwargs)
        if inputs.get("inputs_embeds") is not None:
            inputs["inputs_embeds"] = -inputs["inputs_embeds"]
        return inputs

    texts = {"input_ids": BATCH["input_ids"], "attention_mask": BATCH["attention_mask"]}
    before = fast.generate(**texts, max_new_tokens=4)
    first = int(before[0, 8])
    if place == "class":
        monkeypatch.setattr(PeftModelForCausalLM, name, one_token_is_never_said)
    else:
        for model in (stock, fast):
            setattr(model, name, types.MethodType(one_token_is_never_said, model))
    expected = stock.generate(**texts, max_new_tokens=4)
    assert not torch.equal(expected, before)
    assert torch.equal(fast.generate(**texts, max_new_tokens=4), expected)
