"""The report: tables, targets and pictures from the newest records, and nothing that was not measured."""

import copy
import json

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.cases import CASES, SUITES
from benchmarks.kernels.cases import KERNEL_CASES
from benchmarks.profiling import gpu_times
from benchmarks.records import newest_by_case
from benchmarks.report import BEGIN, END, ReportError, report
from benchmarks.run import run, write_record
from benchmarks.short import short_table
from benchmarks.targets import goals_of_case, goals_of_kernel
from benchmarks.variants import VARIANTS, Variant


def _wrong(base, config):
    model = VARIANTS[1].build(base, config)
    model.register_forward_hook(lambda module, arguments, output: output.__setitem__("loss", output.loss * 2))
    return model


@pytest.fixture(scope="module")
def measured():
    """Both CPU cases at toy sizes, with a wrong variant."""
    return run(
        [CASES[name] for name in SUITES["cpu"]],
        variants=(*VARIANTS, Variant("double", "wrong", _wrong)),
        rounds=2,
        tiny=True,
        say=lambda line: None,
    )


@pytest.fixture
def pages(tmp_path):
    paths = tmp_path / "README.md", tmp_path / "docs.md"
    for path in paths:
        path.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    return paths


def _variants(case):
    return {variant["name"]: variant for variant in case["variants"]}


def _timed(name, seconds, ratio=None, own=False, peak=None, **more):
    time = {"seconds": [seconds], "p20": seconds, "p50": seconds, "p80": seconds}
    if ratio is not None:
        time |= {"ratio": ratio, "ratio_of_medians": ratio}
    check = {"loss_difference": 0.0, "gradient_error": 0.0, "passed": True}
    return {
        "name": name,
        "about": "",
        "own": own,
        "check": check,
        "time": time,
        "peak_bytes": peak,
        "reason": None,
        **more,
    }


def _untimed(name, reason):
    return _timed(name, 1.0) | {"check": None, "time": None, "reason": reason}


GPU_CASE = {
    "name": "8b",
    "why": "why",
    "kind": "step",
    "shape": {"name": "Llama"},
    "dtype": "bfloat16",
    "rows": 16,
    "num_virtual_tokens": 100,
    "reason": None,
    "rounds": 7,
    "batch": {"padded_length": 512, "lengths": [9], "labels": 1, "length_source": "declared"},
    "token_limit": 3.0,
    "ceilings": {"flop_per_second": 7e14, "bytes_per_second": 4e12},
    "floor_seconds": 0.2,
    "ratio_to": "peft",
    "truth": {"source": "PEFT in float32", "allowed_loss": 1e-2, "allowed_gradient": 1e-2},
    "targets": {"vs_peft": 2.2, "vs_best_peer": 1.9, "over_floor": 1.35, "share_of_memory": 1 / 3},
    "variants": [
        _timed("peft", 0.66, 1.0, peak=60 * 10**9),
        _timed("peft+chunked", 0.5, 1.32, peak=40 * 10**9),
        _untimed("peft+liger", "out of memory"),
        _timed("softprompt eager", 0.3, 2.2, own=True, peak=19 * 10**9),
        _timed("softprompt graph", 0.25, 2.64, own=True, peak=21 * 10**9),
    ],
}
KERNEL_CASE = {
    "name": "head-llama-8b-8192",
    "op": "linear_cross_entropy",
    "about": "H 4096",
    "reason": None,
    "floor_seconds": 0.02,
    "targets": {"over_floor": 1.2, "microseconds": None, "vs": [["every peer", 1.3]]},
    "variants": [
        _timed("triton", 0.023, own=True, errors=[1e-3], passed=True),
        _timed("reference", 0.05, own=True, errors=[1e-3], passed=True),
        _timed("cce", 0.028, errors=[1e-3], passed=True),
        _timed("torch", 0.06, errors=[1e-3], passed=True),
        _untimed("liger", "out of memory") | {"errors": None, "passed": False},
    ],
}


def _gpu_record(**parts):
    return {
        "date": "2026-12-01T00:00:00+00:00",
        "commit": "abc",
        "device": {"kind": "cuda", "name": "NVIDIA X", "cuda": "13.0", "folder": "nvidia-x"},
        "versions": {"python": "3.12", "torch": "2.11"},
        "tiny": False,
        "dtype": "bfloat16",
        **parts,
    }


def test_targets_are_met_or_missed_by_the_fastest_of_softprompts_variants():
    found = {goal.what: goal for goal in goals_of_case(GPU_CASE, GPU_CASE["targets"])}
    assert {what: (goal.measured, goal.verdict, goal.of) for what, goal in found.items()} == {
        "x PEFT": (2.64, "met", "softprompt graph"),
        "x the fastest other variant": (pytest.approx(2.0), "met", "softprompt graph"),
        "step / floor": (pytest.approx(1.25), "met", "softprompt graph"),
        "peak memory / PEFT's": (pytest.approx(0.35), "missed", "softprompt graph"),
    }


