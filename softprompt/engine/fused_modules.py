"""RMSNorms, gated MLPs and rotary embeddings that run as one op each, in a packed call.

Models write these out as up to ten elementwise operations, each with a pass over memory and a launch. They
are found by structure (`find`), and each is taken only where a probe of that very module gives the op's
numbers. For the duration of a packed call such a module gets a class that is its own but for `forward`; see
`attention_modules.py`. Hooks of the module run as ever. A trained weight, an unusual dtype, other arguments
and a compiler, which fuses by itself, leave a call to the module's own forward.
"""

from __future__ import annotations

import functools
import types
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from softprompt.engine import attention_modules
from softprompt.engine.attention import attention_backend, current
from softprompt.engine.attention_modules import Forward
from softprompt.engine.model_spec import is_foreign
from softprompt.engine.overrides import Fusion, is_hooked
from softprompt.engine.structure import structure_of
from softprompt.ops.glu import ACTIVATIONS, glu
from softprompt.ops.rms_norm import rms_norm
from softprompt.ops.rotary import rotary

_FP32: Any = {"dtype": torch.float32, "device": "cpu"}  # of probes, whatever the process has chosen
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # fp64 models compute these in fp32
_PLAIN = (Tensor, nn.Parameter)
_EPSILONS = ("variance_epsilon", "eps", "epsilon")
_ACTIVATIONS = ("act_fn", "activation_fn", "act")
_ROTATE = "apply_rotary_pos_emb"
_ANSWERED = {family.attention for family in attention_modules.FAMILIES.values()}
_EXACT = 1e-5  # largest relative difference of a probe in fp32; in 16 bits four times the rounding


def find(body: nn.Module) -> Fusion:
    """What of a decoder can be fused; runs each candidate on a few rows."""
    weight = next(body.parameters(), None)
    if weight is not None and weight.dtype not in _DTYPES:
        return Fusion(left=(f"modules in {str(weight.dtype).removeprefix('torch.')} run as they are",))
    classes: list[tuple[int, type, type]] = []
    counts: Counter[tuple[str, str]] = Counter()
    left: dict[str, None] = {}
    with torch.no_grad():
        for place, module in enumerate(structure_of(body)[1]):
            kind: Any = type(module)
            for op, forward_of in _CANDIDATES.items():
                try:
                    forward = forward_of(module) if attention_modules.name_of_forward(kind) else None
                except _LeftError as reason:
                    left[f"{kind.__name__}: {reason}"] = None
                    continue
                if forward is not None:
                    classes.append((place, kind, attention_modules.answering(kind, forward)))
                    counts[kind.__name__, op] += 1
    return Fusion(tuple(classes), tuple((*names, count) for names, count in counts.items()), tuple(left))


class _LeftError(Exception):
    """Why a module that looks like a candidate is left alone."""


def _backend(device: torch.device) -> str:
    return attention_backend(current().backend, device)


def _agree(got: Tensor, expected: Tensor) -> bool:
    """Whether a probe gave the numbers that are wanted, each row for itself."""
    if got.shape != expected.shape or got.dtype != expected.dtype:
        return False
    bound = _EXACT if expected.dtype == torch.float32 else 4 * torch.finfo(expected.dtype).eps
    wide = expected.double()
    return bool(((got.double() - wide).norm(dim=-1) <= bound * wide.norm(dim=-1)).all())


