"""The compiled attention with every set of instructions that is there, and on more threads than heads."""

import pytest
import torch
from attention_problem import BATCHES, HEADS, OPTIONS, layout_of, long_batch, results, tensors, with_vectors

from softprompt.ops.registry import INSTRUCTIONS, native_availability
from softprompt.ops.shared_prompt_attention import native as functions
from softprompt.ops.shared_prompt_attention import shared_prompt_attention
from softprompt.ops.shared_prompt_attention.api import native_obstacle
from softprompt.ops.shared_prompt_attention.layout import AttentionOptions

pytestmark = pytest.mark.skipif(not native_availability("cpu").usable, reason="the native ops are not built")


@pytest.fixture
def threads():
    """Sets the number of threads, and puts it back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(params=["avx512", "avx2", "baseline"])
def instructions(request, monkeypatch):
    """Holds the compiled functions to one set of instructions."""
    number = INSTRUCTIONS[request.param]
    for name in ("_FORWARD", "_BACKWARD"):
        compiled = getattr(functions, name)
        monkeypatch.setattr(functions, name, lambda *given, compiled=compiled: compiled(*given[:-1], number))
    layout = layout_of("ragged prompts")
    try:
        shared_prompt_attention(*tensors(layout), layout, backend="native")
    except RuntimeError as error:
        if "has no instructions" not in str(error):
            raise
        pytest.skip(f"no {request.param} here")


def assert_equals_the_reference(layout, heads, options, dtype):
    inputs = tensors(layout, heads, dtype)
    vectors = with_vectors(options, heads[0], dtype)
    precision = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {}
    truth = results(inputs, layout, vectors, backend="reference")
    for ours, expected in zip(results(inputs, layout, vectors, backend="native"), truth, strict=True):
        torch.testing.assert_close(ours, expected, **precision)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("heads", [*HEADS, (2, 1, 70, 67)], ids=str)
def test_every_set_of_instructions_gives_the_numbers_of_the_reference(instructions, heads, dtype):
    for batch in BATCHES:
        assert_equals_the_reference(layout_of(batch), heads, OPTIONS["all"], dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("window", [1, 5, 24, 41, 90])
def test_windows_that_leave_keys_far_behind(instructions, window, dtype):
    layout = long_batch(5, 150, [40, 3, 17])
    for options in ({}, OPTIONS["all"]):
        assert_equals_the_reference(layout, HEADS[1], {**options, "sliding_window": window}, dtype)


def test_what_a_window_leaves_far_behind_is_not_read():
    layout = long_batch(1, 150, [40])
    query, key, value = tensors(layout)
    spoiled = value.detach().clone()
    spoiled[:, :40] = float("nan")
    clean = shared_prompt_attention(query, key, value, layout, sliding_window=5, backend="native").detach()
    out = shared_prompt_attention(query, key, spoiled, layout, sliding_window=5, backend="native").detach()
    far = slice(40 + 48, None)
    torch.testing.assert_close(out[:, far], clean[:, far], rtol=0, atol=0)


@pytest.mark.parametrize("options", ["none", "all"])
@pytest.mark.parametrize("count", [1, 2, 7, 64])
def test_any_number_of_threads_gives_the_same_numbers(threads, count, options):
    threads(count)
    for batch in BATCHES:
        assert_equals_the_reference(layout_of(batch), HEADS[2], OPTIONS[options], torch.float64)


def test_a_number_that_is_none_stays_in_its_text():
    layout = layout_of("ragged prompts")
    query, key, value = tensors(layout)
    rows = slice(int(layout.cu_texts[0]), int(layout.cu_texts[1]))
    spoiled = query.detach().clone()
    spoiled[:, rows] = float("nan")
    clean = shared_prompt_attention(query, key, value, layout, backend="native").detach()
    out = shared_prompt_attention(spoiled, key, value, layout, backend="native").detach()
    assert out[:, rows].isnan().all()
    out[:, rows] = clean[:, rows]
    torch.testing.assert_close(out, clean, rtol=0, atol=0)


def test_a_dummy_has_no_share_in_the_gradient_of_a_large_sink():
    layout = layout_of("right, dummies")
    inputs, sinks = tensors(layout, dtype=torch.float32), torch.full((4,), 200.0, requires_grad=True)
    ours, expected = (
        results(inputs, layout, {"sinks": sinks}, backend=backend)[-1] for backend in ("native", "reference")
    )
    torch.testing.assert_close(ours, expected)


def losses(query, key, value, layout):
    """By the function and by the op, with a second derivative beside the attention's."""
    by_op = torch.ops.softprompt.shared_prompt_attention_kernel(
        query, key, value, None, *layout.fields(), *AttentionOptions(0.4), "native"
    )[0]
    by_function = shared_prompt_attention(query, key, value, layout, scale=0.4, backend="native")
    return [out.square().sum() + query.pow(3).sum() for out in (by_function, by_op)]


def test_a_second_derivative_is_refused():
    inputs = tensors(layout_of("right"))
    for loss in losses(*inputs, layout_of("right")):
        (gradient,) = torch.autograd.grad(loss, inputs[:1], create_graph=True)
        with pytest.raises(RuntimeError, match="differentiated once, got a second derivative"):
            torch.autograd.grad(gradient.sum(), inputs[:1])


def test_the_gradient_of_the_function_is_that_of_the_op():
    layout = layout_of("ragged prompts")
    inputs = tensors(layout)
    by_function, by_op = (torch.autograd.grad(loss, inputs) for loss in losses(*inputs, layout))
    for ours, expected in zip(by_function, by_op, strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=0)


def test_the_compiled_attention_takes_cpu_tensors_only():
    assert native_obstacle(torch.ones(1, 1, 1)) is None
    refused = native_obstacle(torch.ones(1, 1, 1, device="meta"))
    assert refused == "the compiled attention is for CPU tensors, got meta"