def test_without_peft_no_target_against_it_counts_as_measured():
    case = copy.deepcopy(GPU_CASE)
    case["variants"][0] = _untimed("peft", "out of memory")
    case["ratio_to"] = "peft+chunked"
    for variant, ratio in zip(case["variants"][1:], (1.0, None, 1.5, 2.0), strict=True):
        if ratio is not None:
            variant["time"]["ratio"] = ratio
    found = {goal.what: goal for goal in goals_of_case(case, case["targets"])}
    assert found["x PEFT"].verdict == "not measured"
    assert found["peak memory / PEFT's"].verdict == "not measured"
    assert found["x the fastest other variant"].measured == pytest.approx(2.0)


def test_a_kernel_has_to_beat_the_fastest_peer_and_the_floor():
    goals = goals_of_kernel(KERNEL_CASE, KERNEL_CASE["targets"])
    found = {goal.what: (goal.measured, goal.verdict) for goal in goals}
    assert found == {
        "time / floor": (pytest.approx(1.15), "met"),
        "x every peer": (pytest.approx(28 / 23), "missed"),
    }


def test_a_gpu_record_fills_its_row_and_leaves_the_others_not_measured(pages, tmp_path):
    write_record(_gpu_record(cases=[GPU_CASE]), tmp_path / "results")
    later = _gpu_record(kernels=[KERNEL_CASE], ceilings=GPU_CASE["ceilings"])
    write_record(later | {"date": "2026-12-02T00:00:00+00:00"}, tmp_path / "results")
    report(tmp_path / "results", *pages)
    readme, docs = (page.read_text() for page in pages)
    assert "### GPU: NVIDIA X" in readme
    row = "| 8b | 660 ms | 500 ms, peft+chunked | 250 ms, softprompt graph | **2.64** | 2 | 1.25 | 0.35 |"
    assert row in readme
    assert f"| math |{' not measured |' * 7}" in readme
    assert "| 8b | peft+liger | out of memory |" in docs
    assert "| 8b | peak memory / PEFT's | <= 0.333 | 0.35 | softprompt graph | missed |" in docs
    assert "| math | x PEFT | >= 2.2 | - | - | not measured |" in docs
    assert "| head-llama-8b-8192 | x every peer | >= 1.3 | 1.22 | triton | missed |" in docs
    assert "| embed-article |" in docs
    assert (tmp_path / "results/nvidia-x/kernels.png").read_bytes().startswith(b"\x89PNG")


def test_the_short_table_has_a_line_a_case_and_names_failed_checks():
    case = copy.deepcopy(GPU_CASE)
    case["variants"][1] |= {"check": {"gradient_error": 1.0, "passed": False}, "time": None}
    everything = [KERNEL_CASE | {"name": name} for name in KERNEL_CASES]
    steps = [case | {"name": name} for name in SUITES["gpu"]]
    lines = short_table([_gpu_record(cases=[case]), _gpu_record(kernels=[KERNEL_CASE])]).splitlines()
    assert lines[1].split()[:5] == ["8b", "660", "-", "250", "2.64"]
    assert lines[1].endswith("peak memory / PEFT's <= 0.333")
    assert lines[3].startswith("head-llama-8b-8192")
    assert lines[-1] == "CHECK FAILED 8b: peft+chunked"
    full = short_table([_gpu_record(cases=steps), _gpu_record(kernels=everything)]).splitlines()
    assert len(full) <= 30
    assert full[-1].startswith("... and")
    assert sum(line.startswith("head-") for line in full) == 4
    assert sum(line.startswith(("norm-", "glu-", "rotary-")) for line in full) == 1


@pytest.mark.slow
def test_the_report_shows_no_time_of_a_wrong_variant(measured, pages, tmp_path):
    write_record(measured, tmp_path / "results")
    report(tmp_path / "results", *pages)
    rows = [line for line in pages[1].read_text().splitlines() if "| double |" in line]
    assert len(rows) == 4
    assert all("check failed" in row and " ms" not in row and " MB" not in row for row in rows)


def test_run_and_report_write_a_record_tables_and_pictures(pages, tmp_path, capsys):
    results = tmp_path / "results"
    assert main(["run", "--tiny", "--cases", "article", "--rounds", "1", "--output", str(results)]) == 0
    readme, docs = pages
    command = ["report", "--results", str(results), "--readme", str(readme), "--docs", str(docs)]
    assert main(command) == 0
    (path,) = results.glob("*/*.json")
    record = json.loads(path.read_text())
    assert path.parent.name == record["device"]["folder"]
    assert path.parent.name.startswith("toy-cpu-")
    installed = record["versions"]["torch"].partition("+")[0]
    assert installed == torch.__version__.partition("+")[0]
    text = docs.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    ratio = _variants(record["cases"][0])["softprompt"]["time"]["ratio"]
    assert f"| **{ratio:.2f}** |" in text
    assert f"[{docs.name}]({docs.name})" in readme.read_text()
    for name in ("time.png", "memory.png"):
        picture = path.parent / name
        assert picture.read_bytes().startswith(b"\x89PNG")
        assert f"({picture.relative_to(tmp_path).as_posix()})" in text


