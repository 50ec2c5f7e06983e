"""The benchmark suite at toy sizes: checks before times, the limits, and the report."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from peft import PromptTuningConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode

import softprompt
from benchmarks.__main__ import main
from benchmarks.cases import CASES, SUITES, build_batch, toy
from benchmarks.limits import Ceilings, work_of
from benchmarks.report import BEGIN, END, ReportError, newest_by_case, report
from benchmarks.run import WARM_UP_ROUNDS, interleaved, run, write_record
from benchmarks.texts import RECORDED, TWITTER_COMPLAINTS, twitter_complaints
from benchmarks.variants import REFERENCE, VARIANTS, Variant


def _spoiled(name, factor):
    """A variant that computes another loss."""

    def build(base, config):
        model = softprompt.patch(get_peft_model(base, config))

        def spoil(module, arguments, output):
            output.loss = output.loss * factor
            return output

        model.register_forward_hook(spoil)
        return model

    return Variant(name, "wrong", build)


@pytest.fixture(scope="module")
def measured():
    """Both CPU cases, with two wrong variants beside the right ones; the record and the lines of progress."""
    lines = []
    record = run(
        [CASES[name] for name in SUITES["cpu"]],
        variants=(*VARIANTS, _spoiled("one-percent", 1.01), _spoiled("nan", float("nan"))),
        rounds=2,
        tiny=True,
        say=lines.append,
    )
    return record, lines


@pytest.fixture
def readme(tmp_path):
    path = tmp_path / "README.md"
    path.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    return path


def _variants(case):
    return {variant["name"]: variant for variant in case["variants"]}


def test_a_right_variant_gets_its_times_and_memory(measured):
    for case in measured[0]["cases"]:
        for name in ("peft", "softprompt"):
            variant = _variants(case)[name]
            assert variant["check"]["passed"]
            assert len(variant["time"]["seconds"]) == 2
            assert 0 < variant["time"]["p20"] <= variant["time"]["p50"] <= variant["time"]["p80"]
        ours = _variants(case)["softprompt"]
        assert ours["check"]["gradient_error"] < 1e-4
        assert 0 < ours["peak_bytes"] < _variants(case)["peft"]["peak_bytes"]


def test_a_wrong_variant_gets_neither_time_nor_memory(measured):
    record, lines = measured
    for case in record["cases"]:
        wrong = _variants(case)["one-percent"]
        assert wrong["check"]["loss_difference"] > 0.01
        assert wrong["check"]["gradient_error"] == pytest.approx(0.01, rel=0.05)
        assert _variants(case)["nan"]["check"] == {
            "loss_difference": None,
            "gradient_error": None,
            "passed": False,
        }
        for name in ("one-percent", "nan"):
            assert not _variants(case)[name]["check"]["passed"]
            assert _variants(case)[name]["time"] is None
            assert _variants(case)[name]["peak_bytes"] is None
    told = [line for line in lines if "one-percent" in line or "nan:" in line]
    assert len(told) == 4
    assert all("CHECK FAILED" in line and " ms" not in line for line in told)


def test_the_report_shows_no_time_of_a_wrong_variant(measured, readme, tmp_path):
    write_record(measured[0], tmp_path / "results")
    report(tmp_path / "results", readme)
    rows = [
        line for line in readme.read_text().splitlines() if "| one-percent |" in line or "| nan |" in line
    ]
    assert len(rows) == 8
    assert all("check failed" in row and " ms" not in row and " MB" not in row for row in rows)


def test_run_and_report_write_a_record_tables_and_pictures(readme, tmp_path, capsys):
    results = tmp_path / "results"
    assert main(["run", "--tiny", "--cases", "article", "--rounds", "1", "--output", str(results)]) == 0
    assert main(["report", "--results", str(results), "--readme", str(readme)]) == 0
    (path,) = results.glob("*/*.json")
    record = json.loads(path.read_text())
    assert path.parent.name == record["device"]["folder"]
    assert path.parent.name.startswith("toy-cpu-")
    assert (
        record["versions"]["torch"] == torch.__version__.partition("+")[0]
        or record["versions"]["torch"] == torch.__version__
    )
    text = readme.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    ratio = _variants(record["cases"][0])["softprompt"]["time"]["ratio"]
    assert f"| **{ratio:.2f}** |" in text
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


def test_without_records_the_readme_says_not_measured(readme, tmp_path):
    report(tmp_path / "none", readme)
    assert readme.read_text() == f"before\n{BEGIN}\nNot measured yet.\n{END}\nafter\n"


@pytest.mark.parametrize(
    ("share_of_limit", "share_of_memory", "expected"),
    [
        (0.96, 0.20, ("0.96 (met: >= 0.95)", "0.200 (met: <= 0.25)")),
        (0.94, 0.26, ("0.94 (missed: >= 0.95)", "0.260 (missed: <= 0.25)")),
    ],
)
def test_the_tables_say_which_targets_were_met(
    measured, readme, tmp_path, share_of_limit, share_of_memory, expected
):
    record = copy.deepcopy(measured[0])
    record["tiny"] = False
    case = record["cases"][0]
    case["targets"] = {"share_of_limit": 0.95, "share_of_memory": 0.25}
    ours, theirs = _variants(case)["softprompt"], _variants(case)["peft"]
    ours["time"]["ratio"] = share_of_limit * case["token_limit"]
    theirs["peak_bytes"] = 10**9
    ours["peak_bytes"] = int(share_of_memory * 10**9)
    write_record(record, tmp_path / "results")
    report(tmp_path / "results", readme)
    text = readme.read_text()
    assert all(cell in text for cell in expected)
    assert "| article-full | not measured |" in text


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
    assert [(m.case["name"], m.record["date"]) for m in newest] == [
        ("article", "2026-01-01"),
        ("paper", "2026-02-02"),
        ("article-full", "2026-03-03"),
    ]


def test_steps_are_interleaved_and_the_warm_up_is_not_timed():
    called = []
    seconds = interleaved({"a": lambda: called.append("a"), "b": lambda: called.append("b")}, 3, "cpu")
    assert called == ["a", "b"] * (WARM_UP_ROUNDS + 3)
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3}


def test_recorded_lengths_are_those_of_the_data_set():
    if not TWITTER_COMPLAINTS.is_file():
        pytest.skip("RAFT's twitter_complaints is not here")
    assert twitter_complaints().rows == RECORDED


def test_a_missing_data_set_is_named(tmp_path):
    lengths = twitter_complaints(tmp_path / "train.csv")
    assert lengths.rows == RECORDED
    assert "recorded" in lengths.source


def test_a_batch_stands_for_the_whole_data_set():
    mean = sum(map(sum, RECORDED)) / len(RECORDED)
    for rows in (8, 32):
        sample = twitter_complaints().sample(rows)
        assert sum(map(sum, sample)) / rows == pytest.approx(mean, abs=1)


@pytest.mark.parametrize("name", SUITES["cpu"])
def test_batches_are_left_padded_and_labelled_on_the_answer_only(name):
    batch = build_batch(toy(CASES[name]))
    ids, mask, labels = (batch.inputs[key] for key in ("input_ids", "attention_mask", "labels"))
    assert mask.sum(1).tolist() == list(batch.lengths)
    assert (mask.diff(dim=1) >= 0).all()
    labelled = labels != -100
    assert labelled.sum(1).tolist() == [label for _, label in twitter_complaints().sample(8)]
    assert (labelled.int().diff(dim=1) >= 0).all()
    assert torch.equal(labels[labelled], ids[labelled])
    assert batch.num_labels == int(labelled.sum())


def test_the_counted_flop_of_peft_are_those_that_run():
    case = toy(CASES["article"])
    base, batch = case.shape.build(torch.float32, "cpu"), build_batch(case)
    work = work_of(base, batch, case.num_virtual_tokens)
    model = get_peft_model(base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=8))
    with FlopCounterMode(display=False) as counter:
        model(**batch.inputs).loss.backward()
    assert counter.get_total_flops() == work.peft_token_flop + work.peft_attention_flop


def test_attention_pairs_and_token_limit_are_those_of_the_packed_row():
    case = replace(toy(CASES["paper"]), num_virtual_tokens=5)
    batch = build_batch(case)
    work = work_of(case.shape.build(torch.float32, "cpu"), batch, 5)
    pairs = sum(query + 1 for query in range(5))
    pairs += sum(5 + query + 1 for length in batch.lengths for query in range(length))
    assert work.attention_pairs == pairs
    body, head, rows = 2 * 12 * 32**2, 32 * 512, 8 * (5 + max(batch.lengths))
    ours = body * (5 + sum(batch.lengths)) + head * batch.num_labels
    assert work.token_limit == pytest.approx((body + head) * rows / ours, rel=1e-12)


def test_the_floor_is_the_slower_of_flop_and_bytes():
    case = toy(CASES["article"])
    work = work_of(case.shape.build(torch.float32, "cpu"), build_batch(case), 8)
    flop = work.token_flop + work.attention_flop
    assert Ceilings(1e3, 1e30).floor_seconds(work) == pytest.approx(flop / 1e3)
    assert Ceilings(1e30, 1e3).floor_seconds(work) == pytest.approx(2 * 4 * (2 * 12 * 32**2 + 32 * 512) / 1e3)


def test_the_reference_must_come_first():
    with pytest.raises(ValueError, match="first variant must be PEFT"):
        run([CASES["article"]], variants=VARIANTS[1:], tiny=True)
    with pytest.raises(ValueError, match="got no case"):
        run([], variants=(REFERENCE,))
