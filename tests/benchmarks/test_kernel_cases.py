"""The kernel cases: what is compared is the same computation, and a wrong one is not timed."""

from dataclasses import replace

import pytest
import torch

from benchmarks.kernels import flex
from benchmarks.kernels.attention import truth
from benchmarks.kernels.attention_problem import attention_problem
from benchmarks.kernels.cases import KERNEL_CASES
from benchmarks.kernels.problem import KernelVariant, NotAvailable, error_of
from benchmarks.kernels.run import run_kernels
from benchmarks.timing import Budget
from softprompt.ops.shared_prompt_attention.reference import visible


def _run(case, **options):
    record = run_kernels([case], device="cpu", rounds=1, tiny=True, say=lambda line: None, **options)
    (found,) = record["kernels"]
    return found, {variant["name"]: variant for variant in found["variants"]}


def _with(case, *more):
    """The case with more variants."""

    def build(sizes, device):
        problem = case.build(sizes, device)
        return replace(problem, variants=(*problem.variants[2:3], *more))

    return replace(case, build=build)


def test_a_wrong_kernel_is_not_timed():
    case = KERNEL_CASES["embed-article"]
    right = case.build(case.toy, "cpu").truth()[0]
    wrong = right.clone()
    wrong[0, -1, -1] += 1e-3
    variants = (
        KernelVariant("right", lambda: lambda: (right,), own=True),
        KernelVariant("wrong", lambda: lambda: (wrong,)),
        KernelVariant("not finite", lambda: lambda: (right * float("nan"),)),
        KernelVariant("other shape", lambda: lambda: (right[:, 1:],)),
        KernelVariant("two outputs", lambda: lambda: (right, right)),
    )
    _, found = _run(_with(case, *variants))
    assert found["right"]["passed"]
    assert found["right"]["time"] is not None
    for name in ("wrong", "not finite", "other shape", "two outputs"):
        assert not found[name]["passed"]
        assert found[name]["time"] is None
    assert found["not finite"]["errors"] == [None]
    assert "2 tensors, expected 1" in found["two outputs"]["reason"]


@pytest.mark.parametrize("name", ["norm-smollm2", "norm-heads-smollm2", "glu-smollm2", "rotary-smollm2"])
def test_elementwise_ops_compute_what_transformers_writes_out(name):
    case = KERNEL_CASES[name]

    def build(sizes, device):
        problem = case.build(sizes, device)
        return replace(problem, variants=tuple(one for one in problem.variants if not one.compiles))

    _, found = _run(replace(case, build=build))
    for variant in ("triton", "native", "reference", "plain torch"):
        assert found[variant]["passed"] or found[variant]["reason"], found[variant]
    assert found["reference"]["time"] is not None
    assert found["plain torch"]["time"] is not None


def test_a_kernel_that_cannot_run_is_named():
    def missing():
        raise NotAvailable("it is not installed")

    def broken():
        raise RuntimeError("no such symbol\nmore")

    case = KERNEL_CASES["embed-article"]
    _, found = _run(_with(case, KernelVariant("missing", missing), KernelVariant("broken", broken)))
    assert found["missing"]["reason"] == "it is not installed"
    assert found["broken"]["reason"] == "RuntimeError: no such symbol"
    assert found["reference"]["time"] is not None


def test_a_case_that_no_longer_fits_the_budget_is_named():
    found, variants = _run(KERNEL_CASES["embed-article"], budget=0.0)
    assert found["reason"].startswith("time budget")
    assert variants == {}


def test_what_is_compiled_takes_no_time_from_the_cases_that_come_later(monkeypatch):
    monkeypatch.setattr(Budget, "spent", 0.0)  # estimates alone count, however busy the machine is
    case = KERNEL_CASES["embed-article"]
    slow = KernelVariant("slow", lambda: lambda: case.build(case.toy, "cpu").truth(), compiles=True)
    record = run_kernels(
        [_with(case, slow), *[KERNEL_CASES["layout-article"]] * 3],
        device="cpu",
        rounds=1,
        tiny=True,
        budget=14.5,  # less than the estimates of a compilation and of three cases
        say=lambda line: None,
    )
    first, *others = record["kernels"]
    assert first["variants"][-1]["reason"].startswith("time budget")
    assert [found["reason"] for found in others] == [None] * 3


@pytest.mark.parametrize("name", ["article", "math"])
def test_the_truth_of_the_attention_is_that_of_dense_attention_over_the_visible_pairs(name):
    case = KERNEL_CASES[f"attention-{name}-both"]
    problem = attention_problem(case.toy, "cpu")
    wide = [
        tensor.detach().double().requires_grad_() for tensor in (problem.query, problem.key, problem.value)
    ]
    group = wide[0].shape[0] // wide[1].shape[0]
    key, value = (tensor.repeat_interleave(group, 0) for tensor in wide[1:])
    scores = wide[0] @ key.transpose(1, 2) * wide[0].shape[2] ** -0.5
    if problem.slopes is not None:
        positions = problem.layout.position_ids
        scores = scores + problem.slopes.double()[:, None, None] * (positions[None] - positions[:, None])
    out = scores.masked_fill(~visible(problem.layout, None), -torch.inf).softmax(2) @ value
    grads = torch.autograd.grad(out, wide, problem.d_out.double())
    for found, expected in zip(truth(problem), problem.cut((out.detach(), *grads)), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_the_block_mask_has_every_visible_pair_and_no_other():
    sizes = replace(KERNEL_CASES["attention-8b-forward"].toy, rows=40)
    problem = attention_problem(sizes, "cpu")
    mask = flex.block_mask(problem)
    dense = mask.to_dense()[0, 0].bool().repeat_interleave(128, 0).repeat_interleave(128, 1)
    rows = torch.arange(problem.layout.num_rows)
    inside = mask.mask_mod(rows, rows, rows[:, None], rows[None])
    assert problem.layout.num_rows > 128
    assert torch.equal(dense & inside, visible(problem.layout, None))
    assert torch.equal(inside, visible(problem.layout, None))


def test_errors_are_relative_and_nan_is_no_small_one():
    truth_ = torch.tensor([3.0, 4.0])
    assert error_of(torch.tensor([3.0, 4.5]), truth_) == pytest.approx(0.1)
    assert error_of(torch.tensor([3.0, float("nan")]), truth_) == float("inf")
    assert error_of(torch.tensor([1, 2]), torch.tensor([1, 3])) == 0.5
    assert error_of(torch.zeros(3), torch.zeros(2)) == float("inf")


def test_the_targets_of_the_kernels_are_those_that_were_declared():
    head = KERNEL_CASES["head-llama-8b-8192"].targets
    assert (head.over_floor, head.vs) == (1.2, (("every peer", 1.3),))
    assert KERNEL_CASES["head-llama-8b-128"].targets.over_floor == 1.3
    assert KERNEL_CASES["layout-65536"].targets.microseconds == 10
    assert dict(KERNEL_CASES["attention-8b-both"].targets.vs)["sdpa padded, mask"] == 1.5
    sizes = KERNEL_CASES["embed-135mb"].sizes
    assert sizes.rows * sizes.pad_to * sizes.hidden_size * 2 >= 100e6
