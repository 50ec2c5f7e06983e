"""Every kernel of the compiled back ends once, at small sizes; the sanitize part of a GPU pass runs it."""

import re
from pathlib import Path

import pytest
import torch
from attention_problem import OPTIONS, assert_error_of_the_dtype, long_batch
from backends import DEVICE, backend_parameter
from head_problem import loss_and_gradients, problem
from poison import poisoned_buffers

from benchmarks.gpu import SANITIZED_KERNELS, TESTS
from softprompt.ops.embed_prompt import embed_prompt
from softprompt.ops.glu import ACTIVATIONS, glu
from softprompt.ops.linear_cross_entropy import linear_cross_entropy
from softprompt.ops.pack_layout import pack_layout
from softprompt.ops.prepend_prompt import prepend_prompt
from softprompt.ops.rms_norm import rms_norm
from softprompt.ops.rotary import rotary

ROOT = Path(__file__).parents[2]
# The interpreter has no bf16 arithmetic.
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
BACKENDS = [backend_parameter(name) for name in ("triton", "native")]
pytestmark = [
    *([pytest.mark.gpu] if DEVICE == "cuda" else []),
    # The interpreter computes with the minus infinity beyond the vocabulary, which the kernel then discards.
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
]


def batch_of(shape):
    """input_ids, attention_mask, labels: left-padded rows, some ids unknown."""
    generator = torch.Generator().manual_seed(shape[0])
    ids = torch.randint(-1, 12, shape, generator=generator)
    lengths = torch.randint(0, shape[1] + 1, (shape[0], 1), generator=generator)
    mask = (torch.arange(shape[1]) >= shape[1] - lengths).long()
    labels = torch.where(torch.arange(shape[1]) >= shape[1] - 3, ids, -100)
    return [tensor.to(DEVICE) for tensor in (ids, mask, labels)]


def embeddings(width=72, num_prompt_rows=9):
    """Table and prompts."""
    generator = torch.Generator().manual_seed(1)
    table, prompts = (torch.randn(rows, width, generator=generator) for rows in (11, num_prompt_rows))
    return table.to(DEVICE, DTYPE), prompts.to(DEVICE).requires_grad_()


def with_reference(backend, run):
    """What `run` gives on the back end, and on the reference."""
    with poisoned_buffers():
        found = run(backend)
    return zip(found, run("reference"), strict=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(3, 40), (70, 33)], ids=["one block", "many blocks"])
def test_pack_layout(shape, backend):
    ids, mask, labels = batch_of(shape)
    rows = torch.arange(shape[0], device=DEVICE) % 2
    for found, right in with_reference(
        backend,
        lambda name: pack_layout(
            mask, [3, 5], labels=labels, input_ids=ids, vocab_size=11, prompt_of_row=rows, backend=name
        ),
    ):
        assert torch.equal(found, right)


@pytest.mark.parametrize("backend", BACKENDS)
def test_embed_prompt_and_its_gradient(backend):
    ids, mask, _ = batch_of((4, 30))
    table, prompts = embeddings()
    index = pack_layout(mask, [9], capacity=140, backend="reference").token_index

    def run(name):
        out = embed_prompt(table, ids, index, prompts, backend=name)
        return out.detach(), *torch.autograd.grad(out.float().pow(2).sum(), prompts)

    for found, right in with_reference(backend, run):
        assert torch.equal(found, right)


