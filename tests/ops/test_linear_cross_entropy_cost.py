"""What `linear_cross_entropy` computes and allocates, and how it meets torch.compile and the GPU compiler."""

import inspect
import itertools
import math

import pytest
import torch
from backends import BACKENDS
from head_problem import DEVICE, IGNORED, count_launches, loss_and_gradients, problem
from marks import slow_unless
from poison import poisoned_buffers
from torch.utils._python_dispatch import TorchDispatchMode

from softprompt.ops.linear_cross_entropy import chunked, linear_cross_entropy, reduction
from softprompt.ops.linear_cross_entropy.reference import linear_cross_entropy_ref
from softprompt.ops.registry import KERNELS

kernels = pytest.importorskip("softprompt.ops.linear_cross_entropy.triton")

# The interpreter computes with the minus infinity beyond the vocabulary, which the kernel then discards.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


class Recorder(TorchDispatchMode):
    """Names and output shapes of all operations, those inside the op included."""

    def __init__(self):
        super().__init__()
        self.calls = []
        self.kernels = {op: KERNELS[op] for op in (chunked._LOSSES, chunked._D_HIDDEN, chunked._D_HEAD)}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in self.kernels:
            with self:
                return self.kernels[func](*args, **(kwargs or {}))
        out = func(*args, **(kwargs or {}))
        outputs = out if isinstance(out, tuple | list) else [out]
        shapes = [tuple(x.shape) for x in outputs if isinstance(x, torch.Tensor) and x.is_floating_point()]
        self.calls.append((func.overloadpacket.__name__, shapes))
        return out

    def count(self, name):
        return sum(name == call for call, _ in self.calls)

    def made(self):
        """Shapes of floating-point tensors by the operations that are not views."""
        views = ("t", "detach", "slice", "expand", "unsqueeze", "alias")
        return [shape for name, shapes in self.calls if name not in views for shape in shapes]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_chunks_give_what_one_chunk_gives(backend, dtype, monkeypatch):
    case = problem(dtype=dtype)
    whole = loss_and_gradients(linear_cross_entropy, *case, backend=backend)
    for name in ("_CPU_CHUNK_BYTES", "_GPU_CHUNK_BYTES", "_ACCUMULATOR_BYTES"):
        monkeypatch.setattr(chunked, name, 1)
    monkeypatch.setattr(chunked, "_GPU_CHUNK_ROWS", 2)
    with Recorder() as recorder:
        parts = loss_and_gradients(linear_cross_entropy, *case, backend=backend)
    assert recorder.count("mm") > 3
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(parts, whole, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    "num_rows, row_bytes, device", [(0, 1000, "cpu"), (5000, 513024, "cuda"), (400, 1003520, "cpu")]
)
def test_chunks_cover_all_rows_and_hold_at_least_the_fewest(num_rows, row_bytes, device):
    chunks = list(chunked.chunk_bounds(num_rows, row_bytes, device))
    assert list(itertools.chain(*[range(c.start, c.stop) for c in chunks])) == list(range(num_rows))
    lengths = [c.stop - c.start for c in chunks]
    fewest = 1024 if device == "cuda" else (128 << 20) // row_bytes
    assert all(fewest <= length < 2 * fewest for length in lengths)


def test_a_frozen_head_costs_two_products_and_only_the_label_rows_meet_the_vocabulary(backend):
    hidden, weight, _, label_rows, targets = problem(vocab_size=512, num_rows=60)
    with Recorder() as recorder:
        losses = linear_cross_entropy(
            hidden, weight.detach(), label_rows, targets, reduction="none", backend=backend
        )
        saved = [tuple(x.shape) for x in losses.grad_fn.saved_tensors if x is not None]
        losses.sum().backward()
    assert recorder.count("mm") == 2
    assert max(math.prod(shape) for shape in recorder.made()) <= len(label_rows) * 512
    assert saved == [(9, 24), (9,)]


