"""Stand-ins for the quantised layers of libraries that want a GPU: their weights and their arithmetic."""

import copy
from types import SimpleNamespace

import torch
from torch import nn
from torch.nn import functional


def _levels(weight, levels):
    """int8 levels of a weight and the scale of each output row."""
    scale = weight.abs().amax(1, keepdim=True).clamp_min(1e-12) / levels
    return (weight / scale).round().clamp(-levels, levels).to(torch.int8), scale


class Params4bit(nn.Parameter):
    """Like bitsandbytes': two weights a byte, [out * in / 2, 1], with what undoes it in `quant_state`."""

    def __new__(cls, data, quant_state=None):
        self = torch.Tensor._make_subclass(cls, data, False)
        self.quant_state = quant_state
        return self

    def __deepcopy__(self, memo):
        return Params4bit(self.data.clone(), copy.deepcopy(self.quant_state, memo))

    def __reduce_ex__(self, protocol):
        return Params4bit, (self.data, self.quant_state)


class Int8Params(nn.Parameter):
    """Like bitsandbytes': [out, in] int8, with the scales of its rows in `SCB`."""

    def __new__(cls, data, SCB=None):
        self = torch.Tensor._make_subclass(cls, data, False)
        self.SCB = SCB
        return self

    def __deepcopy__(self, memo):
        return Int8Params(self.data.clone(), copy.deepcopy(self.SCB, memo))

    def __reduce_ex__(self, protocol):
        return Int8Params, (self.data, self.SCB)


class Linear4bit(nn.Linear):
    """Computes in `compute_dtype`, and answers in the dtype that it was given."""

    def __init__(self, linear, compute_dtype=None):
        super().__init__(1, 1, bias=False, device="meta")
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.compute_dtype = compute_dtype
        levels, scale = _levels(linear.weight.detach(), 7)
        nibbles = (levels + 8).to(torch.uint8).flatten()
        state = SimpleNamespace(scale=scale, shape=linear.weight.shape)
        self.weight = Params4bit((nibbles[::2] * 16 + nibbles[1::2])[:, None], state)
        self.bias = linear.bias

    def forward(self, x):
        dtype = x.dtype if self.compute_dtype is None else self.compute_dtype
        state, packed = self.weight.quant_state, self.weight.data[:, 0]
        levels = torch.stack([packed // 16, packed % 16], 1).view(state.shape).to(state.scale.dtype) - 8
        bias = None if self.bias is None else self.bias.to(dtype)
        return functional.linear(x.to(dtype), (levels * state.scale).to(dtype), bias).to(x.dtype)


class Linear8bitLt(nn.Linear):
    """Rounds each token to int8, but for the columns in which any token of the batch reaches `threshold`."""

    def __init__(self, linear, threshold=0.0):
        super().__init__(1, 1, bias=False, device="meta")
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = Int8Params(*_levels(linear.weight.detach(), 127))
        self.bias = linear.bias
        self.state = SimpleNamespace(threshold=threshold)

    def forward(self, x):
        weight = self.weight.to(x.dtype) * self.weight.SCB.to(x.dtype)
        outlier = torch.zeros(x.shape[-1], dtype=torch.bool)
        if self.state.threshold > 0:
            outlier = (x.detach().abs() >= self.state.threshold).flatten(0, -2).any(0)
        inliers = x.masked_fill(outlier, 0)
        rounded = _rounded(inliers, inliers.detach().abs().amax(-1, keepdim=True))
        return functional.linear(rounded + x * outlier, weight, self.bias)


def _rounded(x, largest):
    """Rounds to 255 levels up to `largest`, with the gradient of no rounding."""
    still, scale = x.detach(), largest.clamp_min(1e-12) / 127
    return x + ((still / scale).round() * scale - still)


class RoundedInput(nn.Linear):
    """A linear layer whose input is rounded with one scale for all of its tokens."""

    def __init__(self, linear):
        super().__init__(1, 1, bias=False, device="meta")
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x):
        return functional.linear(_rounded(x, x.detach().abs().amax()), self.weight, self.bias)


class PerTensor:
    """Like torchao's granularity of one scale."""


class FakeQuantizedLinear(RoundedInput):
    """Like torchao's for training, which says in its configuration that it has one scale for all tokens."""

    def __init__(self, linear):
        super().__init__(linear)
        self.activation_fake_quantizer = nn.Module()
        self.activation_fake_quantizer.config = SimpleNamespace(granularity=PerTensor())


class QuantLinear(nn.Module):
    """Like those of GPTQ and AWQ: buffers, and no weight."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        levels, scale = _levels(linear.weight.detach(), 7)
        self.register_buffer("qweight", levels.t().contiguous().int())
        self.register_buffer("scales", scale.t().contiguous())
        self.bias = linear.bias

    def forward(self, x):
        return functional.linear(x, (self.qweight * self.scales).t().to(x.dtype), self.bias)


def replace_linears(model, make, *, head=False, body=True):
    """Every nn.Linear of a model becomes `make(linear)`, and its head too where that is asked for."""
    own_head = model.get_output_embeddings()
    if body:
        for module in list(model.modules()):
            for name, child in list(module.named_children()):
                if type(child) is nn.Linear and child is not own_head:
                    setattr(module, name, make(child))
    if head:
        model.set_output_embeddings(make(own_head))
    return model


class OneScale(nn.Linear):
    """Rounds all tokens with one scale, and says so nowhere; the gradient passes through."""

    def __init__(self, linear):
        super().__init__(1, 1, bias=False, device="meta")
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x):
        scale = x.detach().abs().amax().clamp_min(1e-12) / 127
        rounded = x + ((x / scale).round() * scale - x).detach()
        return functional.linear(rounded, self.weight, self.bias)
