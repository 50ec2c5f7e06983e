"""`shared_prompt_attention`: the attention of the packed row."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from softprompt.ops.checks import check_same_device
from softprompt.ops.registry import AUTO, define, native_availability, triton_availability
from softprompt.ops.shared_prompt_attention.configs import LARGEST_HEAD_DIM
from softprompt.ops.shared_prompt_attention.kernels import attend
from softprompt.ops.shared_prompt_attention.layout import AttentionLayout, AttentionOptions
from softprompt.ops.shared_prompt_attention.reference import shared_prompt_attention as reference
from softprompt.ops.shared_prompt_attention.sdpa import shared_prompt_attention as sdpa

BACKENDS = (AUTO, "reference", "sdpa", "triton", "native")
_HALF = (torch.float16, torch.bfloat16)
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Slots and rows are int32 and fewer than this: a wider window hides nothing, and its sums would overflow.
_WIDEST_WINDOW = 1 << 30


def shared_prompt_attention(
    query: Tensor,  # [Hq, T, D]
    key: Tensor,  # [Hkv, T, D]
    value: Tensor,  # [Hkv, T, Dv]
    layout: AttentionLayout,
    *,
    scale: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,  # [Hq]
    sinks: Tensor | None = None,  # [Hq]
    dropout_p: float = 0.0,
    backend: str = AUTO,
) -> Tensor:
    """Attention over `[prompt_1 | ... | prompt_K | text_1 | ... | text_B | dummies]`.

    `out[h, q] = sum_k softmax_k(score[h, q, k]) * value[g, k]` over the tokens k that q sees, with g the key
    head of h and `score = softcap(scale * query[h, q] . key[g, k]) + slope[h] * (position[k] - position[q])`.

    A prompt's token sees its prompt up to itself; a text's token sees the text's prompt and the text up to
    itself, but no predictor (a pad that only predicts; see `pack_layout`), not even where it is one; a token
    of a branch sees no other branch of its text, and the text sees no branch; a dummy sees itself. A token
    that sees nothing, as a predictor may under a sliding window, gets zeros. Keys and values of a prompt
    stand in the row once; their gradient is the sum over all texts, in fp32 or better.

    Args:
        query: [Hq, T, D], any strides; fastest where a token's heads stand together, as models produce them.
            Under `torch.autocast` query, key and value are used in its dtype (fp64 is left alone).
        key: [Hkv, T, D], Hkv a divisor of Hq: query head h reads key head `h // (Hq // Hkv)`.
        value: [Hkv, T, Dv].
        layout: which token is what. Back ends keep on it what all layers of one step share.
        scale: of the scores; default `D ** -0.5`.
        sliding_window: W >= 1: only keys with `query_position[q] - key_position[k] < W` are seen.
        softcap: c > 0: scores become `c * tanh(scores / c)` before any bias (Gemma 2).
        alibi_slopes: [Hq] ALiBi (Press et al. 2022, "Train Short, Test Long"), on `layout.position_ids`. They
            get no gradient; pass one tensor to all layers, so that they share its bias.
        sinks: [Hq] one more logit per head in the softmax's denominator (gpt-oss).
        dropout_p: of the probabilities; "sdpa" only.
        backend: "auto", "reference", "sdpa", "triton" or "native". "auto" is Triton on a GPU and the compiled
            op on a CPU; SDPA where that is not built, under dropout, and on a GPU for fp64, for heads wider
            than 256 and for texts with branches.

    Returns:
        [Hq, T, Dv] in the dtype of value, differentiable once in query, key, value and sinks.

    Raises:
        ValueError: shapes, dtypes, devices or option values that do not fit.
    """
    device = query.device.type
    autocast = torch.is_autocast_enabled(device)
    if autocast:
        wanted = torch.get_autocast_dtype(device)
        query, key, value = (
            tensor if tensor.dtype == torch.float64 else tensor.to(wanted) for tensor in (query, key, value)
        )
    _check_tensors(query, key, value, layout, alibi_slopes, sinks)
    _check_options(scale, sliding_window, softcap, dropout_p, backend)
    scale = query.shape[2] ** -0.5 if scale is None else float(scale)
    options = AttentionOptions(scale, sliding_window, softcap, alibi_slopes, float(dropout_p))
    # Scores, biases and sums keep the dtypes that the back end chose for them.
    with torch.autocast(device, enabled=False) if autocast else contextlib.nullcontext():
        if torch.compiler.is_compiling():
            result: Tensor = _OP(query, key, value, *layout.fields(), *options, sinks, backend)
            return result
        return _run(query, key, value, layout, options, sinks, backend)


def _check_tensors(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: AttentionLayout,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
) -> None:
    rows = layout.num_rows
    for name, tensor, heads in (("query", query, "Hq"), ("key", key, "Hkv"), ("value", value, "Hkv")):
        if tensor.ndim != 3 or tensor.shape[1] != rows:
            raise ValueError(
                f"{name} must be [{heads}, T, D] with the layout's T = {rows}, got {list(tensor.shape)}"
            )
        if tensor.dtype not in _DTYPES or tensor.dtype != query.dtype:
            raise ValueError(
                "query, key and value must have one dtype of fp16, bf16, fp32 and fp64, "
                f"got {query.dtype}, {key.dtype} and {value.dtype}"
            )
    if query.shape[2] != key.shape[2]:
        raise ValueError(f"key must be {query.shape[2]} wide like query, got {key.shape[2]}")
    if value.shape[0] != key.shape[0]:
        raise ValueError(f"value must have {key.shape[0]} heads like key, got {value.shape[0]}")
    if key.shape[0] == 0 or query.shape[0] % key.shape[0] != 0:
        raise ValueError(
            f"the number of key heads must divide the {query.shape[0]} query heads, got {key.shape[0]}"
        )
    for name, vector in (("alibi_slopes", alibi_slopes), ("sinks", sinks)):
        if vector is None:
            continue
        if vector.shape != (query.shape[0],):
            raise ValueError(f"{name} must be [Hq] = [{query.shape[0]}], got {list(vector.shape)}")
        if not vector.is_floating_point():
            raise ValueError(f"{name} must be floating point, got {vector.dtype}")
    if alibi_slopes is not None and alibi_slopes.requires_grad:
        raise ValueError("alibi_slopes get no gradient; pass them detached, got a tensor that requires grad")
    check_same_device(
        "shared_prompt_attention",
        query=query,
        key=key,
        value=value,
        layout=layout.query_position,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        branches=layout.branches,
    )
    if layout.branches is not None and layout.branches.shape != (rows,):
        raise ValueError(f"branches must be [T] = [{rows}], got {list(layout.branches.shape)}")


def _check_options(
    scale: float | None,
    sliding_window: int | None,
    softcap: float | None,
    dropout_p: float,
    backend: str,
) -> None:
    if scale is not None and not -float("inf") < scale < float("inf"):
        raise ValueError(f"scale must be a finite number, got {scale}")
    if sliding_window is not None and sliding_window < 1:
        raise ValueError(f"sliding_window must be at least 1 slot, got {sliding_window}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be above 0, got {softcap}")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p must be at least 0 and below 1, got {dropout_p}")
    if backend not in BACKENDS:
        raise ValueError(
            f"shared_prompt_attention: unknown backend {backend!r}, expected one of {', '.join(BACKENDS)}"
        )
    if dropout_p > 0 and backend in ("reference", "triton", "native"):
        raise ValueError(
            f"{backend!r} takes no dropout, got dropout_p = {dropout_p}; expected 0, or backend='sdpa'"
        )


def triton_obstacle(query: Tensor, value: Tensor, branches: Tensor | None = None) -> str | None:
    """Why the Triton kernels do not serve these tensors, or None."""
    if branches is not None:
        return "the kernels know no branches of texts"
    availability = triton_availability(query.device.type)
    if not availability.usable:
        return availability.reason
    widest = max(query.shape[2], value.shape[2])
    if widest > LARGEST_HEAD_DIM:
        return f"heads are at most {LARGEST_HEAD_DIM} wide, got {widest}"
    if query.dtype == torch.float64 and query.is_cuda:
        return "fp64 is only for the interpreter"
    return None


def usual_backend(device_type: str) -> str:
    """What "auto" takes on a device for tensors that nothing stands against."""
    if device_type == "cuda":
        return "triton" if triton_availability("cuda").usable else "sdpa"
    return "native" if device_type == "cpu" and native_availability("cpu").usable else "sdpa"


def native_obstacle(query: Tensor) -> str | None:
    """Why the compiled op does not serve these tensors, or None."""
    if query.device.type != "cpu":
        return f"the compiled attention is for CPU tensors, got {query.device.type}"
    availability = native_availability("cpu")
    return None if availability.usable else availability.reason


def _chosen(
    query: Tensor, value: Tensor, dropout_p: float, backend: str, branches: Tensor | None = None
) -> str:
    """The back end that serves this call: "reference", "sdpa", "triton" or "native"."""
    if backend == AUTO:
        if dropout_p > 0:
            return "sdpa"
        if query.is_cuda:
            return "triton" if triton_obstacle(query, value, branches) is None else "sdpa"
        return "native" if native_obstacle(query) is None else "sdpa"
    obstacle = None
    if backend == "triton":
        obstacle = triton_obstacle(query, value, branches)
    elif backend == "native":
        obstacle = native_obstacle(query)
    if obstacle is not None:
        raise ValueError(f"shared_prompt_attention: backend={backend!r} cannot be used: {obstacle}")
    return backend


def _run(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: AttentionLayout,
    options: AttentionOptions,
    sinks: Tensor | None,
    backend: str,
) -> Tensor:
    if options.sliding_window is not None and options.sliding_window > _WIDEST_WINDOW:
        options = options._replace(sliding_window=None)
    backend = _chosen(query, value, options.dropout_p, backend, layout.branches)
    if backend == "reference":
        return reference(query, key, value, sinks, layout, options)
    if backend == "sdpa":
        return sdpa(query, key, value, sinks, layout, options)
    dtype = value.dtype
    if backend == "native":
        if dtype in _HALF:
            query, key, value = query.float(), key.float(), value.float()
        sinks = None if sinks is None else sinks.to(query.dtype)
    out: Tensor = attend(query, key, value, sinks, layout, options, backend)[0]
    return out.to(dtype)


def _kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: AttentionLayout,
    options: AttentionOptions,
    sinks: Tensor | None = None,
    backend: str = AUTO,
) -> Tensor:
    scale, window, softcap, alibi_slopes, dropout_p = options
    _check_tensors(query, key, value, layout, alibi_slopes, sinks)
    _check_options(scale, window, softcap, dropout_p, backend)
    return _run(query, key, value, layout, options, sinks, backend)


# The op makes its plans anew at each call; a compiler merges what the layers of one graph have in common.
_OP = define("shared_prompt_attention", _kernel)