@pytest.mark.parametrize("why", ["nothing requires a gradient", "no_grad", "inference_mode"])
def test_without_a_gradient_only_the_loss_is_computed(backend, why):
    case = problem()
    expected = linear_cross_entropy_ref(*case[:2], *case[3:], bias=case[2])
    if why == "nothing requires a gradient":
        case = [x.detach() for x in case]
    context = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}.get(why, torch.enable_grad)
    with context(), Recorder() as recorder:
        loss = linear_cross_entropy(*case[:2], *case[3:], bias=case[2], backend=backend)
    assert recorder.count("mm") == 1
    torch.testing.assert_close(loss, expected.detach())
    assert not loss.requires_grad


def test_a_transposed_weight_is_not_copied(backend):
    hidden, weight, _, label_rows, targets = problem(vocab_size=300)
    transposed = weight.detach().t().contiguous().t()
    with Recorder() as recorder:
        loss_and_gradients(
            linear_cross_entropy, hidden, transposed, None, label_rows, targets, backend=backend
        )
    assert recorder.count("mm") == 2
    assert not {(300, 24), (24, 300)}.intersection(recorder.made())


@pytest.mark.parametrize("op", ["losses", "d_hidden", "d_head"])
@pytest.mark.parametrize("rows_given", [True, False])
def test_opcheck(op, rows_given):
    hidden, weight, bias, label_rows, targets = problem(11, torch.float32)
    if not rows_given:
        label_rows, targets = None, torch.nn.functional.pad(targets, (0, 11), value=IGNORED)
    options = (3.0, 0.5, 0.1, IGNORED)
    num_labels = targets.shape[0]
    grad = torch.rand(num_labels, device=DEVICE)
    d_rows = torch.rand(num_labels, 24, device=DEVICE)
    frozen = [x.detach() for x in (hidden, weight, bias)]
    function, arguments = {
        "losses": (chunked._LOSSES, (hidden, weight, bias, label_rows, targets, *options, True, "auto")),
        "d_hidden": (chunked._D_HIDDEN, (d_rows, grad, label_rows, 20, torch.float32)),
        "d_head": (chunked._D_HEAD, (*frozen, label_rows, targets, grad, *options, True, True, "auto")),
    }[op]
    torch.library.opcheck(function, arguments)


@pytest.mark.slow
@pytest.mark.parametrize("rows_given, dynamic", [(True, True), (False, False)])
def test_it_compiles_without_a_graph_break(backend, rows_given, dynamic):
    hidden, weight, bias, label_rows, targets = problem(dtype=torch.float32)
    if not rows_given:
        label_rows, targets = None, torch.nn.functional.pad(targets, (0, 11), value=IGNORED)

    torch.compiler.reset()

    def step(hidden, weight, bias, num_items):
        loss = linear_cross_entropy(
            hidden, weight, label_rows, targets, bias=bias, num_items=num_items, softcap=9.0, backend=backend
        )
        return loss * 2

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for num_items in (None, torch.tensor(4, device=DEVICE)):
        results = []
        for function in (step, compiled):
            loss = function(hidden, weight, bias, num_items)
            results.append([loss.detach(), *torch.autograd.grad(loss, (hidden, weight, bias))])
        torch.testing.assert_close(*results)
    with torch.autocast(DEVICE, torch.bfloat16):
        torch.testing.assert_close(compiled(hidden, weight, bias, None), step(hidden, weight, bias, None))


def test_no_value_is_read_back_on_a_device_other_than_the_cpu():
    # Tensors of the meta device have no values: reading one, or sizing a tensor by one, raises.
    case = [x.detach().to("meta") for x in problem(dtype=torch.bfloat16)]
    options = (2.0, 0.5, 0.1, IGNORED)
    losses, d_rows = KERNELS[chunked._LOSSES](*case, *options, True, "reference")
    d_hidden = KERNELS[chunked._D_HIDDEN](d_rows, losses, case[3], 20, torch.bfloat16)
    d_weight, d_bias = KERNELS[chunked._D_HEAD](*case, losses, *options, True, True, "reference")
    assert [x.shape for x in (d_hidden, d_weight, d_bias)] == [x.shape for x in case[:3]]