@pytest.mark.parametrize("backend", BACKENDS)
def test_prepend_prompt_and_its_gradient(backend):
    ids, mask, labels = batch_of((4, 30))
    table, prompts = embeddings()
    rows = torch.tensor([2, 0, 2, 1], device=DEVICE)

    def run(name):
        out = prepend_prompt(
            table,
            ids,
            prompts,
            [3, 3, 3],
            attention_mask=mask,
            labels=labels,
            prompt_of_row=rows,
            backend=name,
        )
        (grad,) = torch.autograd.grad(out.inputs_embeds.float().pow(2).sum(), prompts)
        return *(tensor.detach() for tensor in out), grad

    for found, right in with_reference(backend, run):
        torch.testing.assert_close(found, right)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "vocab_size", [131, 20_001 if DEVICE == "cuda" else 5_001], ids=["whole rows", "split rows"]
)
def test_linear_cross_entropy_and_its_gradients(vocab_size, backend):
    case = problem(vocab_size, torch.float32)
    options = {"softcap": 5.0, "label_smoothing": 0.1, "num_items": None}
    for found, right in with_reference(
        backend, lambda name: loss_and_gradients(linear_cross_entropy, *case, backend=name, **options)
    ):
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS[:1])
@pytest.mark.parametrize("options", ["none", "all"])
def test_shared_prompt_attention_and_its_gradients(options, backend):
    batch, heads = (2, 9, [4, 3]), (2, 1, 16, 16)
    if DEVICE == "cuda":  # more than one block of 64
        batch, heads = (4, 50, [20, 3]), (4, 2, 64, 64)
    assert_error_of_the_dtype(long_batch(*batch), heads, OPTIONS[options], DTYPE, backend)


def rows_of(*shape, seed=0):
    """A leaf in the dtype of the tests."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))
    return values.to(DEVICE, DTYPE).requires_grad_()


def assert_gives_the_numbers_of_the_reference(backend, function, *leaves):
    """With the gradients."""

    def run(name):
        outputs = function(name)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        given = [rows_of(*out.shape, seed=1).detach() for out in outputs]
        return *(out.detach() for out in outputs), *torch.autograd.grad(outputs, leaves, given)

    for found, right in with_reference(backend, run):
        torch.testing.assert_close(found, right)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("width", [64, 576, 4096, 16400])
def test_rms_norm_and_its_gradient(width, backend):
    x, weight = rows_of(70 if width < 1000 else 3, width), rows_of(width).detach()
    assert_gives_the_numbers_of_the_reference(
        backend, lambda name: rms_norm(x, weight, eps=1e-5, offset=1.0, backend=name), x
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_glu_and_its_gradients(activation, backend):
    gate, up = rows_of(9, 1536), rows_of(9, 1536, seed=1)
    assert_gives_the_numbers_of_the_reference(
        backend, lambda name: glu(gate, up, activation=activation, backend=name), gate, up
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.parametrize("width, rotated", [(64, 64), (80, 32)])
def test_rotary_and_its_gradient(width, rotated, interleaved, backend):
    query, key = rows_of(9, 21, width), rows_of(3, 21, width)
    cos, sin = (rows_of(21, rotated, seed=seed).detach() for seed in (2, 3))
    assert_gives_the_numbers_of_the_reference(
        backend,
        lambda name: rotary(query, key, cos, sin, interleaved=interleaved, backend=name),
        query,
        key,
    )


def test_the_checkers_look_at_every_kernel_and_at_none_of_others():
    launched = [
        name
        for path in (ROOT / "softprompt/ops").rglob("*.py")
        for name in re.findall(r"^\s+(\w+)\[[^\n]+\]\($", path.read_text(), re.MULTILINE)
    ]
    assert len(set(launched)) >= 14
    assert [name for name in launched if not re.search(SANITIZED_KERNELS, name)] == []
    sources = [path.read_text() for path in (ROOT / "csrc/cuda").glob("*.cu")]
    assert sum("__global__" in text for text in sources) >= 4
    # Their mangled names hold the namespace.
    assert all("namespace softprompt {" in text for text in sources if "__global__" in text)
    assert re.search(SANITIZED_KERNELS, "_ZN10softprompt12_GLOBAL__N_110embed_rowsEv")
    assert not re.search(SANITIZED_KERNELS, "_ZN2at6native29vectorized_elementwise_kernelEv")


def test_a_gpu_pass_collects_every_test_of_a_gpu():
    """It names folders, so as not to import the tests of everything else."""
    marked = [
        path.relative_to(ROOT)
        for path in (ROOT / "tests").rglob("*.py")
        if "pytest.mark.gpu" in path.read_text(encoding="utf-8")
    ]
    assert len(marked) > 5
    helpers = {Path("tests/conftest.py"), Path("tests/helpers/backends.py")}
    outside = [
        path
        for path in marked
        if path not in helpers and not any(path.is_relative_to(folder) for folder in TESTS)
    ]
    assert outside == []
