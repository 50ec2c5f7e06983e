"""The attention kernels as cases for `compile_kernels`, launched as a training step launches them.

`python -m benchmarks.attention_kernels` compiles them for three generations of GPUs, which need not be there,
and records registers, spills and shared memory.
"""

from __future__ import annotations

import importlib
from typing import Any

from softprompt.ops.shared_prompt_attention.configs import launch_config, padded_dim

ARCHITECTURES = (80, 90, 100)
_FOLDER = "softprompt.ops.shared_prompt_attention."
KERNELS = {
    "forward": (_FOLDER + "triton_forward", "attention_forward"),
    "query": (_FOLDER + "triton_query_grad", "attention_backward_query"),
    "prompt": (_FOLDER + "triton_key_grad", "attention_backward_key"),
    "key": (_FOLDER + "triton_key_grad", "attention_backward_key"),
}
_INDICES = ("query_position", "positions", "key_position", "segments", "prefix_id", "cu_prompts", "cu_texts")
_SUMS = ("lse", "delta", "partial_key", "partial_value")
_UNIT_STRIDES = ("query_stride", "key_stride", "value_stride", "grad_out_stride")


def attention_case(
    kind: str,
    head_dim: int,
    dtype: str,
    arch: int,
    *,
    value_dim: int | None = None,
    alibi: bool = False,
    window: bool = False,
    softcap: bool = False,
    many_prompts: bool = False,
) -> dict[str, Any]:
    """One kernel at one shape and for one architecture: `dtype` is "bf16", "fp16" or "fp32"."""
    module, name = KERNELS[kind]
    value_dim = value_dim or head_dim
    config = launch_config(kind, max(head_dim, value_dim), 4 if dtype == "fp32" else 2, arch)
    constexprs: dict[str, Any] = {
        "HAS_WINDOW": window,
        "HAS_SOFTCAP": softcap,
        "QUERIES": config.queries,
        "KEYS": config.keys,
        "HEAD": padded_dim(head_dim),
        "VALUE": padded_dim(value_dim),
        "ACCUMULATOR": "fp32",
        "PRECISION": "ieee",
        "OF_PROMPTS": kind == "prompt",
        "MANY_PROMPTS": many_prompts,
        "sinks_ptr": None,
        **dict.fromkeys(_UNIT_STRIDES, 1),
        **({} if alibi else {"slopes_ptr": None}),
    }
    arguments = getattr(importlib.import_module(module), name).arg_names
    signature, divisible = [], []
    for argument in arguments:
        tensor = argument.removesuffix("_ptr")
        if argument in constexprs:
            kind_of = "constexpr"
        elif argument in ("scale", "softcap"):
            kind_of = "fp32"
        elif tensor == argument:
            kind_of = "i32"
            if "stride" in argument or argument in ("head_dim", "value_dim"):
                divisible.append(argument)
        else:
            kind_of = "*" + (
                "i32" if tensor in _INDICES else "fp32" if tensor in (*_SUMS, "slopes") else dtype
            )
            divisible.append(argument)
        signature.append([argument, kind_of])
    return {
        "label": f"{kind}, {dtype}, head dim {head_dim}"
        + (f" and {value_dim}" if value_dim != head_dim else "")
        + "".join(
            f", {word}"
            for word, on in (
                ("alibi", alibi),
                ("window", window),
                ("softcap", softcap),
                ("many prompts", many_prompts),
            )
            if on
        ),
        "module": module,
        "kernel": name,
        "signature": signature,
        "constexprs": {name: value for name, value in constexprs.items() if name in arguments},
        "divisible": divisible,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "architectures": [arch],
    }


def all_cases() -> list[dict[str, Any]]:
    """Every kernel at the head dims and with the options that models have."""
    shapes: list[tuple[str, int, str, dict[str, Any]]] = []
    for kind in KERNELS:
        shapes += [(kind, width, "bf16", {}) for width in (32, 64, 80, 96, 128, 256)]
        shapes += [(kind, width, "fp32", {}) for width in (64, 128)]
        shapes.append((kind, 192, "bf16", {"value_dim": 128}))
        shapes.append((kind, 64, "bf16", {"alibi": True}))
        shapes.append((kind, 128, "bf16", {"window": True}))
        shapes.append((kind, 256, "bf16", {"window": True, "softcap": True}))
    shapes += [("prompt", width, "bf16", {"many_prompts": True}) for width in (64, 128)]
    return [
        attention_case(kind, width, dtype, arch, **options)
        for kind, width, dtype, options in shapes
        for arch in ARCHITECTURES
    ]


def main() -> None:
    """Compiles all of them and writes `results/compile/triton-<version>.json`."""
    from benchmarks.compile_kernels import write_records

    write_records(all_cases())


if __name__ == "__main__":
    main()
