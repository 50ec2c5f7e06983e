"""What a recorded step takes for granted: tensors that stay, settings that are the same, and its turn."""

import contextlib
import copy
import gc
import pickle
import weakref

import numpy
import pytest
import torch
from attribute_changes import ON_CODE, ON_INSTANCES, STEERING, steer
from parity import assert_close, make_batch, step
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from tape import TapeRecorder
from tiny_models import build, pair, prompted
from torch import nn
from torch.overrides import TorchFunctionMode

import softprompt
from softprompt.engine import cuda_graph
from softprompt.engine.cuda_graph import RerunRecorder
from softprompt.engine.guard import guard_of
from softprompt.engine.losses import weighted_sum
from softprompt.engine.runner import runner_of
from softprompt.ops.pack_layout import prompt_offsets

EXACT = 1e-9


def recorded_and_eager(name):
    first, second = pair(prompted(name))
    return softprompt.patch(first), softprompt.patch(second, cuda_graphs=False)


def leaf(width=48):
    torch.manual_seed(0)
    return torch.randn(3, width, dtype=torch.float64, requires_grad=True)


def loss_of(base, prompt, seed, *, recorded=True, **options):
    return softprompt.forward(base, prompt, **make_batch(seed=seed), cuda_graphs=recorded, **options).loss


def record(base, prompt, times=3, **options):
    for seed in range(times):
        loss_of(base, prompt, seed, **options).backward()
    prompt.grad = None


def test_the_offsets_of_the_prompts_live_as_long_as_the_step(monkeypatch):
    """A CUDA graph keeps addresses, not tensors."""
    monkeypatch.setitem(cuda_graph.RECORDERS, "cpu", RerunRecorder())
    base, prompt = build("llama"), leaf()
    record(base, prompt)
    assert len(runner_of(base).graphs) == 1
    offsets = weakref.ref(prompt_offsets((3,), prompt.device))
    prompt_offsets.cache_clear()
    gc.collect()
    assert offsets() is not None


@pytest.mark.parametrize("hooked", [False, True])
def test_recorded_steps_do_not_keep_a_model_that_its_own_hook_holds(tape, hooked):
    base, prompt = build("llama"), leaf()
    record(base, prompt)
    assert len(runner_of(base).graphs) == 1
    if hooked:
        base.model.layers[0].register_forward_hook(lambda module, args, output, model=base: output)
    weight = weakref.ref(base.lm_head.weight)
    del base
    gc.collect()
    assert weight() is None


def test_copies_and_pickles_of_a_model_have_no_recorded_steps(tape):
    base, prompt = build("llama"), leaf()
    record(base, prompt)
    expected = loss_of(base, prompt, 3)
    for twin in (copy.deepcopy(base), pickle.loads(pickle.dumps(base))):
        assert len(runner_of(twin).graphs) == 0
        assert_close(loss_of(twin, prompt, 3).detach(), expected.detach(), EXACT, "loss")


def test_the_prompt_may_change_between_forward_and_backward(tape):
    grads = []
    for recorded in (True, False):
        base, prompt = build("llama"), leaf()
        record(base, prompt, recorded=recorded)
        output = softprompt.forward(base, prompt, **make_batch(seed=4), cuda_graphs=recorded)
        loss = output.loss + output.logits[:, 3:6].square().mean()
        with torch.no_grad():
            prompt.mul_(2)
        loss.backward()
        grads.append(prompt.grad)
    assert tape.replays > 2
    assert_close(*grads, 1e-6, "gradient")


class Elsewhere(TapeRecorder):
    """Between two turns another stream does what it likes with the tensors that are shared."""

    def __init__(self):
        super().__init__()
        self.graphs, self.turns = None, 0

    @contextlib.contextmanager
    def turn(self, device):
        self.turns += 1
        self.spoil()
        yield
        self.spoil()

    def spoil(self):
        for recorded in () if self.graphs is None else self.graphs._graphs.values():
            with torch.no_grad():
                for tensor in (recorded.inputs.prompts, recorded.loss, recorded.grad, recorded.hidden):
                    tensor.fill_(torch.nan)
                recorded.inputs.input_ids.fill_(0)


def test_a_step_touches_the_shared_tensors_in_its_turn_alone(monkeypatch):
    elsewhere = Elsewhere()
    monkeypatch.setitem(cuda_graph.RECORDERS, "cpu", elsewhere)
    recorded, eager = recorded_and_eager("llama")
    for seed in range(6):
        batch = make_batch(seed=seed)
        expected, got = step(eager, batch), step(recorded, batch)
        elsewhere.graphs = recorded._softprompt.runner.graphs
        assert_close(got.loss, expected.loss, EXACT, "loss")
        for key, grad in expected.grads.items():
            assert_close(got.grads[key], grad, EXACT, key)
    assert elsewhere.replays > 3
    assert elsewhere.turns == 6


