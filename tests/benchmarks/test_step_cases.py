"""The step cases: batches, lengths and the work that they are."""

import itertools
from dataclasses import replace

import pytest
import torch
from peft import PromptTuningConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.cases import CASES, GENERATE, SUITES, build_batch, toy
from benchmarks.limits import Ceilings, work_of
from benchmarks.texts import RECORDED, TWITTER_COMPLAINTS, EvenLengths, twitter_complaints


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


@pytest.mark.parametrize(
    ("name", "rows", "padded", "fill", "labelled"),
    [
        ("math", 4, 362, 0.69, 1.0),
        ("math-half", 4, 362, 0.69, 0.5),
        ("8b", 16, 512, 0.6, 0.1),
        ("long", 32, 2048, 0.9, 1.0),
    ],
)
def test_declared_lengths_fill_the_batch_as_the_case_says(name, rows, padded, fill, labelled):
    batch = build_batch(replace(CASES[name], device="cpu"))
    assert batch.inputs["input_ids"].shape == (rows, padded)
    assert sum(batch.lengths) / (rows * padded) == pytest.approx(fill, abs=0.01)
    assert batch.num_labels / sum(batch.lengths) == pytest.approx(labelled, abs=0.01)


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


def test_right_padded_batches_have_their_labels_before_the_pads():
    case = replace(CASES["8b"], device="cpu", rows=4, pad_to=64, texts=lambda: EvenLengths(10, 60, 0.25))
    batch = build_batch(case)
    mask, labels = batch.inputs["attention_mask"], batch.inputs["labels"]
    assert (mask.diff(dim=1) <= 0).all()
    assert mask.sum(1).tolist() == list(batch.lengths)
    for row, length in enumerate(batch.lengths):
        count = round(0.25 * length)
        assert (labels[row] != -100).nonzero().flatten().tolist() == list(range(length - count, length))


def test_every_gpu_case_is_in_bf16_and_has_a_target():
    for name in SUITES["gpu"]:
        case = CASES[name]
        assert case.dtype == "bfloat16"
        assert any(value is not None for value in vars(case.targets).values())
        assert case.rounds >= 7


def test_cases_of_one_shape_stand_together():
    shapes = [CASES[name].shape for name in SUITES["gpu"]]
    changes = sum(one != other for one, other in itertools.pairwise(shapes))
    assert changes == len({shape.name for shape in shapes}) - 1


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


def test_an_ensemble_is_as_much_work_as_its_prompts_one_by_one():
    case = toy(CASES["ensemble"])
    base, batch = case.shape.build(torch.float32, "cpu"), build_batch(case)
    one, five = (work_of(base, batch, case.num_virtual_tokens, count) for count in (1, 5))
    for field in ("token_flop", "peft_token_flop", "attention_flop", "peft_attention_flop"):
        assert getattr(five, field) == 5 * getattr(one, field)
    assert five.moved_bytes == one.moved_bytes


def test_the_floor_is_the_slower_of_flop_and_bytes():
    case = toy(CASES["article"])
    work = work_of(case.shape.build(torch.float32, "cpu"), build_batch(case), 8)
    flop = work.token_flop + work.attention_flop
    assert Ceilings(1e3, 1e30).floor_seconds(work) == pytest.approx(flop / 1e3)
    assert Ceilings(1e30, 1e3).floor_seconds(work) == pytest.approx(2 * 4 * (2 * 12 * 32**2 + 32 * 512) / 1e3)


def test_toys_of_gpu_cases_keep_what_makes_them_different():
    for name in SUITES["gpu"]:
        case, small = CASES[name], toy(CASES[name])
        assert small.shape.model_type == case.shape.model_type
        assert (small.kind, small.num_prompts) == (case.kind, case.num_prompts)
        assert (small.new_tokens > 0) == (case.kind == GENERATE)
        assert small.dtype == "bfloat16"
