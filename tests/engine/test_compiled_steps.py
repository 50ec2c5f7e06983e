"""`compile=True`: the decoder of training steps goes through torch.compile and gives the same numbers."""

import functools
import warnings

import pytest
import torch
from parity import assert_close, make_batch, step
from tiny_models import pair, prompted

import softprompt

pytestmark = pytest.mark.slow(seconds=20)


@pytest.fixture
def compiled_calls(monkeypatch):
    """Compiles without generating code, and counts how often a graph was traced."""
    original, traces = torch.compile, []

    def backend(graph, inputs):
        from torch._dynamo.backends.registry import lookup_backend

        traces.append(graph)
        return lookup_backend("aot_eager")(graph, inputs)

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(original, backend=backend))
    return traces


def models(name):
    eager, compiled = pair(prompted(name, torch.float64))
    return (
        softprompt.patch(eager, on_unsupported="error", cuda_graphs=False),
        softprompt.patch(compiled, on_unsupported="error", compile=True),
    )


def batches(count):
    for number in range(count):
        lengths = [3 + number % 3, 7, 5 - number % 2]
        yield make_batch(lengths, ("left", "right")[number % 2], "everywhere", seed=number, width=9)


@pytest.mark.parametrize("name", ["llama", "bloom", "gpt2", "qwen2-window"])
def test_compiled_steps_equal_the_eager_ones(name, compiled_calls):
    eager, compiled = models(name)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="softprompt")
        for batch in batches(5):
            expected, got = step(eager, batch), step(compiled, batch)
            assert_close(got.loss, expected.loss, 1e-9, "loss")
            for key, grad in expected.grads.items():
                assert_close(got.grads[key], grad, 1e-8, key)
    assert compiled_calls
    assert compiled._softprompt.runner.graphs.compile_obstacle is None


def test_compiled_steps_are_recorded_too(compiled_calls, tape):
    eager, compiled = models("llama")
    for batch in batches(6):
        expected, got = step(eager, batch), step(compiled, batch)
        assert_close(got.loss, expected.loss, 1e-9, "loss")
    assert compiled_calls
    assert compiled._softprompt.runner.graphs.statistics.replayed >= 3


def test_evaluation_is_not_compiled(compiled_calls):
    _, compiled = models("llama")
    with torch.no_grad():
        compiled(**make_batch())
    assert not compiled_calls


def test_a_compiler_that_fails_is_named_once_and_left_out(monkeypatch):
    def broken(graph, inputs):
        raise RuntimeError("no compiler here")

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=broken))
    eager, compiled = models("llama")
    batch = make_batch()
    with pytest.warns(UserWarning, match="torch.compile of the decoder failed, it runs as it is"):
        loss = compiled(**batch).loss
    assert_close(loss.detach(), eager(**batch).loss.detach(), 1e-12, "loss")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compiled(**batch).loss.backward()
    assert "BackendCompilerFailed" in dict(softprompt.explain(compiled).details)["torch.compile"]