def test_the_switches_of_a_frozen_lora_in_the_base_are_followed(tape):
    options = {"target_modules": ["q_proj", "up_proj"], "init_lora_weights": False}
    torch.manual_seed(3)
    base = inject_adapter_in_model(LoraConfig(r=2, **options), build("llama")).double()
    base.requires_grad_(False)
    prompt = leaf()
    layers = [module for module in base.modules() if isinstance(module, BaseTunerLayer)]

    def switch(on):
        for layer in layers:
            layer.enable_adapters(on)
        base.requires_grad_(False)

    record(base, prompt)
    losses = [loss_of(base, prompt, 7).item()]
    for change in (
        lambda: switch(False),
        lambda: switch(True),
        lambda: [layer.set_scale("default", 3.0) for layer in layers],
        lambda: [layer.merge() for layer in layers],
        lambda: [layer.unmerge() for layer in layers],
    ):
        change()
        for _ in range(3):
            got = loss_of(base, prompt, 7).detach()
            assert_close(got, loss_of(base, prompt, 7, recorded=False).detach(), EXACT, "loss")
        losses.append(got.item())
    assert len({round(loss, 6) for loss in losses}) == 3
    assert tape.replays > 8


def test_a_dropout_of_0_that_is_no_float_is_watched_too(tape):
    model, _ = recorded_and_eager("gpt2")
    model.train()
    dropouts = [module for module in model.modules() if isinstance(module, nn.Dropout)]
    for module in dropouts:
        module.p = 0
    for seed in range(3):
        model(**make_batch(seed=seed)).loss.backward()
    assert model._softprompt.runner.graphs.statistics.replayed == 2
    for module in dropouts:
        module.p = 0.5
    with pytest.warns(UserWarning, match="not recorded: dropout is on"):
        model(**make_batch()).loss.backward()
    assert model._softprompt.runner.graphs.statistics.replayed == 2


def test_backward_hooks_of_all_modules_are_called_at_every_step(tape):
    recorded, eager = recorded_and_eager("llama")
    for seed in range(3):
        recorded(**make_batch(seed=seed)).loss.backward()
    called = []
    handle = nn.modules.module.register_module_full_backward_hook(lambda module, *_: called.append(module))
    try:
        with pytest.warns(UserWarning, match="not recorded: modules of the language model have hooks"):
            recorded(**make_batch()).loss.backward()
        by_recorded = len(called)
        eager(**make_batch()).loss.backward()
    finally:
        handle.remove()
    assert len(called) == 2 * by_recorded > 0


def test_the_backward_of_a_step_recorded_under_autocast_is_not_under_it(tape, monkeypatch):
    """Where a forward leaves autocast for products in fp32, their gradients are products in fp32 too."""
    seen = []

    def watched_loss(*args):
        loss = weighted_sum(*args)
        loss.register_hook(lambda _: seen.append(torch.is_autocast_enabled("cpu")))
        return loss

    monkeypatch.setattr("softprompt.engine.recorded_step.weighted_sum", watched_loss)
    base, prompt = build("llama", dtype=torch.float32), leaf().detach().float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        record(base, prompt, 2)
    assert tape.replays > 0
    assert seen
    assert not any(seen)


@pytest.mark.parametrize(
    ("items", "message"),
    [
        (torch.tensor([1.0, 2.0]), "must have one element, got shape"),
        (-3, "must be a number of at least 0, got -3"),
    ],
)
@pytest.mark.parametrize("before", [1, 3])
def test_a_denominator_that_is_none_is_refused_by_name(items, message, before, tape):
    """When the step would be recorded, and when it would be replayed."""
    base, prompt = build("llama"), leaf()
    for options in ({}, {"recorded": False}):
        record(base, prompt, before, **options)
        with pytest.raises(ValueError, match=f"num_items {message}"):
            loss_of(base, prompt, 1, num_items_in_batch=items, **options)
    record(base, prompt)
    assert runner_of(base).graphs.obstacle is None
    assert len(runner_of(base).graphs) == 1


