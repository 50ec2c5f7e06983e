"""The runner of the step cases: checks before times, and nothing that fails stops a run."""

from dataclasses import replace

import pytest
import torch
from peft import get_peft_model

import softprompt
from benchmarks import contest, machine, rehearsal
from benchmarks.__main__ import main
from benchmarks.cases import CASES, build_batch, toy
from benchmarks.gate import _by_rows
from benchmarks.run import run
from benchmarks.runner import make_runner
from benchmarks.timing import FEWEST_ROUNDS, WARM_UP_ROUNDS, Budget, interleaved, summary
from benchmarks.variants import GPU_VARIANTS, OURS, REFERENCE, VARIANTS, Variant


def _spoiled(name, factor, **options):
    """A variant that computes another loss."""

    def build(base, config):
        model = softprompt.patch(get_peft_model(base, config))

        def spoil(module, arguments, output):
            output.loss = output.loss * factor
            return output

        model.register_forward_hook(spoil)
        return model

    return Variant(name, "wrong", build, **options)


def _failing(name, error):
    def build(base, config):
        raise error

    return Variant(name, "fails", build)


@pytest.fixture
def rehearsing():
    rehearsal.rehearse()
    yield
    rehearsal.stop_rehearsing()


@pytest.fixture(scope="module")
def measured():
    """Both CPU cases, with two wrong variants beside the right ones; the record and the lines of progress."""
    lines = []
    record = run(
        [CASES[name] for name in ("article", "paper")],
        variants=(*VARIANTS, _spoiled("one-percent", 1.01), _spoiled("nan", float("nan"))),
        rounds=2,
        tiny=True,
        say=lines.append,
    )
    return record, lines


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


@pytest.mark.slow
def test_a_wrong_variant_in_bf16_is_not_timed(rehearsing):
    variants = (REFERENCE, OURS[0], _spoiled("two-percent", 1.02), _spoiled("nan", float("nan")))
    (case,) = run([CASES["math"]], variants=variants, rounds=1, tiny=True, say=lambda line: None)["cases"]
    assert case["truth"]["source"] == "PEFT in float32 on the same weights"
    found = _variants(case)
    peft = found["peft"]["check"]
    assert case["truth"]["allowed_gradient"] == pytest.approx(2 * peft["gradient_error"] + 5e-3)
    assert found["softprompt eager"]["time"] is not None
    for name in ("two-percent", "nan"):
        assert not found[name]["check"]["passed"]
        assert found[name]["time"] is None


def test_the_truth_by_rows_is_that_of_the_whole_batch():
    case = replace(toy(CASES["ensemble"]), dtype="float32", num_prompts=2)
    base, batch = case.shape.build(torch.float32, "cpu"), build_batch(case)
    whole = make_runner(REFERENCE, base, case, batch).loss_and_gradient()
    by_rows = _by_rows(case, base, batch)
    assert by_rows[0] == pytest.approx(whole[0], rel=1e-6)
    torch.testing.assert_close(by_rows[1], whole[1], rtol=1e-4, atol=1e-8)


def test_the_prompts_of_an_ensemble_get_the_gradients_of_peft_s_runs():
    case = replace(toy(CASES["ensemble"]), dtype="float32")
    base, batch = case.shape.build(torch.float32, "cpu"), build_batch(case)
    theirs = make_runner(REFERENCE, base, case, batch)
    ours = make_runner(OURS[0], base, case, batch, [prompt.detach() for prompt in theirs.prompts])
    expected, found = theirs.loss_and_gradient(), ours.loss_and_gradient()
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-3, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (torch.OutOfMemoryError("tried to allocate 80 GiB"), "out of memory"),
        (ImportError("no symbol x\nin y"), "ImportError: no symbol x"),
    ],
)
def test_a_variant_that_fails_is_named_and_the_others_run(rehearsing, error, reason):
    variants = (REFERENCE, _failing("fails", error), OURS[0])
    (case,) = run([CASES["math"]], variants=variants, rounds=1, tiny=True, say=lambda line: None)["cases"]
    assert _variants(case)["fails"]["reason"] == reason
    assert _variants(case)["fails"]["time"] is None
    assert _variants(case)["softprompt eager"]["time"] is not None


