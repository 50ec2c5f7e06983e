"""The guard: what counts as a change of a model, for recorded steps, for its plan, and for kept prompts."""

import copy
import functools
import gc
import weakref
from collections import OrderedDict

import pytest
import torch
from attribute_changes import ON_CODE, ON_INSTANCES, STEERING, steer
from tiny_models import build
from torch import nn
from transformers.models.llama import modeling_llama

from softprompt.engine import guard as guard_module
from softprompt.engine.guard import guard_of, plan_key


def nothing(model):
    pass


def call_options(model):
    model.config.use_cache = not model.config.use_cache
    model.generation_config.top_k = 9
    model.warnings_issued = {"estimate_tokens": True}


def equal_number(model):
    model.model.norm.variance_epsilon = float(str(model.model.norm.variance_epsilon))


def values_of_a_weight(model):
    model.lm_head.weight.data.mul_(2)


def training(model):
    model.train()


def dropout(model):
    model.model.layers[0].self_attn.attention_dropout = 0.5


def place_of_a_weight(model):
    model.lm_head.weight.data = model.lm_head.weight.data.clone()


def trainable(model):
    model.lm_head.weight.requires_grad_(True)


def another_parameter(model):
    model.model.norm.weight = nn.Parameter(model.model.norm.weight.detach(), requires_grad=False)


def another_buffer(model):
    model.model.rotary_emb.inv_freq = 2 * model.model.rotary_emb.inv_freq


def added_child(model):
    model.model.extra = nn.Linear(3, 3)


def deleted_attribute(model):
    del model.model.layers[0].self_attn.is_causal


def added_attribute(model):
    model.model.layers[0].mlp.note = 3


def another_class(model):
    kind = type(model.model.layers[0].mlp)
    model.model.layers[0].mlp.__class__ = type("Own", (kind,), {})


def nested_setting(model):
    model.config.rope_parameters["rope_theta"] = 77.0


def hook(model):
    model.model.layers[0].register_forward_hook(lambda *args: None)


def backward_hook(model):
    model.model.layers[0].mlp.register_full_backward_hook(lambda *args: None)


def hook_without_a_handle(model):
    model.model.layers[0]._forward_hooks[7] = lambda *args: None


def table_of_hooks(model):
    model.model.layers[0]._forward_pre_hooks = OrderedDict({7: lambda *args: None})


def forward_of_the_model(model):
    forward = model.forward
    model.forward = lambda *args, **kwargs: forward(*args, **kwargs)


def named(changes):
    return pytest.mark.parametrize("change", changes, ids=lambda change: change.__name__)


def seen(model):
    guard = guard_of(model)
    return guard.check(), plan_key(model)[0], guard.mode()


@named([nothing, call_options, equal_number, values_of_a_weight])
def test_a_model_that_computes_with_the_same_has_not_changed(change):
    model = build("llama")
    before = seen(model)
    change(model)
    assert seen(model) == before


@named([training, dropout])
def test_flags_and_settings_that_go_to_and_fro_are_another_mode(change):
    model = build("llama")
    result, key, mode = seen(model)
    change(model)
    assert seen(model)[:2] == (result, key)
    assert guard_of(model).mode() != mode


@named([place_of_a_weight, trainable, another_parameter, another_buffer])
def test_other_tensors_are_a_change_of_the_weights_alone(change):
    model = build("llama")
    result, key, _ = seen(model)
    change(model)
    after, key_after, _ = seen(model)
    assert (after.model, after.hooks, key_after) == (result.model, result.hooks, key)
    assert after.weights != result.weights
    assert seen(model)[0] == after


@named([*ON_INSTANCES, added_child, deleted_attribute, added_attribute, another_class, nested_setting])
def test_what_a_model_computes_with_is_compared(change):
    model = build("llama")
    before = seen(model)[0]
    change(model)
    after = seen(model)[0]
    assert after.model != before.model
    assert seen(model)[0] == after


@named([*ON_INSTANCES[:2], deleted_attribute, added_attribute])
def test_the_route_does_not_depend_on_attributes_below_the_model(change):
    model = build("llama")
    key, _ = plan_key(model)
    change(model)
    assert plan_key(model)[0] == key


@named(ON_CODE)
def test_code_of_the_libraries_is_compared(change, monkeypatch):
    model = build("llama")
    before = seen(model)[0]
    change(monkeypatch.setattr)
    assert seen(model)[0].model != before.model


@named(STEERING)
def test_what_code_from_elsewhere_holds_is_compared(change, monkeypatch):
    model = build("llama")
    steer(model)
    before = seen(model)[0]
    assert seen(model)[0] == before
    change(model, monkeypatch.setattr)
    assert seen(model)[0] != before
    assert guard_of(model).unseen is None


