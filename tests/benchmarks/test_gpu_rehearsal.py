"""What a GPU pass does, at toy sizes on the CPU, so that a GPU pass does not fail on a typo."""

import json
import re

import pytest

from benchmarks import rehearsal, tune
from benchmarks.__main__ import main
from benchmarks.cases import CASES, GENERATE, SUITES
from benchmarks.kernels.cases import KERNEL_CASES
from benchmarks.profiling import as_text
from benchmarks.report import BEGIN, END
from benchmarks.variants import GPU_VARIANTS

# Every op at one size; the others differ in numbers only.
KERNELS = [
    "attention-article-both",
    "attention-math-forward",
    "embed-article",
    "layout-article",
    "prepend-article",
    "head-bloom-560m-8",
]
# Why a variant may be missing where there is no GPU; Triton's interpreter does not run every peer's kernels.
EXPECTED = re.compile(
    r"is not installed$|^not built$|^ALiBi needs|does not support backward on CPU|has no chunked|"
    r"^InterpreterError: "
)
pytestmark = [pytest.mark.slow(seconds=240), pytest.mark.skipif(rehearsal.has_gpu(), reason="there is a GPU")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """All records of a rehearsal, and the pages rendered from them."""
    folder = tmp_path_factory.mktemp("rehearsal")
    for page in ("README.md", "benchmarks.md"):
        (folder / page).write_text(f"before\n{BEGIN}\n{END}\nafter\n")
    common = ["--tiny", "--output", str(folder)]
    try:
        assert main(["run", "--suite", "gpu", "--rounds", "1", *common]) == 0
        assert main(["run", "--cases", *KERNELS, "--rounds", "1", *common]) == 0
        assert main(["run", "--profile", "gpu-article", *common]) == 0
        assert main(["tune", "--cases", "attention-8b-both", "--most", "2", *common]) == 0
        pages = ["--readme", str(folder / "README.md"), "--docs", str(folder / "benchmarks.md")]
        assert main(["report", "--results", str(folder), *pages]) == 0
    finally:
        rehearsal.stop_rehearsing()
    return folder


def _record(folder, kind):
    (found,) = [
        record for path in folder.glob("*/*.json") if kind in (record := json.loads(path.read_text()))
    ]
    return found


def test_every_case_and_variant_runs_or_says_why_not(folder):
    cases = {case["name"]: case for case in _record(folder, "cases")["cases"]}
    assert list(cases) == list(SUITES["gpu"])
    for name, case in cases.items():
        assert case["reason"] is None
        serving = [variant.name for variant in GPU_VARIANTS if CASES[name].kind in variant.kinds]
        assert [variant["name"] for variant in case["variants"]] == serving
        for variant in case["variants"]:
            if variant["reason"] is None:
                assert variant["check"]["passed"]
                assert variant["time"]["p50"] > 0
                assert (CASES[name].kind == GENERATE) == ("prefill" in variant)
            else:
                assert EXPECTED.search(variant["reason"]), (name, variant["name"], variant["reason"])
                assert variant["time"] is None
        timed = {variant["name"] for variant in case["variants"] if variant["time"]}
        assert "peft" in timed
        assert "softprompt eager" in timed
        assert CASES[name].kind == GENERATE or "softprompt graph" in timed


def test_every_kernel_runs_or_says_why_not(folder):
    cases = {case["name"]: case for case in _record(folder, "kernels")["kernels"]}
    assert sorted(cases) == sorted(KERNELS)
    for name, case in cases.items():
        assert case["reason"] is None
        assert case["floor_seconds"] > 0
        for variant in case["variants"]:
            if variant["reason"] is None:
                assert variant["passed"], (name, variant)
                assert variant["time"]["p50"] > 0
            else:
                assert EXPECTED.search(variant["reason"]), (name, variant["name"], variant["reason"])
        assert {"triton", "reference"} <= {v["name"] for v in case["variants"] if v["time"]}


def test_the_profile_names_operations_and_the_sweep_its_configurations(folder):
    (record,) = json.loads(next(folder.glob("*/profile.json")).read_text())["profile"]
    assert record["case"] == "gpu-article"
    by_name = {variant["name"]: variant for variant in record["variants"]}
    assert {"peft", "softprompt eager", "softprompt graph"} <= set(by_name)
    operations = {row["name"] for row in by_name["peft"]["cpu"]}
    assert "aten::addmm" in operations or "aten::mm" in operations
    text = as_text(by_name["softprompt graph"])
    assert text.startswith("softprompt graph\n")
    assert "CPU, own time:" in text
    sweep = json.loads(next(folder.glob("*/tune.json")).read_text())["tune"]
    assert [entry["kernel"] for entry in sweep] == ["forward", "query", "key", "prompt"]
    for entry in sweep:
        assert len(entry["results"]) == 2
        assert any(row["default"] and row["time"] for row in entry["results"])


def test_the_pages_have_all_cases_and_no_target_of_a_toy(folder):
    readme, docs = (folder / name for name in ("README.md", "benchmarks.md"))
    for name in (*SUITES["gpu"], *KERNELS):
        assert f"| {name} |" in docs.read_text()
    for name in SUITES["gpu"]:
        assert f"| {name} |" in readme.read_text()
    toys, _, real = docs.read_text().partition("### GPU")
    assert "met" not in re.findall(r"\| (met|missed) \|", toys)
    assert "not measured" in real
    for picture in ("time", "memory", "kernels"):
        path = next(folder.glob(f"*/{picture}.png"))
        assert path.read_bytes().startswith(b"\x89PNG")
        assert f"({path.relative_to(folder).as_posix()})" in docs.read_text()


def test_the_short_table_fits_a_screen(folder, capsys):
    assert main(["short", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 30
    assert all(any(line.startswith(name) for line in lines) for name in SUITES["gpu"])
    assert any(line.startswith("attention-article") for line in lines)


def test_without_a_gpu_a_real_pass_is_refused(capsys):
    assert main(["run", "--suite", "gpu"]) == 2
    assert "need a CUDA device" in capsys.readouterr().err
    assert main(["run", "--cases", "8b", "embed-article"]) == 2
    assert "run apart" in capsys.readouterr().err


def test_a_sweep_that_is_stopped_leaves_what_it_measured(monkeypatch, tmp_path):
    kinds = iter(("forward", "query"))

    def sweep(*arguments):
        kind = next(kinds, None)
        if kind is None:
            raise RuntimeError("stopped")
        return {"kernel": kind, "reason": "nothing is timed here", "results": []}

    monkeypatch.setattr(tune, "_sweep", sweep)
    try:
        with pytest.raises(RuntimeError, match="stopped"):
            main(["tune", "--tiny", "--cases", "attention-8b-both", "--output", str(tmp_path)])
    finally:
        rehearsal.stop_rehearsing()
    (path,) = tmp_path.glob("*/*")
    assert path.name == "tune.json"
    assert [entry["kernel"] for entry in json.loads(path.read_text())["tune"]] == ["forward", "query"]


def test_every_kernel_case_has_a_toy_of_its_own_kind():
    for case in KERNEL_CASES.values():
        assert type(case.toy) is type(case.sizes)
