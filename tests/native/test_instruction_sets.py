"""The 16-bit tests as lesser processors compute them: products differ between instruction sets."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# What oneDNN may use at most, from the least on: the processor's flag that it needs, and ATen's own level.
LEVELS = {
    "AVX": ("avx", "default"),
    "AVX2": ("avx2", "avx2"),
    "AVX2_VNNI_2": ("avx_ne_convert", "avx2"),
    "AVX512_CORE": ("avx512dq", "avx512"),
    "AVX512_CORE_BF16": ("avx512_bf16", "avx512"),
    "AVX512_CORE_FP16": ("avx512_fp16", "avx512"),
    "AVX512_CORE_AMX": ("amx_bf16", "avx512"),
    "AVX512_CORE_AMX_FP16": ("amx_fp16", "avx512"),
}
FILES = (
    "tests/engine/test_unwritten_memory.py",
    "tests/gpu/test_native_engine.py",
    "tests/ops/test_linear_cross_entropy.py",
)
# A product of oneDNN's on every level, which then says what it may use.
RUN = """
import sys, pytest, torch
torch.nn.Conv2d(32, 32, 3)(torch.ones(1, 32, 32, 32))
sys.exit(pytest.main(sys.argv[1:]))
"""


def levels_here():
    """The levels that this processor has; 0 of them where the system does not say."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"^flags\s*:(.*)$", info.read_text() if info.exists() else "", re.MULTILINE)
    flags = found.group(1).split() if found else []
    return [level for level, (flag, _) in LEVELS.items() if flag in flags]


SEEN: dict[str, str] = {}


@pytest.mark.slow(seconds=35)
@pytest.mark.parametrize("level", levels_here())
def test_16_bits_are_right_on_every_level_of_instructions(level):
    environment = {
        **os.environ,
        "ONEDNN_MAX_CPU_ISA": level,
        "ONEDNN_VERBOSE": "1",
        "ATEN_CPU_CAPABILITY": LEVELS[level][1],
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    wanted = "(float16 or bf16 and llama and True) and not (triton or 1001 or gemma2 or mamba)"
    arguments = [*FILES, "-n0", "-q", "--tb=short", "-p", "no:cacheprovider", "-k", wanted]
    done = subprocess.run(
        [sys.executable, "-c", RUN, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    said = "\n".join(line for line in done.stdout.splitlines() if not line.startswith("onednn_verbose"))
    assert done.returncode == 0, said + done.stderr
    assert int(re.search(r"(\d+) passed", said).group(1)) > 50
    SEEN[level] = re.search(r"cpu,isa:(.*)", done.stdout).group(1)
    assert len(set(SEEN.values())) == len(SEEN), f"a level is not held to: {SEEN}"
