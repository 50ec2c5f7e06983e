"""Whole steps in which nothing that is read, be it only to be multiplied with zero, was never written."""

import copy
import importlib

import pytest
import torch
from backends import BACKENDS
from generating import BATCH, patched, speaker, tokens
from head_problem import DEVICE, as_double, largest_error, loss_and_gradients, problem
from parity import make_batch, relative_error, step
from poison import poisoned_buffers
from seq2seq_models import prompted as seq2seq_prompted
from seq2seq_models import seq2seq_batch
from tiny_models import pair, prompted

import softprompt
from softprompt.engine import step_graph
from softprompt.engine.candidates import score
from softprompt.ops.linear_cross_entropy import linear_cross_entropy
from softprompt.ops.linear_cross_entropy.arguments import LossOptions
from softprompt.ops.linear_cross_entropy.reference import linear_cross_entropy_ref

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CASES = [
    (name, dtype, vocabulary, backend)
    for name, vocabulary, backends in (
        ("llama", 97, BACKENDS),
        ("bloom", 1001, BACKENDS),
        ("gpt2", 8209, [BACKENDS[0], BACKENDS[2]]),
        ("gemma2", 97, [BACKENDS[0]]),  # windows and softcaps
        ("mamba", 97, [BACKENDS[0]]),  # the padded route
    )
    for dtype in DTYPES
    for backend in backends
]


def models(make, name, dtype, **options):
    """PEFT's model, the same patched, and the truth: PEFT's with the same rounded weights in fp64."""
    stock, fast = pair(make(name, dtype, **options))
    for model in (stock, fast):
        model.prompt_encoder.float()  # as PEFT trains it
    return stock, fast, copy.deepcopy(stock).double()


def assert_right(got, stock, truth, batch, dtype):
    """Finite, and as near to the truth as PEFT in the same dtype."""
    right, theirs = step(truth, batch), step(stock, batch)
    (key,) = right.grads
    for what, mine, peft, true in (
        ("loss", got.loss, theirs.loss, right.loss),
        ("gradient", got.grads[key], theirs.grads[key], right.grads[key]),
    ):
        assert mine.isfinite().all(), f"{what} is not finite"
        limit = 2 * relative_error(peft, true) + max(4 * torch.finfo(dtype).eps, 4e-6)
        assert relative_error(mine, true) <= limit, what


def parameters(cases):
    """Cases whose last entry is a parameter with marks of its own."""
    return [
        pytest.param(
            *case[:-1],
            *case[-1].values,
            marks=[*case[-1].marks, *([pytest.mark.slow] if is_slow(case) else [])],
        )
        for case in cases
    ]


def is_slow(case):
    """Triton's interpreter takes seconds: in one dtype it is quick enough to be run all the time."""
    return case[-1].values == ("triton",) and case[1] != torch.bfloat16


@pytest.mark.parametrize("name, dtype, vocabulary, backend", parameters(CASES), ids=str)
def test_a_step_reads_nothing_unwritten(name, dtype, vocabulary, backend):
    stock, fast, truth = models(prompted, name, dtype, vocab_size=vocabulary)
    softprompt.patch(fast, on_unsupported="error", backend=backend)
    for side, labels in (("left", "everywhere"), ("right", "answer")):
        batch = make_batch(side=side, labels=labels, vocabulary=vocabulary)
        with poisoned_buffers() as watch:
            got = step(fast, batch)
        assert watch.products
        assert got.logits.isfinite().all()
        assert_right(got, stock, truth, batch, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["llama", "bloom"])
def test_a_recorded_step_reads_nothing_unwritten(name, dtype, tape, monkeypatch):
    monkeypatch.setattr(step_graph, "process_obstacle", lambda: None)  # the watch is a mode of PyTorch
    stock, fast, truth = models(prompted, name, dtype)
    softprompt.patch(fast, on_unsupported="error")
    batches = [
        make_batch(lengths=lengths, labels="everywhere") for lengths in ((7, 3, 5), (6, 4, 4), (7, 7, 1))
    ]
    with poisoned_buffers():
        steps = [step(fast, batch) for batch in (*batches, *batches)]
    assert tape.replays > 3
    for batch, got in zip((*batches, *batches), steps, strict=True):
        assert_right(got, stock, truth, batch, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["t5-1.1", "bart"])
def test_a_step_of_an_encoder_decoder_reads_nothing_unwritten(name, dtype):
    stock, fast, truth = models(seq2seq_prompted, name, dtype)
    softprompt.patch(fast, on_unsupported="error")
    batch = seq2seq_batch(side="left")
    with poisoned_buffers() as watch:
        got = step(fast, batch)
    assert watch.products
    assert_right(got, stock, truth, batch, dtype)


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"num_beams": 3}])
@pytest.mark.parametrize("name", ["llama", "bloom", "gemma2"])
def test_generate_reads_nothing_unwritten(name, options):
    model = patched(speaker(name, dtype=torch.float32))
    expected = tokens(model, **options)
    with poisoned_buffers() as watch:
        assert torch.equal(tokens(model, **options), expected)
    assert watch.products
    assert BATCH["attention_mask"].min() == 0  # there are pads


def test_scoring_reads_nothing_unwritten():
    model = prompted("llama", torch.bfloat16).get_base_model()
    batch = make_batch(side="left", labels=None)
    prompt = torch.randn(4, 48, generator=torch.Generator().manual_seed(0))
    with poisoned_buffers() as watch:
        got = score(model, prompt, [[5, 6, 7], [8]], **batch)
    assert watch.products
    assert got.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocabulary", [97, 1001, 8209])
def test_a_trained_head_in_chunks_of_several_sizes_reads_nothing_unwritten(
    vocabulary, dtype, backend, monkeypatch
):
    module = importlib.import_module("softprompt.ops.linear_cross_entropy.chunked")
    monkeypatch.setattr(module, "chunk_bounds", lambda *_: [slice(0, 2), slice(2, 5), slice(5, 6)])
    case = problem(vocabulary, dtype)  # of whose rows 6 are scored
    truth = loss_and_gradients(linear_cross_entropy_ref, *as_double(*case[:3]), *case[3:])
    plain = loss_and_gradients(linear_cross_entropy_ref, *case)
    with poisoned_buffers() as watch:
        found = loss_and_gradients(linear_cross_entropy, *case, backend=backend)
    assert watch.products
    for ours, pytorch, true in zip(found, plain, truth, strict=True):
        assert largest_error(ours, true) <= 2 * largest_error(pytorch, true) + 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("gradient", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_row_functions_leave_the_padding_zero(backend, dtype, gradient):
    module = importlib.import_module(f"softprompt.ops.linear_cross_entropy.{backend}")
    padded = torch.randn(3, 128, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
    padded[:, 97:] = 0
    losses, targets = torch.zeros(3, device=DEVICE), torch.tensor([96, -100, 4], device=DEVICE)
    options = LossOptions(softcap=2.0, logit_scale=1.5, label_smoothing=0.1)
    bias = torch.ones(97, device=DEVICE)
    module.rows_loss_and_gradient_(padded[:, :97], bias, targets, losses, None, options, gradient=gradient)
    assert losses[0] > 0
    assert not padded[:, 97:].any()
