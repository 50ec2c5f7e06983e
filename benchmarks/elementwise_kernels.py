"""The kernels of `rms_norm`, `glu` and `rotary` as cases for `compile_kernels`, at the widths of models.

`python -m benchmarks.elementwise_kernels` compiles them for three generations of GPUs, which need not be
there, and records registers, spills and shared memory.
"""

from __future__ import annotations

from typing import Any

from softprompt.ops import triton_elementwise as kernels

_ITEMSIZES = {"bf16": 2, "fp16": 2, "fp32": 4}


def _case(
    kernel: str, dtype: str, about: str, constexprs: dict[str, Any], num_warps: int = kernels.NUM_WARPS
) -> dict[str, Any]:
    """A launch whose strides are multiples of 16, as of all common models."""
    arguments = getattr(kernels, kernel).arg_names
    signature, divisible = [], []
    for argument in arguments:
        if argument in constexprs:
            kind = "constexpr"
        elif argument.endswith("_ptr"):
            kind = "*fp32" if argument == "inverse_ptr" else f"*{dtype}"
        else:
            kind = "i32"
        if argument not in constexprs and argument.endswith(("_ptr", "_stride")):
            divisible.append(argument)
        signature.append([argument, kind])
    return {
        "label": f"{kernel.removeprefix('_')}, {dtype}, {about}",
        "module": kernels.__name__,
        "kernel": kernel,
        "signature": signature,
        "constexprs": constexprs,
        "divisible": divisible,
        "num_warps": num_warps,
    }


def norm_case(kernel: str, width: int, dtype: str) -> dict[str, Any]:
    """`_rms_norm` or `_rms_norm_backward`: `dtype` is "bf16", "fp16" or "fp32"."""
    rows, columns, num_warps = kernels.norm_tile(width)
    constexprs = {"WIDTH": width, "OFFSET": 0.0, "ROWS": rows, "COLUMNS": columns}
    if kernel == "_rms_norm":
        constexprs["EPS"] = 1e-6
    return _case(kernel, dtype, f"width {width}", constexprs, num_warps)


def gate_case(kernel: str, width: int, dtype: str, activation: str) -> dict[str, Any]:
    """`_glu` or `_glu_backward`."""
    rows, columns = kernels.tile_shape(width, _ITEMSIZES[dtype])
    constexprs = {
        "WIDTH": width,
        "ACTIVATION": ("silu", "gelu_tanh").index(activation),
        "ACC": "fp32",
        "ROWS": rows,
        "COLUMNS": columns,
    }
    return _case(kernel, dtype, f"width {width}, {activation}", constexprs)


def rotary_case(
    width: int, rotated: int, dtype: str, *, interleaved: bool = False, transposed: bool = False
) -> dict[str, Any]:
    """`_rotary` of `rotated` numbers of heads of `width`."""
    about = f"{rotated} of {width}" + ", interleaved" * interleaved + ", gradient" * transposed
    constexprs = {
        "WIDTH": width,
        "ROTATED": rotated,
        "INTERLEAVED": interleaved,
        "TRANSPOSED": transposed,
        "ACC": "fp32",
        **kernels.rotary_tile(width, rotated, _ITEMSIZES[dtype]),
    }
    return _case("_rotary", dtype, about, constexprs)


def all_cases() -> list[dict[str, Any]]:
    """Every kernel at widths that models have: heads, hidden sizes, MLPs; the widest are read in blocks."""
    cases = []
    for kernel in ("_rms_norm", "_rms_norm_backward"):
        cases += [
            norm_case(kernel, width, "bf16") for width in (64, 128, 256, 2048, 3072, 4096, 16384, 20480)
        ]
        cases += [norm_case(kernel, width, "fp32") for width in (128, 576, 4096, 16384)]
    for kernel in ("_glu", "_glu_backward"):
        cases += [gate_case(kernel, width, "bf16", "silu") for width in (1536, 11008, 14336)]
        cases += [gate_case(kernel, 9216, "bf16", "gelu_tanh"), gate_case(kernel, 1536, "fp32", "silu")]
    for transposed in (False, True):
        cases += [
            rotary_case(width, rotated, "bf16", transposed=transposed)
            for width, rotated in ((64, 64), (96, 96), (128, 128), (256, 256), (80, 32))
        ]
        cases.append(rotary_case(256, 64, "bf16", interleaved=True, transposed=transposed))
        cases.append(rotary_case(64, 64, "fp32", transposed=transposed))
    return cases


def main() -> None:
    """Compiles all of them and writes `results/compile/triton-<version>-elementwise.json`."""
    from benchmarks.compile_kernels import write_records

    write_records(all_cases(), "-elementwise")


if __name__ == "__main__":
    main()
