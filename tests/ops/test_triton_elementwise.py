"""The Triton kernels of `rms_norm`, `glu` and `rotary` as a GPU gets them."""

import pytest

pytest.importorskip("triton")

from benchmarks.elementwise_kernels import all_cases, gate_case, norm_case, rotary_case
from softprompt.ops import triton_elementwise as kernels

CASES = [
    norm_case("_rms_norm", 128, "bf16"),
    norm_case("_rms_norm", 16384, "bf16"),
    norm_case("_rms_norm_backward", 16384, "bf16"),
    norm_case("_rms_norm_backward", 20480, "fp32"),
    gate_case("_glu", 11008, "bf16", "silu"),
    gate_case("_glu_backward", 9216, "fp32", "gelu_tanh"),
    rotary_case(128, 128, "bf16"),
    rotary_case(256, 64, "bf16", interleaved=True, transposed=True),
]


@pytest.mark.slow
def test_the_kernels_compile_for_three_generations_of_gpus_without_spilling(compile_kernels):
    records = compile_kernels(CASES)
    assert [record["arch"] for record in records] == [80, 90, 100] * len(CASES)
    for record in records:
        assert record["cubin_bytes"] > 0
        assert (record["stack"], record["local"]) == (0, 0), record
        # A multiprocessor has as many for each of 1,024 threads; of rows read in blocks a program has 256.
        assert record["registers"] <= (64 if "20480" not in record["label"] else 96), record


def test_every_kernel_is_among_those_that_are_recorded():
    launched = {name for name in vars(kernels) if hasattr(getattr(kernels, name), "arg_names")}
    called_by_others = {"_load", "_load_scale", "_load_pairs", "_sigmoid_and_derivative", "_rotate_heads"}
    assert {case["kernel"] for case in all_cases()} == launched - called_by_others


def test_a_tile_of_heads_is_4_kib_of_some_tokens():
    tiles = {width: kernels.rotary_tile(width, width, 2) for width in (64, 80, 128, 256, 1024)}
    assert {width: (tile["TOKENS"], tile["PAIRS"]) for width, tile in tiles.items()} == {
        64: (8, 32),
        80: (4, 64),
        128: (4, 64),
        256: (2, 128),
        1024: (1, 512),
    }
    assert kernels.rotary_tile(80, 32, 2) == {"TOKENS": 8, "HEADS": 4, "PAIRS": 16, "REST": 64}