def test_a_readme_without_the_markers_is_refused(tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text(f"{END}\n{BEGIN}\n")
    with pytest.raises(ReportError, match="must have one <!-- benchmarks:begin -->"):
        report(tmp_path, readme)
    assert main(["report", "--results", str(tmp_path), "--readme", str(readme)]) == 2
    assert "benchmarks:begin" in capsys.readouterr().err
    assert readme.read_text() == f"{END}\n{BEGIN}\n"


def test_without_records_every_gpu_case_and_target_reads_not_measured(pages, tmp_path):
    report(tmp_path / "none", *pages)
    readme, docs = (page.read_text() for page in pages)
    assert "### GPU\n\nNot measured." in readme
    for name in SUITES["gpu"]:
        assert f"| {name} |{' not measured |' * 6}" in docs
    verdicts = [line.split(" | ")[-1] for line in docs.splitlines() if line.count(" | ") == 5 and "=" in line]
    assert len(verdicts) > 30
    assert set(verdicts) == {"not measured |"}
    assert " ms" not in readme
    assert " ms" not in docs


@pytest.mark.parametrize(
    ("share_of_limit", "share_of_memory", "expected"),
    [
        (0.96, 0.20, ("0.96 (met: >= 0.95)", "0.200 (met: <= 0.25)")),
        (0.94, 0.26, ("0.94 (missed: >= 0.95)", "0.260 (missed: <= 0.25)")),
    ],
)
def test_the_tables_say_which_targets_were_met(
    measured, pages, tmp_path, share_of_limit, share_of_memory, expected
):
    record = copy.deepcopy(measured)
    record["tiny"] = False
    case = record["cases"][0]
    case["targets"] = {"share_of_limit": 0.95, "share_of_memory": 0.25}
    ours, theirs = _variants(case)["softprompt"], _variants(case)["peft"]
    ours["time"]["ratio"] = share_of_limit * case["token_limit"]
    theirs["peak_bytes"] = 10**9
    ours["peak_bytes"] = int(share_of_memory * 10**9)
    write_record(record, tmp_path / "results")
    report(tmp_path / "results", *pages)
    text = pages[1].read_text()
    assert all(cell in text for cell in expected)
    assert "| article-full | not measured |" in text
    assert f"| {share_of_limit:.2f} |" in pages[0].read_text()


def test_every_case_comes_from_the_newest_record_that_has_it():
    def record(date, *names):
        return {"date": date, "cases": [{"name": name} for name in names]}

    newest = newest_by_case(
        [
            record("2026-02-02", "paper"),
            record("2026-03-03", "article-full"),
            record("2026-01-01", "paper", "article"),
        ]
    )
    assert [(found.case["name"], found.record["date"]) for found in newest] == [
        ("article", "2026-01-01"),
        ("paper", "2026-02-02"),
        ("article-full", "2026-03-03"),
    ]


def test_files_that_are_no_records_are_passed_over(pages, tmp_path):
    folder = tmp_path / "results" / "compile"
    folder.mkdir(parents=True)
    (folder / "kernels.json").write_text("[1, 2]")
    (folder / "tune.json").write_text('{"device": {}, "tune": []}')
    assert report(tmp_path / "results", *pages) == list(pages)


def test_idle_time_is_what_no_kernel_covers():
    def kernel(name, start, length, category="kernel"):
        return {"name": name, "cat": category, "ts": start, "dur": length}

    # Two overlap, one lies inside another, and the CPU's operations do not count.
    events = [
        kernel("a", 100, 10),
        kernel("b", 105, 10),
        kernel("a", 130, 30),
        kernel("c", 140, 5, "gpu_memcpy"),
        kernel("aten::mm", 0, 500, "cpu_op"),
        {"name": "metadata", "ph": "M"},
    ]
    found = gpu_times(events)
    assert found["busy_microseconds"] == pytest.approx((15 + 30) / 3)
    assert found["idle_microseconds"] == pytest.approx(15 / 3)
    assert found["largest_gap_microseconds"] == 15
    assert found["kernels"] == pytest.approx(4 / 3)
    assert [(row["name"], row["share"]) for row in found["by_name"]] == [
        ("a", pytest.approx(40 / 55)),
        ("b", pytest.approx(10 / 55)),
        ("c", pytest.approx(5 / 55)),
    ]
