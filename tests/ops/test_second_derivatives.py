"""Ops that are differentiable once refuse a second derivative, which would else be a wrong number."""

import pytest
import torch

from softprompt.ops.embed_prompt import embed_prompt
from softprompt.ops.glu import glu
from softprompt.ops.rms_norm import rms_norm
from softprompt.ops.rotary import rotary


def of_glu(x):
    return glu(x, x.detach(), activation="silu")


def of_rms_norm(x):
    return rms_norm(x, torch.ones(4), eps=1e-6)


def of_embed_prompt(x):
    table, ids = torch.ones(3, 4), torch.zeros(1, 2, dtype=torch.int64)
    return embed_prompt(table, ids, torch.arange(4) - 2, x)


@pytest.mark.parametrize("call", [of_rms_norm, of_glu, of_embed_prompt])
def test_a_second_derivative_is_refused(call):
    x = torch.randn(2, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(call(x).pow(2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="can be differentiated once, got a second derivative"):
        gradient.sum().backward()


def test_rotations_are_differentiable_twice():
    x = torch.randn(1, 2, 4, requires_grad=True, dtype=torch.float64)
    angles = torch.randn(2, 2, dtype=torch.float64).repeat(1, 2)

    def turned(x):
        return rotary(x, x, angles.cos(), angles.sin())[0]

    assert torch.autograd.gradgradcheck(turned, (x,))