@pytest.mark.slow
def test_without_peft_the_others_are_checked_all_the_same(rehearsing, monkeypatch):
    def too_large_for_peft(variant, *arguments):
        if variant is REFERENCE:
            raise torch.OutOfMemoryError("too large")
        return make_runner(variant, *arguments)

    monkeypatch.setattr(contest, "make_runner", too_large_for_peft)
    variants = (REFERENCE, OURS[0], _spoiled("nan", float("nan")))
    (case,) = run([CASES["math"]], variants=variants, rounds=1, tiny=True, say=lambda line: None)["cases"]
    found = _variants(case)
    assert found["peft"]["reason"] == "out of memory"
    assert found["softprompt eager"]["check"]["passed"]
    assert found["softprompt eager"]["time"] is not None
    assert case["ratio_to"] == "softprompt eager"
    assert found["nan"]["time"] is None


@pytest.mark.slow
def test_a_variant_that_fails_while_it_is_timed_leaves_the_others_their_times(rehearsing):
    calls = []

    def loss(model, inputs):
        calls.append(1)
        if len(calls) > 3:
            raise RuntimeError("too late")
        return model(**inputs).loss

    late = Variant("late", "fails after its check", get_peft_model, loss=loss)
    (case,) = run(
        [CASES["math"]], variants=(REFERENCE, late, OURS[0]), rounds=3, tiny=True, say=lambda line: None
    )["cases"]
    assert "too late" in _variants(case)["late"]["reason"]
    assert _variants(case)["late"]["time"] is None
    assert len(_variants(case)["softprompt eager"]["time"]["seconds"]) == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("eager_peak", "through"),
    [(10**8, "peft"), (4 * 10**8, "softprompt eager"), (6 * 10**8, "medians, timed alone")],
)
def test_recorded_steps_that_do_not_fit_together_are_timed_beside_who_fits(
    rehearsing, monkeypatch, eager_peak, through
):
    monkeypatch.setattr(contest.Contest, "_fit_together", lambda self, keepers: False)
    room = 10**9
    monkeypatch.setattr(contest.Contest, "_leaves_room", lambda self, needed: needed <= room)
    peaks = {"peft": 9 * 10**8, "softprompt eager": eager_peak}
    monkeypatch.setattr(contest, "peak_of", lambda runner, *arguments: peaks.get(runner.name, 0))
    (case,) = run(
        [CASES["math"]], variants=(REFERENCE, *OURS[:2]), rounds=3, tiny=True, say=lambda line: None
    )["cases"]
    found = _variants(case)
    graph = found["softprompt graph"]["time"]
    assert graph["ratio_through"] == through
    assert graph["ratio"] > 0
    assert "ratio_through" not in found["softprompt eager"]["time"]


def test_a_step_that_was_not_recorded_is_no_graph():
    # Without a rehearsal there is no recorder for the CPU.
    case = replace(toy(CASES["math"]), dtype="float32")
    base, batch = case.shape.build(torch.float32, "cpu"), build_batch(case)
    runner = make_runner(OURS[1], base, case, batch)
    runner.step()
    assert "CUDA graphs need a CUDA device" in OURS[1].doubt(runner.model)


def test_time_that_runs_short_leaves_out_what_is_optional():
    budget = Budget(100)
    assert budget.refuses(30, reserved=60) is None
    assert budget.refuses(50, reserved=60).startswith("time budget: it needs about 50 s")
    assert Budget(None).refuses(1e9, reserved=1e9) is None
    case = CASES["8b"]
    optional = {variant.name for variant in GPU_VARIANTS if variant.seconds(case) > 0}
    assert optional == {variant.name for variant in GPU_VARIANTS} - {
        "peft",
        "softprompt eager",
        "softprompt graph",
    }


