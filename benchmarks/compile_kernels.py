"""Compiles Triton kernels for GPUs that need not be there.

A script, because kernels of a process that runs Triton's interpreter cannot be compiled. Tests start it by
the fixture `compile_kernels`. It reads a JSON list of cases from its standard input and prints a JSON list
with one record for each case and architecture. A case has

    module, kernel  where the `@triton.jit` function is
    signature       a list of [argument, type] in the function's order: "*bf16", "*i64", "i32", "fp32", ...,
                    or "constexpr"
    constexprs      values of the arguments of type "constexpr" (None for a pointer that is not given; the
                    name of a type for one)
    divisible       arguments that are multiples of 16, pointers included: what a launch finds out by itself
    num_warps, num_stages
                    optional, as at a launch
    architectures   optional, those it is for: 80 (A100), 90 (H100), 100 (B200); default: all three

and a record the case's kernel, `arch`, `cubin_bytes`, `shared` (bytes), `row_warps` (the most warps that a
product puts one below the other, each on 16 rows or more; 0 where warps do not make the products), and from
the machine code `registers`, `stack` and `local` (bytes a thread; not 0 where registers were spilled).
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import triton
import triton.language
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from softprompt.files import write_text

ARCHITECTURES = (80, 90, 100)
_RESULTS = Path(__file__).parent / "results" / "compile"
_DIVISIBLE_BY_16 = [["tt.divisibility", 16]]
_TYPES = {"fp32": triton.language.float32}
_ROW_WARPS = re.compile(r"#ttg\.nvidia_mma<\{[^}]*warpsPerCTA = \[(\d+), \d+\]")
_RESOURCES = {"registers": "REG", "stack": "STACK", "local": "LOCAL"}


def compile_case(case: dict[str, Any], arch: int) -> dict[str, Any]:
    """The record of one case for one architecture."""
    kernel = getattr(importlib.import_module(case["module"]), case["kernel"])
    names = [name for name, _ in case["signature"]]
    if names != kernel.arg_names:
        raise ValueError(f"{case['kernel']} takes {kernel.arg_names}, the signature has {names}")
    source = ASTSource(
        fn=kernel,
        signature=dict(case["signature"]),
        constexprs={name: _TYPES.get(value, value) for name, value in case["constexprs"].items()},
        attrs={(names.index(name),): _DIVISIBLE_BY_16 for name in case.get("divisible", ())},
    )
    options = {name: case[name] for name in ("num_warps", "num_stages") if name in case}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    cubin = compiled.asm["cubin"]
    return {
        "label": case.get("label", case["kernel"]),
        "kernel": case["kernel"],
        "arch": arch,
        "cubin_bytes": len(cubin),
        "shared": compiled.metadata.shared,
        "row_warps": max((int(warps) for warps in _ROW_WARPS.findall(compiled.asm["ttgir"])), default=0),
        **resource_usage(cubin),
    }


def compile_cases(cases: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records of all cases, each for its architectures."""
    return [compile_case(case, arch) for case in cases for arch in architectures_of(case)]


def architectures_of(case: dict[str, Any]) -> Sequence[int]:
    """Those that a case is for."""
    return case.get("architectures", ARCHITECTURES)


def resource_usage(cubin: bytes) -> dict[str, int]:
    """Registers and local memory of the machine code, from the `cuobjdump` that Triton brings."""
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not cuobjdump.exists():
        return {}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(cuobjdump), "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(re.search(rf"{key}:(\d+)", text)[1]) for name, key in _RESOURCES.items()}


def write_records(cases: Sequence[dict[str, Any]], of: str = "") -> None:
    """Compiles cases, and writes `triton-<version><of>.json`, whole after each; reads the command line."""
    parser = argparse.ArgumentParser(description="Compile kernels for GPUs that need not be there.")
    known = sorted({arch for case in cases for arch in architectures_of(case)})
    parser.add_argument(
        "--architectures", type=int, nargs="+", choices=known, default=known, metavar="N", help=f"of {known}"
    )
    parser.add_argument("--most", type=int, metavar="N", help="kernels (default: all)")
    parser.add_argument("--output", type=Path, default=_RESULTS, metavar="FOLDER", help="where records go")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / f"triton-{triton.__version__}{of}.json"
    jobs = [(case, arch) for case in cases for arch in architectures_of(case) if arch in args.architectures]
    lines: list[str] = []
    for case, arch in jobs[: args.most]:
        record = compile_case(case, arch)
        lines.append(" " + json.dumps(record))
        write_text(path, "[\n" + ",\n".join(lines) + "\n]\n")
        spilled = record["local"] + record["stack"]
        print(
            f"{record['label']:44} sm_{record['arch']:<3} {record['registers']:3} registers, "
            f"{spilled:4} bytes spilled, {record['shared']:6} bytes shared"
        )
    print(path)


def main() -> None:
    """Compiles the cases of the standard input."""
    cases = json.load(sys.stdin)
    json.dump(compile_cases(cases), sys.stdout)


if __name__ == "__main__":
    main()
