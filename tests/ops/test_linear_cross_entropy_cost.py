"""What `linear_cross_entropy` computes and allocates, and how it meets torch.compile and the GPU compiler."""

import itertools
import math

import pytest
import torch
from head_problem import DEVICE, IGNORED, loss_and_gradients, problem
from torch.utils._python_dispatch import TorchDispatchMode

from softprompt.ops.linear_cross_entropy import chunked, linear_cross_entropy
from softprompt.ops.linear_cross_entropy.reference import linear_cross_entropy_ref

# The interpreter computes with the uninitialised padding of the logits, which the kernel then discards.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")


@pytest.fixture(params=["reference", "triton"])
def backend(request):
    if request.param == "triton":
        pytest.importorskip("triton")
    return request.param


class Recorder(TorchDispatchMode):
    """Names and output shapes of all operations, those inside the op included."""

    def __init__(self):
        super().__init__()
        self.calls = []
        self.kernels = {
            chunked._LOSSES: chunked._losses,
            chunked._D_HIDDEN: chunked._d_hidden,
            chunked._D_HEAD: chunked._d_head,
        }

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
    losses, d_rows = chunked._losses(*case, *options, True, "reference")
    d_hidden = chunked._d_hidden(d_rows, losses, case[3], 20, torch.bfloat16)
    d_weight, d_bias = chunked._d_head(*case, losses, *options, True, True, "reference")
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


def kernel_case(dtype, loss_dtype, block, bias=False, softcap=None, smoothing=0.0):
    pointers = {"logits_ptr": dtype, "targets_ptr": "i64", "losses_ptr": loss_dtype}
    pointers |= {"bias_ptr": dtype, "grad_losses_ptr": loss_dtype} if bias else {}
    constants = {
        "SOFTCAP": softcap,
        "LOGIT_SCALE": 1.0,
        "LABEL_SMOOTHING": smoothing,
        "GRADIENT": True,
        "BLOCK": block,
        "GROUP": {"bf16": 8, "fp32": 4, "fp64": 2}[dtype],
        **({} if bias else {"bias_ptr": None, "grad_losses_ptr": None}),
    }
    order = ["logits_ptr", "bias_ptr", "targets_ptr", "losses_ptr", "grad_losses_ptr"]
    order += ["vocab_size", "row_length", "ignore_index"]
    order += [name for name in constants if name.isupper()]
    return {
        "module": "softprompt.ops.linear_cross_entropy.triton",
        "kernel": "_rows_loss_and_gradient",
        "signature": [
            [name, "constexpr" if name in constants else f"*{pointers[name]}" if name in pointers else "i32"]
            for name in order
        ],
        "constexprs": constants,
        "divisible": [*pointers, "row_length"],
        "num_warps": block // 512,
    }


def test_the_kernel_compiles_for_three_generations_of_gpus_without_spilling(compile_kernels):
    cases = [
        kernel_case("bf16", "fp32", 16384),
        kernel_case("fp32", "fp32", 8192, bias=True, softcap=30.0, smoothing=0.1),
    ]
    records = compile_kernels(cases)
    assert [record["arch"] for record in records] == [80, 90, 100] * len(cases)
    assert all(
        record["cubin_bytes"] > 0 and not record["stack"] and not record["local"] for record in records
    )
    # 1,024 threads have 64 registers each.
    assert max(record["registers"] for record in records[:3]) <= 64