def _normal(*shape: int, like: Tensor, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    made = torch.randn(shape, generator=generator, **_FP32)
    return made.to(like.device, like.dtype)


def _plain_weight(module: nn.Module) -> Tensor | None:
    weight = module._parameters.get("weight")
    is_plain = type(weight) is nn.Parameter and weight.dtype in _DTYPES and weight.device.type != "meta"
    return weight if is_plain else None


# ---------------------------------------------------------------------------------------------------- norms
def _norm_forward(module: nn.Module) -> Forward | None:
    """The forward of an RMSNorm, None for what has not its parts."""
    weight = module._parameters.get("weight")
    eps = [name for name in _EPSILONS if isinstance(getattr(module, name, None), float)]
    if len(module._parameters) != 1 or weight is None or weight.ndim != 1 or not eps or module._modules:
        return None
    plain = _plain_weight(module)
    if plain is None:
        raise _LeftError(f"its weight is a {type(weight).__name__} in {weight.dtype}")
    sizes = plain.new_tensor([1e-3, 1.0, 30.0])[:, None]
    x = _normal(3, plain.shape[0], like=plain) * sizes
    expected = _own(type(module), module, x[None])[0]
    for offset in (0.0, 1.0):
        if _agree(rms_norm(x, plain.detach(), eps=getattr(module, eps[0]), offset=offset), expected):
            return _rms_norm(eps[0], offset)
    raise _LeftError("it normalises otherwise than rms_norm")


@functools.cache
def _rms_norm(eps: str, offset: float) -> Forward:
    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        weight = self.weight
        takes_other = args or kwargs or weight.requires_grad or not _is_served(hidden_states, weight)
        if takes_other or is_compiling():
            return super(type(self), self).forward(hidden_states, *args, **kwargs)
        return rms_norm(
            hidden_states,
            weight,
            eps=getattr(self, eps),
            offset=offset,
            backend=_backend(hidden_states.device),
        )

    return forward


def _is_served(*tensors: Tensor) -> bool:
    """Whether an op takes these, in the dtype that the module would give too."""
    dtype, device = tensors[0].dtype, tensors[0].device
    return dtype in _DTYPES and all(
        type(tensor) in _PLAIN and tensor.dtype == dtype and tensor.device == device for tensor in tensors
    )


def _own(kind: Any, module: Any, *arguments: Any) -> Any:
    """What the forward of a class gives.

    Raises:
        _LeftError: it fails.
    """
    try:
        return kind.forward(module, *arguments)
    except _LeftError:
        raise
    except Exception as error:
        raise _LeftError(f"it cannot be tried: {type(error).__name__}: {error}") from error


# ----------------------------------------------------------------------------------------------------- MLPs
class _StandIn:
    """An MLP of an activation and of other projections, so that their weights are not read."""

    def __init__(self, **parts: Callable[[Tensor], Tensor]) -> None:
        self.__dict__.update(parts)

    def __getattr__(self, name: str) -> Any:
        # With that it may do more than a probe shows: dropout, a limit.
        raise _LeftError(f"its forward uses {name}")


def _mlp_forward(module: nn.Module) -> Forward | None:
    """The forward of an MLP with a gate, None for what has not its parts."""
    names = set(module._modules)
    merged = "gate_up_proj" in names
    activations = [name for name in _ACTIVATIONS if name in names]
    if not activations or "down_proj" not in names or not (merged or {"gate_proj", "up_proj"} <= names):
        return None
    name = activations[0]
    act: Any = module._modules[name]
    if is_foreign(type(act).forward) or next(act.parameters(), None) is not None:
        raise _LeftError(f"its activation, a {type(act).__name__}, has weights or code of its own")
    numbers = torch.linspace(-8, 8, 33, **_FP32)
    gate, up = numbers.repeat(2, 1), torch.stack([numbers.flip(0), 1 + numbers.square()])
    parts: dict[str, Callable[[Tensor], Tensor]] = {name: act, "down_proj": lambda x: x}
    if merged:
        parts["gate_up_proj"] = lambda x: torch.cat([gate, up], 1)
    else:
        parts |= {"gate_proj": lambda x: gate, "up_proj": lambda x: up}
    got = _own(type(module), _StandIn(**parts), torch.ones(2, 1, **_FP32))
    for activation in ACTIVATIONS:
        if isinstance(got, Tensor) and _agree(glu(gate, up, activation=activation, backend="reference"), got):
            return _glu(name, activation, merged)
    raise _LeftError(f"its activation or its product is none of {', '.join(ACTIVATIONS)}")


@functools.cache
def _glu(activation_name: str, activation: str, merged: bool) -> Forward:
    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        act = getattr(self, activation_name)
        if args or kwargs or is_compiling() or "forward" in vars(act) or is_hooked(act):
            return super(type(self), self).forward(x, *args, **kwargs)
        if merged:
            gate, up = self.gate_up_proj(x).chunk(2, -1)
        else:
            gate, up = self.gate_proj(x), self.up_proj(x)
        if not _is_served(gate, up):
            return self.down_proj(act(gate) * up)
        return self.down_proj(glu(gate, up, activation=activation, backend=_backend(gate.device)))

    return forward


# --------------------------------------------------------------------------------------------------- rotary
def _attention_forward(module: nn.Module) -> Forward | None:
    """The forward of an attention module with the op in place of its file's `apply_rotary_pos_emb`."""
    own = type(module).forward
    if not isinstance(own, types.FunctionType) or _ROTATE not in own.__code__.co_names:
        return None
    if attention_modules.name_of_forward(type(module)) in _ANSWERED:
        return None
    rotate = own.__globals__.get(_ROTATE)
    if not isinstance(rotate, types.FunctionType) or is_foreign(rotate):
        raise _LeftError(f"{_ROTATE} was replaced")
    return _attention(own, rotate, *_kind_of_rotation(rotate))


@functools.cache
def _attention(
    own: types.FunctionType, rotate: types.FunctionType, interleaved: bool, partial: bool
) -> Forward:
    fused = _rotating(rotate, interleaved, partial)
    names = dict(own.__globals__)
    copy = types.FunctionType(own.__code__, names, own.__name__, own.__defaults__, own.__closure__)
    copy.__kwdefaults__ = own.__kwdefaults__

    @functools.wraps(own)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if is_compiling():
            return own(self, *args, **kwargs)
        names.update(own.__globals__)  # any of them may have been exchanged
        if names.get(_ROTATE) is rotate:
            names[_ROTATE] = fused
        return copy(self, *args, **kwargs)

    return forward


def _kind_of_rotation(rotate: Callable[..., Any]) -> tuple[bool, bool]:
    """Whether a function's pairs are interleaved, and whether it leaves the end of longer heads alone.

    Raises:
        _LeftError: it is no rotation of these.
    """
    like = torch.empty(0, **_FP32)
    query, key = _normal(1, 3, 4, 8, like=like), _normal(1, 2, 4, 8, like=like, seed=1)

    def agrees(rotated: int, interleaved: bool) -> bool:
        cos = _normal(1, 4, rotated, like=like, seed=2)
        sin = _normal(1, 4, rotated, like=like, seed=3)
        try:
            got = rotate(query, key, cos, sin)
        except Exception as error:
            raise _LeftError(f"{_ROTATE} cannot be tried: {type(error).__name__}: {error}") from error
        wanted = rotary(query[0], key[0], cos[0], sin[0], interleaved=interleaved, backend="reference")
        return all(_agree(one[0], other) for one, other in zip(got, wanted, strict=True))

    for interleaved in (False, True):
        if agrees(8, interleaved):
            try:
                return interleaved, agrees(4, interleaved)
            except _LeftError:
                return interleaved, False
    raise _LeftError(f"{_ROTATE} rotates otherwise than rotary")


def _rotating(own: Callable[..., Any], interleaved: bool, partial: bool) -> Callable[..., Any]:
    @functools.wraps(own)
    def rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
        if (
            args
            or kwargs
            or query.ndim != 4
            or query.shape[0] != 1
            or cos.shape[:2] != (1, query.shape[2])
            or not (partial or cos.shape[2] == query.shape[3])
            or not _is_served(query, key, cos, sin)
        ):
            return own(query, key, cos, sin, *args, **kwargs)
        turned = rotary(
            query.squeeze(0),
            key.squeeze(0),
            cos.squeeze(0),
            sin.squeeze(0),
            interleaved=interleaved,
            backend=_backend(query.device),
        )
        return turned[0][None], turned[1][None]

    return rotate


_CANDIDATES: dict[str, Callable[[nn.Module], Forward | None]] = {
    "rms_norm": _norm_forward,
    "glu": _mlp_forward,
    "rotary": _attention_forward,
}


def describe(fusion: Fusion) -> tuple[str, str]:
    """For people: the modules that run as one op, and what looks like one of them and is left alone."""
    return ", ".join(f"{count} x {kind} ({op})" for kind, op, count in fusion.counts), "; ".join(fusion.left)