@named([hook, backward_hook, hook_without_a_handle, table_of_hooks, forward_of_the_model])
def test_hooks_and_replaced_forwards_are_seen_and_leave_the_rest(change):
    model = build("llama")
    result, key, mode = seen(model)
    change(model)
    after = seen(model)
    assert after[0].hooked
    assert not result.hooked
    assert (after[0][:2], *after[1:]) == (result[:2], key, mode)
    assert seen(model) == after


def test_hooks_that_are_put_away_and_back_again_are_seen():
    model = build("llama")
    hook(model)
    layer = model.model.layers[0]
    before, table = seen(model)[0], layer._forward_hooks
    layer._forward_hooks = OrderedDict()
    assert not seen(model)[0].hooked
    layer._forward_hooks = table
    after = seen(model)[0]
    assert after.hooked
    assert after.model == before.model


def test_the_forward_of_a_model_inside_of_another_is_seen_when_it_is_replaced():
    outer = nn.ModuleDict({"model": build("llama")})
    assert not guard_of(outer).check().hooked
    forward_of_the_model(outer["model"])
    assert guard_of(outer).check().hooked


def test_a_function_that_leaves_the_file_of_a_model_is_a_change(monkeypatch):
    monkeypatch.setattr(modeling_llama, "of_a_library", lambda: None, raising=False)
    model = build("llama")
    before = seen(model)[0]
    monkeypatch.undo()
    assert seen(model)[0].model != before.model


def test_a_replaced_forward_that_is_taken_away_again_leaves_nothing():
    model = build("llama")
    before = seen(model)
    forward_of_the_model(model)
    assert seen(model)[0].hooked
    del model.forward
    assert seen(model) == before


@pytest.mark.parametrize("hold", ["list", "closure", "hook", "global", "partial"])
def test_a_guard_does_not_keep_a_model_alive_that_holds_itself(hold):
    model = build("llama")
    if hold == "list":
        model.model.layers[0].mlp.parents = [model]
    elif hold == "closure":
        model.model.layers[0].mlp.act_fn = None
        model.model.layers[0].mlp.own = lambda x, held=model: held
    elif hold == "global":
        namespace = {"held": model}
        exec("def own(x): return held", namespace)
        model.model.layers[0].mlp.own = namespace.pop("own")
    elif hold == "partial":
        model.model.layers[0].mlp.forward = functools.partial(print, model)
    first = guard_of(model).check()
    if hold == "hook":
        model.model.layers[0].register_forward_hook(lambda *args, held=model: None)
    assert (guard_of(model).check() == first) == (hold != "hook")
    alive = weakref.ref(model)
    namespace = None
    del model
    gc.collect()
    assert alive() is None


def test_a_history_that_grows_at_every_step_is_followed_without_listing_the_model_anew(monkeypatch):
    model = build("llama")
    model.model.layers[0].mlp.history = [torch.zeros(1), 0.5]
    guard = guard_of(model)
    before = guard.check()
    monkeypatch.setattr(guard_module, "Reads", None)
    for number in range(3):
        model.model.layers[0].mlp.history += [torch.ones(number), float(number), "text"]
        after = guard.check()
        assert after.model != before.model
        before = after
    model.model.layers[0].mlp.history[0].data = torch.zeros(1)
    assert guard.check().weights != before.weights


def test_weights_are_in_place_until_one_moves_or_goes():
    model = build("llama")
    guard = guard_of(model)
    state = guard.check()
    for change in (equal_number, values_of_a_weight, training, trainable, ON_INSTANCES[0], hook):
        change(model)
        assert guard.in_place(state)
    model.lm_head.weight.untyped_storage().resize_(0)
    assert not guard.in_place(state)


def test_weights_are_not_in_place_where_another_check_has_seen_others():
    model = build("llama")
    guard = guard_of(model)
    state = guard.check()
    place_of_a_weight(model)
    assert not guard.in_place(state)
    assert guard.in_place(guard.check())
    assert not guard.in_place(state)
    state = guard.check()
    another_parameter(model)
    assert not guard.in_place(state)


def test_copies_have_guards_of_their_own():
    model = build("llama")
    before = guard_of(model).check()
    twin = copy.deepcopy(model)
    assert guard_of(twin).check() != before
    twin.model.norm.variance_epsilon = 0.5
    assert guard_of(model).check() == before


def test_a_list_that_repeats_what_it_held_is_a_change(monkeypatch):
    calls, own = [], modeling_llama.LlamaMLP.forward

    def forward(self, x):
        calls.append(1)
        return own(self, x)

    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", forward)
    model = build("llama", torch.float32)
    guard = guard_of(model)
    states = []
    for _ in range(3):
        states.append(guard.check().model)
        calls.append(1)
    assert len(set(states)) == 3


def test_what_a_compiler_leaves_in_a_file_is_no_code_of_the_model(monkeypatch):
    model = build("llama", torch.float32)
    key, state = plan_key(model)
    monkeypatch.setattr(modeling_llama, "__compiled_fn_1", lambda x: x, raising=False)
    assert plan_key(model) == (key, state)
    twin = build("llama", torch.float32)
    assert not guard_of(twin).snapshot().is_open
