"""Changes of a language model that touch no weight; each gives other numbers."""

import torch
from torch import nn
from transformers.models.llama import modeling_llama


def variance(model):
    model.model.layers[0].input_layernorm.variance_epsilon = 1.0


def scaling(model):
    model.model.layers[0].self_attn.scaling *= 3.0


def activation(model):
    model.model.layers[0].mlp.act_fn = nn.Tanh()


def activation_function(model):
    mlp = model.model.layers[0].mlp
    del mlp.act_fn
    mlp.act_fn = torch.sin


def rotary_scaling(model):
    model.model.rotary_emb.attention_scaling = 1.7


def norm_left_out(model):
    model.model.layers[0].input_layernorm = nn.Identity()


def layers_exchanged(model):
    layers = model.model.layers
    layers[0], layers[1] = layers[1], layers[0]


def forward_of_a_module(model):
    mlp = model.model.layers[0].mlp
    stock = mlp.forward
    mlp.forward = lambda x: 2 * stock(x)


def head_count(model):
    """Each head of the queries reads the keys of another group."""
    attention = model.model.layers[0].self_attn
    weights = attention.k_proj.weight.unflatten(0, (2, -1)).flip(0).flatten(0, 1)
    attention.k_proj = nn.Linear(*reversed(weights.shape), bias=False, dtype=weights.dtype)
    attention.k_proj.weight = nn.Parameter(weights.clone(), requires_grad=False)


ON_INSTANCES = [
    variance,
    scaling,
    activation,
    activation_function,
    rotary_scaling,
    norm_left_out,
    layers_exchanged,
    forward_of_a_module,
    head_count,
]


def class_forward(patch):
    stock = modeling_llama.LlamaMLP.forward
    patch(modeling_llama.LlamaMLP, "forward", lambda self, x: 2 * stock(self, x))


def function_of_a_file(patch):
    stock = modeling_llama.apply_rotary_pos_emb
    patch(modeling_llama, "apply_rotary_pos_emb", lambda q, k, *rest: stock(2 * q, 3 * k, *rest))


def function_of_torch(patch):
    stock = nn.functional.silu
    patch(nn.functional, "silu", lambda x, *args, **kwargs: 2 * stock(x, *args, **kwargs))


ON_CODE = [class_forward, function_of_a_file, function_of_torch]


# Of a module of the user's own: it adds a vector that it keeps in some way.
SCALE = {"factor": 0.0}
STRENGTH = 0.0


class Steering(nn.Module):
    """An MLP that adds a vector; its settings lie wherever a user may put them."""

    factor = 0.0

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.vector = torch.linspace(-1, 1, 48, dtype=torch.float64)
        self.plain, self.listed, self.nested = 0.0, [0.0], {"a": {"b": [0.0]}}
        self.vectors = [0 * self.vector]
        held = [0.0]
        self.closed, self.held = (lambda: held[0]), held

    def forward(self, x):
        factor = self.plain + self.listed[0] + self.nested["a"]["b"][0] + self.closed()
        factor = factor + SCALE["factor"] + STRENGTH + self.factor
        return self.inner(x) + factor * self.vector + self.vectors[0]


def steer(model):
    """Puts one into the first layer."""
    layer = model.model.layers[0]
    layer.mlp = Steering(layer.mlp)


def steering_of(model):
    return model.model.layers[0].mlp


def plain(model, patch):
    steering_of(model).plain = 2.0


def listed(model, patch):
    steering_of(model).listed[0] = 2.0


def nested(model, patch):
    steering_of(model).nested["a"]["b"][0] = 2.0


def closed(model, patch):
    steering_of(model).held[0] = 2.0


def vector(model, patch):
    steering_of(model).vectors[0] = 2 * steering_of(model).vector


def of_the_class(model, patch):
    patch(Steering, "factor", 2.0)


def named_in_the_file(model, patch):
    patch(__import__(__name__), "STRENGTH", 2.0)


def in_a_dictionary(model, patch):
    patch.__self__.setitem(SCALE, "factor", 2.0)


STEERING = [
    plain,
    listed,
    nested,
    closed,
    vector,
    of_the_class,
    named_in_the_file,
    in_a_dictionary,
]