def test_what_a_call_that_failed_saw_of_the_model_does_not_count_for_the_next(tape):
    base, prompt = build("llama"), leaf()
    record(base, prompt)
    with pytest.raises(ValueError, match="num_items must be a number of at least 0, got -1"):
        loss_of(base, prompt, 3, num_items_in_batch=-1)
    with torch.no_grad():
        base.lm_head.weight.data = base.lm_head.weight + 1
    expected = loss_of(copy.deepcopy(base), prompt, 3, recorded=False)
    assert_close(loss_of(base, prompt, 3).detach(), expected.detach(), EXACT, "loss")
    guard = guard_of(base)
    before = guard.check()
    assert guard.check() == before
    base.lm_head.weight.data = base.lm_head.weight.data.clone()
    after = guard.check()
    assert (after.model, after.hooked) == (before.model, False)
    assert after.weights != before.weights


def assert_follows(base, prompt, change):
    """A replay gives what an eager step gives, before and after a change."""
    record(base, prompt)
    before = loss_of(base, prompt, 7).detach()
    assert_close(before, loss_of(base, prompt, 7, recorded=False).detach(), EXACT, "loss")
    change()
    for _ in range(3):
        expected = loss_of(base, prompt, 7, recorded=False).detach()
        assert_close(loss_of(base, prompt, 7).detach(), expected, EXACT, "loss")
    assert abs(expected - before) > 1e-6
    return before


@pytest.mark.parametrize("change", ON_INSTANCES, ids=lambda change: change.__name__)
def test_a_change_that_touches_no_weight_is_followed(change, tape):
    base, prompt = build("llama"), leaf()
    assert_follows(base, prompt, lambda: change(base))
    assert tape.replays > 1


@pytest.mark.parametrize("change", ON_CODE, ids=lambda change: change.__name__)
def test_other_code_is_followed(change, tape, monkeypatch):
    base, prompt = build("llama"), leaf()
    before = assert_follows(base, prompt, lambda: change(monkeypatch.setattr))
    monkeypatch.undo()
    assert_close(loss_of(base, prompt, 7).detach(), before, EXACT, "loss")


@pytest.mark.parametrize("change", STEERING, ids=lambda change: change.__name__)
def test_what_a_module_of_the_users_own_looks_at_is_followed(change, tape, monkeypatch):
    base, prompt = build("llama"), leaf()
    steer(base)
    assert_follows(base, prompt, lambda: change(base, monkeypatch.setattr))
    assert tape.replays > 1


class Tabled(nn.Module):
    """Its table is seen by no one."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.table = inner, numpy.array([0.0])

    def forward(self, x):
        return self.inner(x) + float(self.table[0])


def test_a_step_of_code_whose_changes_cannot_be_seen_is_not_recorded(tape):
    base, prompt = build("llama"), leaf()
    base.model.layers[0].mlp = Tabled(base.model.layers[0].mlp)
    with pytest.warns(UserWarning, match="not recorded: .*Tabled holds a ndarray, whose changes cannot be"):
        record(base, prompt)
    before = loss_of(base, prompt, 7).item()
    base.model.layers[0].mlp.table[0] = 2.0
    got = loss_of(base, prompt, 7).item()
    assert got == loss_of(base, prompt, 7, recorded=False).item() != before
    assert tape.replays == 0


class Silent(TorchFunctionMode):
    """Leaves activations out."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return args[0] if function is nn.functional.silu else function(*args, **(kwargs or {}))


def test_steps_under_a_mode_of_pytorch_are_not_recorded(tape):
    base, prompt = build("llama"), leaf()
    record(base, prompt)
    before = loss_of(base, prompt, 7).item()
    with Silent(), pytest.warns(UserWarning, match=r"not recorded: a mode of PyTorch is on \(Silent\)"):
        got = loss_of(base, prompt, 7).item()
    with Silent():
        assert got == loss_of(base, prompt, 7, recorded=False).item() != before
    assert loss_of(base, prompt, 7).item() == before


def test_settings_that_come_and_go_and_calls_of_generate_keep_the_recorded_steps(tape):
    model, _ = recorded_and_eager("llama")
    base = model.get_base_model()
    for seed in range(6):
        model(**make_batch(seed=seed)).loss.backward()
        model.generate(**make_batch(side="left", labels=None), max_new_tokens=2)
        base.config.use_cache = bool(seed % 2)
        base.generation_config.top_k = seed
        norm = base.model.layers[0].input_layernorm
        norm.variance_epsilon = float(str(norm.variance_epsilon))
    statistics = model._softprompt.runner.graphs.statistics
    assert (statistics.recorded, statistics.replayed, statistics.dropped) == (1, 5, 0)
