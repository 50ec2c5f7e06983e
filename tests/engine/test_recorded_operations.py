"""What a recorded step asks of its device, seen on tensors of a device without data: it reads nothing."""

import collections
import contextlib

import pytest
import torch
from marks import slow_unless
from tiny_models import ARCHITECTURES, PADDED, build
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from softprompt.engine import precision
from softprompt.engine.batch import Batch
from softprompt.engine.losses import label_losses, weighted_sum
from softprompt.engine.model_spec import prompt_width
from softprompt.engine.plan import make_plan
from softprompt.layout import PackedLayout

ROWS, LABELS, PROMPT = 64, 16, 4
READING = ("gpt_oss",)  # its experts ask the device which of them have tokens: never recorded


class Operations(TorchDispatchMode):
    """Counts them, and names those that a tensor of the host takes part in."""

    def __init__(self):
        super().__init__()
        self.names, self.of_the_host = collections.Counter(), []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        self.names[name] += 1
        tensors = [leaf for leaf in tree_leaves((args, kwargs, made)) if isinstance(leaf, torch.Tensor)]
        if any(tensor.device.type == "cpu" for tensor in tensors):
            self.of_the_host.append(name)
        return made


@pytest.fixture
def device(monkeypatch):
    """The device without data, made one that models and ops take."""
    enabled, autocast = torch.is_autocast_enabled, torch.autocast

    def autocast_on(device_type, *args, **options):
        return contextlib.nullcontext() if device_type == "meta" else autocast(device_type, *args, **options)

    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind="cpu": kind != "meta" and enabled(kind))
    monkeypatch.setattr(torch, "autocast", autocast_on)
    monkeypatch.setattr(precision, "weight_obstacle", lambda name, weight: None)
    return torch.device("meta")


def move(model, device):
    """In place, since the models' own `to` makes no tensors without data of tied ones."""
    moved = {}
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is None:
                    continue
                if id(tensor) not in moved:
                    new = torch.empty_like(tensor, device=device)
                    if isinstance(tensor, nn.Parameter):
                        new = nn.Parameter(new, requires_grad=False)
                    moved[id(tensor)] = (tensor, new)
                table[name] = moved[id(tensor)][1]


def operations_of_a_step(name, device):
    model = build(name)
    plan = make_plan(model)
    move(model, device)

    def indices(*shape):
        return torch.zeros(shape, dtype=torch.int32, device=device)

    layout = PackedLayout(
        *(indices(ROWS) for _ in range(6)),
        cu_prompts=indices(2),
        cu_texts=indices(4),
        prompt_of_row=indices(3),
        label_rows=indices(LABELS),
        label_targets=indices(LABELS),
        prompt_lengths=(PROMPT,),
        batch_shape=(1, ROWS),
        num_tokens=None,
        num_labels=LABELS,
        longest_text=None,
        longest_context=ROWS,
    )
    width = prompt_width(model)
    prompt = torch.zeros(PROMPT, width, dtype=torch.float64, device=device, requires_grad=True)
    batch = Batch(
        (prompt,), layout.prompt_of_row, indices(1, ROWS).long(), None, torch.empty(0, device=device), None
    )
    num_items = torch.ones((), dtype=torch.float64, device=device)
    for operations in (Operations(), Operations()):  # what is made once is made in the first run
        with operations:
            rows = plan.decode(model, batch, layout)
            losses = label_losses(model, rows, plan.head)
            loss = weighted_sum(losses, rows.label_targets, None, num_items)
            (gradient,) = torch.autograd.grad(loss, prompt)
    assert gradient.device == device
    return operations


@pytest.mark.parametrize(
    "name",
    slow_unless(
        ["bloom", "llama", "gpt2", "gemma2", "gpt_oss", "falcon-alibi"],
        [name for name in ARCHITECTURES if name not in (*PADDED, *READING)],
    ),
)
def test_no_tensor_of_the_host_takes_part(name, device):
    assert operations_of_a_step(name, device).of_the_host == []


@pytest.mark.parametrize("name", ["bloom", "llama"])
def test_no_gradient_is_put_into_zeros(name, device):
    names = operations_of_a_step(name, device).names
    assert names["select_backward"] == 0
    assert names["embed_prompt"] + names["softprompt::embed_prompt"] == 1