@pytest.mark.gpu
def test_the_gpu_call_makes_no_host_synchronisation(backend):
    case = problem(dtype=torch.bfloat16)
    loss_and_gradients(linear_cross_entropy, *case, backend=backend)
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss_and_gradients(linear_cross_entropy, *case, backend=backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def kernel_case(kernel, dtype="bf16", loss_dtype="fp32", block=8192, bias=False, softcap=None, smoothing=0.0):
    """`_rows_loss_and_gradient` and the two kernels of split rows, as a launch specialises them."""
    pointers = {
        "logits_ptr": dtype,
        "targets_ptr": "i64",
        "losses_ptr": loss_dtype,
        "partials_ptr": loss_dtype,
    }
    pointers |= {"bias_ptr": dtype, "grad_losses_ptr": loss_dtype} if bias else {}
    names = list(inspect.signature(getattr(kernels, kernel).fn).parameters)
    constants = {
        "SOFTCAP": softcap,
        "LOGIT_SCALE": 1.0,
        "LABEL_SMOOTHING": smoothing,
        "GRADIENT": True,
        "SPLITS": 32,
        "BLOCK": block,
        "GROUP": {"bf16": 8, "fp32": 4, "fp64": 2}[dtype],
        **({} if bias else {"bias_ptr": None, "grad_losses_ptr": None}),
    }
    constants = {name: value for name, value in constants.items() if name in names}
    return {
        "label": f"{kernel} {dtype}",
        "module": kernels.__name__,
        "kernel": kernel,
        "signature": [
            [name, "constexpr" if name in constants else f"*{pointers[name]}" if name in pointers else "i32"]
            for name in names
        ],
        "constexprs": constants,
        "divisible": [name for name in (*pointers, "row_length", "share_length") if name in names],
        "num_warps": block // kernels.COLUMNS_PER_WARP,
    }


def reduction_case(count):
    names = list(inspect.signature(kernels._reduce_losses.fn).parameters)
    types = {
        **{"losses_ptr": "*fp32", "targets_ptr": "*i64", "total_ptr": "*fp32", "factor_ptr": "*fp32"},
        "divisor": "fp32",
    }
    constants = {
        "COUNT": count,
        "BLOCK": 1024,
        "num_items_ptr": None,
        "losses_stride": 1,
        "targets_stride": 1,
    }
    return {
        "label": f"_reduce_losses {'counted' if count else 'divided'}",
        "module": kernels.__name__,
        "kernel": "_reduce_losses",
        "signature": [[n, "constexpr" if n in constants else types.get(n, "i32")] for n in names],
        "constexprs": constants,
        "num_warps": 4,
    }


COMPILE_CASES = [
    kernel_case("_rows_loss_and_gradient"),
    kernel_case("_rows_loss_and_gradient", "fp32", bias=True, softcap=30.0, smoothing=0.1),
    kernel_case("_partial_sums", block=kernels.SPLIT_BLOCK),
    kernel_case("_partial_sums", "fp32", block=kernels.SPLIT_BLOCK, bias=True, softcap=30.0, smoothing=0.1),
    kernel_case("_loss_and_gradient_of_shares", block=kernels.SPLIT_BLOCK),
    kernel_case(
        "_loss_and_gradient_of_shares",
        "fp32",
        block=kernels.SPLIT_BLOCK,
        bias=True,
        softcap=30.0,
        smoothing=0.1,
    ),
    reduction_case(True),
    reduction_case(False),
]


@pytest.mark.slow
def test_the_kernels_compile_for_three_generations_of_gpus_without_spilling(compile_kernels):
    records = compile_kernels(COMPILE_CASES)
    assert [record["arch"] for record in records] == [80, 90, 100] * len(COMPILE_CASES)
    for record in records:
        assert record["cubin_bytes"] > 0
        assert (record["stack"], record["local"]) == (0, 0), record
        # Two programs of 512 threads, or four of 256, share the 65,536 registers of a multiprocessor; with
        # every option in fp32 there is one and two.
        assert record["registers"] <= (64 if "bf16" in record["label"] else 128), record


@pytest.mark.parametrize(
    "num_rows, row_length, expected",
    [(8, 250880, 32), (128, 250880, 2), (255, 250880, 2), (256, 250880, 1), (1, 128256, 32), (8, 4096, 1)],
)
def test_few_rows_are_split_until_they_fill_a_gpu(num_rows, row_length, expected):
    assert kernels.splits_of(num_rows, row_length) == expected


@pytest.mark.parametrize("num_rows", [1, 3, 9])
@pytest.mark.parametrize("vocab_size", slow_unless([16, 131], [16, 131, 400]))
@pytest.mark.parametrize("options", [{}, {"softcap": 3.0, "label_smoothing": 0.1}], ids=["plain", "all"])
def test_split_rows_give_what_whole_rows_give(vocab_size, num_rows, options, monkeypatch):
    hidden, weight, bias, _, _ = problem(vocab_size, torch.float32)
    rows = torch.arange(num_rows, device=DEVICE)
    targets = torch.arange(num_rows, device=DEVICE) * 13 % vocab_size
    targets[-1] = vocab_size - 1
    targets[num_rows // 2] = IGNORED if num_rows > 1 else targets[0]
    case = hidden, weight, bias, rows, targets
    whole = loss_and_gradients(linear_cross_entropy, *case, backend="triton", **options)
    monkeypatch.setattr(kernels, "SPLIT_BLOCK", 32)
    assert kernels.splits_of(num_rows, vocab_size) == max(
        1, kernels.triton.next_power_of_2(-(-vocab_size // 32))
    )
    with poisoned_buffers():
        split = loss_and_gradients(linear_cross_entropy, *case, backend="triton", **options)
    torch.testing.assert_close(split, whole)


@pytest.mark.parametrize("num_items", [None, 0, 7, 2.5, "tensor", "zero tensor"])
@pytest.mark.parametrize("num_rows", [0, 1, 2500])
def test_the_reduction_is_the_sum_over_the_items(num_rows, num_items, backend):
    generator = torch.Generator().manual_seed(3)
    losses = torch.rand(num_rows, generator=generator).to(DEVICE).requires_grad_()
    targets = torch.randint(-1, 3, (num_rows,), generator=generator).to(DEVICE)
    if isinstance(num_items, str):
        num_items = torch.tensor([0 if num_items == "zero tensor" else 9], device=DEVICE)
    expected = (targets != -1).sum() if num_items is None else torch.as_tensor(num_items)
    expected = max(1, float(expected)) if num_items is None else float(expected) or 1.0
    with poisoned_buffers():
        total = reduction.reduce_losses(
            losses, targets, num_items=num_items, reduction="mean", ignore_index=-1, backend=backend
        )
    (grad,) = torch.autograd.grad(total, losses)
    torch.testing.assert_close(
        total.detach().double(),
        losses.detach().double().sum() / expected,
        check_dtype=False,
        rtol=1e-6,
        atol=0,
    )
    torch.testing.assert_close(grad, torch.full_like(losses, 1 / expected))


@pytest.mark.parametrize("num_items", [None, 4.0])
def test_opcheck_of_the_reduction(num_items, backend):
    losses = torch.rand(5, device=DEVICE, requires_grad=True)
    targets = torch.tensor([1, IGNORED, 0, 2, IGNORED], device=DEVICE)
    tensor = None if num_items is None else torch.tensor(num_items, device=DEVICE)
    torch.library.opcheck(reduction._REDUCE, (losses, targets, tensor, 0.0, IGNORED, backend))


@pytest.mark.gpu
def test_the_losses_of_few_rows_take_at_most_eight_launches(backend):
    if backend != "triton":
        pytest.skip("counts the Triton route")
    case = problem(dtype=torch.bfloat16, vocab_size=16384, bias=False)
    hidden, weight, _, label_rows, targets = case

    def run():
        linear_cross_entropy(hidden, weight.detach(), label_rows, targets, backend="triton")

    # The gather, two products (each may be cut into two by cuBLAS), the two row kernels and the reduction.
    assert count_launches(run) <= 8