def test_a_spent_budget_names_the_variants_that_it_cost(rehearsing, monkeypatch):
    monkeypatch.setattr(Variant, "seconds", lambda self, case: 50.0 if self.optional else 0.0)
    variants = (REFERENCE, replace(OURS[0], name="optional", optional=True))
    record = run([CASES["math"]], variants=variants, rounds=1, tiny=True, budget=10, say=lambda line: None)
    found = _variants(record["cases"][0])
    assert found["optional"]["reason"].startswith("time budget")
    assert found["peft"]["time"] is not None


def test_an_ensemble_is_compared_with_its_prompts_one_after_the_other():
    record = run([CASES["ensemble-cpu"]], variants=VARIANTS, rounds=1, tiny=True, say=lambda line: None)
    found = _variants(record["cases"][0])
    assert list(found) == ["peft", "softprompt", "softprompt in turn"]
    assert all(variant["check"]["passed"] and variant["time"]["p50"] > 0 for variant in found.values())


def test_the_record_is_saved_after_each_case():
    saved = []
    run(
        [CASES[name] for name in ("article", "paper")],
        variants=(REFERENCE,),
        rounds=1,
        tiny=True,
        say=lambda line: None,
        save=lambda record: saved.append([case["name"] for case in record["cases"]]),
    )
    assert saved == [["article"], ["article", "paper"]]


def test_steps_are_interleaved_and_the_warm_up_is_not_timed():
    called = []
    seconds = interleaved({"a": lambda: called.append("a"), "b": lambda: called.append("b")}, 3, "cpu")
    assert called == ["a", "b"] * (WARM_UP_ROUNDS + 3)
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3}


def test_rounds_beyond_the_seventh_are_left_out_where_time_is_short():
    seconds = interleaved({"a": lambda: None}, 50, "cpu", seconds_left=0.0)
    assert len(seconds["a"]) == FEWEST_ROUNDS


def test_ratios_are_by_round():
    found = summary([1.0, 2.0, 4.0], [2.0, 6.0, 4.0])
    assert (found["p50"], found["ratio"], found["ratio_of_medians"]) == (2.0, 2.0, 2.0)
    assert found["p20"] == pytest.approx(1.4)


def test_the_reference_must_come_first():
    with pytest.raises(ValueError, match="first variant must be PEFT"):
        run([CASES["article"]], variants=VARIANTS[1:], tiny=True)
    with pytest.raises(ValueError, match="got no case"):
        run([], variants=(REFERENCE,))
    with pytest.raises(ValueError, match="cases of one device"):
        run([CASES["article"], CASES["math"]], variants=(REFERENCE,))


def test_a_copy_without_a_repository_says_what_it_was_told_of_its_commit(monkeypatch, capsys):
    monkeypatch.setattr(machine, "_git", lambda *arguments: None)
    monkeypatch.setattr(machine, "_NAMED", {"commit": "none"})
    assert machine.commit() == "none"
    # Steps and kernels are run apart: the command ends before it measures.
    assert main(["run", "--cases", "8b", "embed-article", "--commit", "0123abcdef"]) == 2
    assert machine.commit() == "0123abcdef"
    with pytest.raises(SystemExit):
        main(["run", "--commit", "no name/of a file"])
    assert "expected letters, digits, '.', '_' and '-', got 'no name/of a file'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "program, expected",
    [("echo 580.159.04", "580.159.04"), ("echo no devices; exit 6", None), (None, None)],
)
def test_a_record_of_a_gpu_names_its_driver_where_it_can_be_asked(program, expected, monkeypatch, tmp_path):
    if program is not None:
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{program}\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    described = machine.describe_device("cuda")
    assert described["driver"] == expected
    assert described["folder"] == "nvidia-h200"
