"""What `shared_prompt_attention` costs the host, and how it lives with the rest of PyTorch."""

import pytest
import torch
from attention_problem import (
    BACKENDS,
    DEVICE,
    HEADS,
    OPTIONS,
    hold,
    layout_of,
    packed_batch,
    results,
    tensors,
    with_vectors,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from softprompt.ops.shared_prompt_attention import AttentionLayout, shared_prompt_attention


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    return hold(monkeypatch, request.param)


@pytest.fixture(params=["dense", "padded"])
def form(request, monkeypatch):
    hold(monkeypatch, request.param)
    return request.param


def test_layers_share_what_is_prepared_for_the_step(form):
    layout = layout_of("ragged prompts")
    inputs = tensors(layout)
    slopes = torch.rand(4, device=DEVICE)

    def layers():
        for options in ({}, {"alibi_slopes": slopes}, {"sliding_window": 2}):
            shared_prompt_attention(*inputs, layout, backend="sdpa", **options)
        return dict(layout.plans)

    first, second = layers(), layers()
    assert first.keys() == second.keys()
    assert all(second[key] is plan for key, plan in first.items())
    assert ("texts" in first) == (form == "padded")


def test_other_slopes_are_never_served_from_the_plans(form):
    layout = layout_of("ragged prompts")
    inputs = tensors(layout)
    for seed in range(5):  # each tensor is freed before the next is made, so that addresses repeat
        slopes = torch.rand(4, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
        out = shared_prompt_attention(*inputs, layout, backend="sdpa", alibi_slopes=slopes)
        expected = shared_prompt_attention(*inputs, layout, backend="reference", alibi_slopes=slopes)
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("num_texts, dense", [(1, True), (2, True), (8, False), (32, False)])
def test_few_short_texts_run_densely_and_many_padded(num_texts, dense):
    layout = packed_batch(["r" * 40] * num_texts, [8])[1].attention
    inputs = tensors(layout, (8, 8, 64, 64), torch.float32)
    shared_prompt_attention(*inputs, layout, backend="sdpa")
    assert any(key[0] == "dense" for key in layout.plans) == dense
    assert ("texts" in layout.plans) != dense


class Recorder(TorchDispatchMode):
    """Names of all operations."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._schema.name.removeprefix("aten::"))
        return func(*args, **(kwargs or {}))


READS = {
    "_local_scalar_dense",
    "item",
    "nonzero",
    "masked_select",
    "equal",
    "is_nonzero",
    "repeat_interleave",
}


@pytest.mark.parametrize("options", ["none", "all"])
@pytest.mark.parametrize("batch", ["ragged prompts", "left, predictors", "empty texts"])
def test_the_host_reads_nothing(backend, batch, options):
    layout = layout_of(batch)
    inputs = tensors(layout, HEADS[1])
    options = with_vectors(OPTIONS[options], 4)
    with Recorder() as recorder:
        results(inputs, layout, options, backend=backend)
    assert len(recorder.names) > (3 if backend in ("triton", "native") else 10)
    assert not READS & set(recorder.names)


@pytest.mark.parametrize("options", ["none", "all"])
def test_no_shape_and_no_branch_depends_on_what_tensors_hold(backend, options):
    layout = layout_of("ragged prompts")
    mode = FakeTensorMode()

    def without_data(value):
        return mode.from_tensor(value) if isinstance(value, torch.Tensor) else value

    fields = [getattr(layout, name) for name in AttentionLayout.__dataclass_fields__ if name != "plans"]
    fake_layout = AttentionLayout(*map(without_data, fields))
    inputs = [without_data(x) for x in tensors(layout, HEADS[1])]
    options = {name: without_data(x) for name, x in with_vectors(OPTIONS[options], 4).items()}
    with mode:  # raises where a value would be needed
        out = shared_prompt_attention(*inputs, fake_layout, backend=backend, **options)
        gradients = torch.autograd.grad(out.sum(), inputs)
    assert out.shape == (4, layout.num_rows, HEADS[1][3])
    assert [x.shape for x in gradients] == [x.shape for x in inputs]


def test_the_recorder_would_see_a_read():
    with Recorder() as recorder:
        values = torch.arange(3, device=DEVICE)
        (values > 1).nonzero()
        values.max().item()
    assert {"nonzero", "_local_scalar_dense"} <= set(recorder.names)


@pytest.mark.skipif(DEVICE != "cpu", reason="looks at the choice of the CPU kernel")
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", ["none", "alibi", "window 3"])
def test_the_cpu_runs_its_flash_kernel_forward_and_backward(form, heads, dtype, options):
    layout = layout_of("right, dummies")
    inputs = tensors(layout, heads, dtype)
    with Recorder() as recorder:
        results(inputs, layout, with_vectors(OPTIONS[options], heads[0]), backend="sdpa")
    calls = 1 if form == "dense" else 2
    kernel = "_scaled_dot_product_flash_attention_for_cpu"
    assert recorder.names.count(kernel) == calls
    assert recorder.names.count(f"{kernel}_backward") == calls
    assert not {"_softmax", "_safe_softmax", "index_add_", "index_put_"} & set(recorder.names)


def op_arguments(inputs, layout):
    return (
        *inputs,
        *layout.fields(),
        0.4,
    )


@pytest.mark.slow
def test_opcheck(backend):
    layout = layout_of("right, dummies")
    inputs = tensors(layout)
    operator = torch.ops.softprompt.shared_prompt_attention.default
    torch.library.opcheck(operator, op_arguments(inputs, layout), {"sliding_window": 2, "backend": backend})


@pytest.mark.parametrize("options", ["none", "alibi", "all"])
def test_the_op_gives_what_the_function_gives(backend, options):
    layout = layout_of("ragged prompts")
    inputs = tensors(layout, HEADS[1])
    options = {**with_vectors(OPTIONS[options], 4), "scale": 0.4, "backend": backend}
    expected = shared_prompt_attention(*inputs, layout, **options)
    options.pop("scale")
    out = torch.ops.softprompt.shared_prompt_attention(*op_arguments(inputs, layout), **options)
    torch.testing.assert_close(out, expected, rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["dense", "padded", "triton"], indirect=True)
def test_a_compiled_call_is_one_graph_and_equals_the_eager_one(form):
    backend = "triton" if form == "triton" else "sdpa"
    layout = layout_of("ragged prompts")
    inputs = tensors(layout, HEADS[1])
    slopes = torch.rand(4, device=DEVICE)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def two_layers(query, key, value):
        first = shared_prompt_attention(query, key, value, layout, backend=backend, sliding_window=3)
        second = shared_prompt_attention(query, key, value, layout, backend=backend, alibi_slopes=slopes)
        return first + second

    out = two_layers(*inputs)
    grad = torch.randn_like(out)
    options = [{"sliding_window": 3}, {"alibi_slopes": slopes}]
    eager = [results(inputs, layout, option, grad, backend="reference") for option in options]
    compiled = [out, *torch.autograd.grad(out, inputs, grad)]
    for value, one, other in zip(compiled, *eager, strict=True):
        torch.testing.assert_close(value, one + other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("form", ["padded"], indirect=True)
def test_a_second_derivative_is_refused(form):
    layout = layout_of("right")
    inputs = tensors(layout)
    out = shared_prompt_attention(*inputs, layout, backend="sdpa", softcap=1.0)
    (gradient,) = torch.autograd.grad(out.square().sum(), inputs[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_the_kernels_refuse_a_second_derivative(monkeypatch):
    layout = layout_of("right")
    inputs = tensors(layout)
    out = shared_prompt_attention(*inputs, layout, backend=hold(monkeypatch, "triton"))
    (gradient,) = torch.autograd.grad(out.square().sum(), inputs[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once, got a second derivative"):
        gradient.sum().backward()


@pytest.mark.parametrize("batch", ["ragged prompts", "right"])
def test_autocast_decides_the_dtype(backend, batch):
    layout = layout_of(batch)
    query, key, value = tensors(layout, dtype=torch.float32)
    slopes = torch.rand(4, device=DEVICE)
    halves = [x.detach().bfloat16().requires_grad_() for x in (query, key, value)]
    mixed = (query, key, value.detach().bfloat16().requires_grad_())
    with torch.autocast(DEVICE, torch.bfloat16):
        out = shared_prompt_attention(*mixed, layout, alibi_slopes=slopes, backend=backend)
    assert out.dtype == torch.bfloat16
    grad = torch.ones_like(out)
    expected = results(halves, layout, {"alibi_slopes": slopes}, grad, backend=backend)
    for result, wanted in zip((out, *torch.autograd.grad(out, mixed, grad)), expected, strict=True):
        torch.testing.assert_close(result.to(wanted.dtype), wanted, rtol=0, atol=0)
