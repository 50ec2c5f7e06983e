"""A training step reads the counts of the layout once, before the model is launched, and nothing after."""

import contextlib
import sys

import pytest
import torch
from parity import make_batch
from tiny_models import prompt_config, prompted
from torch.utils._python_dispatch import TorchDispatchMode

import softprompt
from softprompt import layout
from softprompt.engine import model_spec, step_graph

BATCH = make_batch(side="left", labels="everywhere")
# On a GPU each of these makes the host wait. On the CPU Tensor.tolist runs no op, so Python is watched too.
OPS = (
    "_local_scalar_dense",
    "item",
    "nonzero",
    "masked_select",
    "_unique2",
    "unique_dim",
    "equal",
    "is_nonzero",
)
METHODS = ("tolist", "item", "__bool__", "__int__", "__float__", "__index__", "cpu", "numpy", "nonzero")
# Ops look at their indices where that is free, and only there (see the test on a device below).
FREE_ON_THE_CPU = (
    "ops/linear_cross_entropy/",
    "ops/checks.py",
    "ops/shared_prompt_attention/plans.py",
)


def reader():
    """The file of the innermost caller outside torch and this file."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if name != __file__ and "/torch/" not in name:
            return name
        frame = frame.f_back
    return ""


class Events(list):
    """Reads and launches in their order."""

    def read(self, what):
        """Keeps who read."""
        file = reader()
        if not any(part in file for part in FREE_ON_THE_CPU):
            owner = "the model's own code" if "/transformers/" in file else "softprompt"
            self.append(f"{what} by {owner}")

    @property
    def of_this_package(self):
        """Without what a model's own code does."""
        return [event for event in self if not event.endswith("own code")]


class Recorder(TorchDispatchMode):
    """Records ops whose result the host has to read."""

    def __init__(self, events):
        super().__init__()
        self.events = events

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")[-1]
        if name in OPS:
            self.events.read(f"aten.{name}")
        if name in ("index", "index_put", "index_put_"):
            masks = [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)]
            if masks:
                self.events.read(f"aten.{name} by a mask")
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def watched(model, monkeypatch):
    """Yields the list of reads and of launches of the body."""
    events = Events()
    inside_read = []

    def watch(method):
        original = getattr(torch.Tensor, method)

        def recorded(self, *args, **kwargs):
            if not inside_read:
                events.read(f"Tensor.{method}")
            return original(self, *args, **kwargs)

        return recorded

    body = model_spec.body_of(model)
    launch, read = body.forward, layout.read_counts

    def launched(*args, **kwargs):
        events.append("body")
        return launch(*args, **kwargs)

    def read_counts(tensors):
        events.append("read_counts")
        inside_read.append(True)
        try:
            return read(tensors)
        finally:
            inside_read.pop()

    with monkeypatch.context() as patch:
        for method in METHODS:
            patch.setattr(torch.Tensor, method, watch(method))
        patch.setattr(layout, "read_counts", read_counts)
        patch.setattr(body, "forward", launched)
        with Recorder(events):
            yield events


def patched_model(name):
    model = softprompt.patch(prompted(name), on_unsupported="error")
    model(**BATCH)  # the plan is made here
    return model


@pytest.mark.parametrize(
    "name", ["llama", "gpt2", "opt", "mistral-window", "bloom", "gemma2", "qwen2", "gpt_neox"]
)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_packed_step_reads_once_and_before_the_model(name, side, monkeypatch):
    model = patched_model(name)
    batch = make_batch(side=side, labels="everywhere")
    with watched(model.get_base_model(), monkeypatch) as events:
        model(**batch).loss.backward()
    assert events == ["read_counts", "body"]


@pytest.mark.parametrize("name", ["gptj", "falcon", "gpt_oss"])
def test_models_that_read_by_themselves_cause_no_further_read_of_ours(name, monkeypatch):
    model = patched_model(name)
    with watched(model.get_base_model(), monkeypatch) as events:
        model(**BATCH).loss.backward()
    assert events.of_this_package == ["read_counts", "body"]


def test_a_step_with_several_adapters_reads_once(monkeypatch):
    model = prompted("llama")
    model.add_adapter("other", prompt_config(model.get_base_model(), 7))
    softprompt.patch(model, on_unsupported="error")
    names = ["other", "default", "other"]
    model(**BATCH, adapter_names=names)
    with watched(model.get_base_model(), monkeypatch) as events:
        model(**BATCH, adapter_names=names, num_items_in_batch=torch.tensor(7)).loss.backward()
    assert events == ["read_counts", "body"]


def test_a_replayed_step_reads_once_and_before_the_replay(tape, monkeypatch):
    model = patched_model("llama")
    for _ in range(3):
        model(**BATCH).loss.backward()
    with watched(model.get_base_model(), monkeypatch) as events:
        # Steps are not recorded under a mode or with a replaced forward, so the watch's own do not count.
        monkeypatch.setattr(step_graph, "process_obstacle", lambda: None)
        del model_spec.body_of(model.get_base_model()).__dict__["forward"]
        before = tape.replays
        model(**BATCH).loss.backward()
        assert tape.replays == before + 1
        model_spec.body_of(model.get_base_model()).forward = None  # for the watch to put back
    assert events == ["read_counts"]


def test_a_recomputed_step_reads_once(monkeypatch):
    model = patched_model("llama")
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    model(**BATCH)  # the hook that comes with it makes a new plan
    with watched(model.get_base_model(), monkeypatch) as events:
        model(**BATCH).loss.backward()
    assert events == ["read_counts", "body"]


def test_a_padded_step_reads_once_and_before_the_model(monkeypatch):
    model = patched_model("lfm2")
    with watched(model.get_base_model(), monkeypatch) as events:
        model(**BATCH).loss.backward()
    assert events.of_this_package == ["Tensor.tolist by softprompt", "body"]


def test_the_watch_sees_reads(monkeypatch):
    """Otherwise the tests above could not fail."""
    model = patched_model("llama")
    value = torch.tensor([0.0, 2.0])
    with watched(model.get_base_model(), monkeypatch) as events:
        value.tolist()
        float(value[1])
        bool(value[1])
        value[value > 1]
        value.nonzero()
        torch.masked_select(value, value > 1)
    kinds = {event.split(" ")[0] for event in events}
    assert kinds >= {"Tensor.tolist", "Tensor.__float__", "Tensor.__bool__", "Tensor.nonzero"}
    assert kinds >= {"aten.index", "aten.nonzero", "aten.masked_select"}


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["llama", "bloom", "gpt2"])
def test_a_step_on_a_device_waits_for_it_once(name, monkeypatch):
    model = prompted(name, torch.float32).cuda()
    softprompt.patch(model, on_unsupported="error")
    batch = {key: value.cuda() for key, value in BATCH.items()}
    for _ in range(2):
        model(**batch).loss.backward()
    reads = []
    read = layout.read_counts

    def read_counts(tensors):
        reads.append(True)
        torch.cuda.set_sync_debug_mode("default")
        try:
            return read(tensors)
        finally:
            torch.cuda.set_sync_debug_mode("error")

    monkeypatch.setattr(layout, "read_counts", read_counts)
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(**batch).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert reads == [True]
