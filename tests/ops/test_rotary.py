import itertools

import pytest
import torch
from backends import BACKENDS, DEVICE
from elementwise import (
    DTYPES,
    IGNORED_WARNINGS,
    assert_compiles_into_one_graph,
    assert_errs_like_pytorch,
    assert_takes_batches_of_gradients,
    numbers,
    outputs_and_gradients,
    refuses,
)
from marks import slow_unless
from poison import poisoned_buffers

from softprompt.ops.rotary import rotary

# Query heads, key heads, tokens, D, R: all of a head or a part, sizes that are no powers of two, more heads
# than share a program, none.
SIZES = {
    "llama": (4, 2, 6, 16, 16),
    "gpt-neox": (3, 3, 5, 12, 4),
    "uneven": (5, 1, 3, 10, 6),
    "wide": (2, 1, 3, 80, 80),
    "many heads": (9, 3, 20, 8, 8),
    "one pair": (1, 1, 1, 2, 2),
    "nothing turned": (2, 1, 3, 5, 0),
    "no keys": (2, 0, 3, 4, 4),
}
pytestmark = pytest.mark.filterwarnings(IGNORED_WARNINGS)


def definition(interleaved):
    """Each pair is turned on its own."""

    def turned(x, cos, sin):
        rotated = cos.shape[1]
        first = torch.arange(0, rotated, 2) if interleaved else torch.arange(rotated // 2)
        second = first + (1 if interleaved else rotated // 2)
        out = x.clone()
        out[..., first] = x[..., first] * cos[:, first] - x[..., second] * sin[:, first]
        out[..., second] = x[..., second] * cos[:, second] + x[..., first] * sin[:, second]
        return out

    return lambda query, key, cos, sin: (turned(query, cos, sin), turned(key, cos, sin))


def composed(interleaved):
    """`apply_rotary_pos_emb` of transformers, for Llama, GPT-NeoX and (interleaved) GPT-J."""

    def rotate(x):
        if interleaved:
            return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
        half = x.shape[-1] // 2
        return torch.cat((-x[..., half:], x[..., :half]), -1)

    def turned(x, cos, sin):
        cos, sin = cos.to(x.dtype), sin.to(x.dtype)
        part, rest = x[..., : cos.shape[1]], x[..., cos.shape[1] :]
        return torch.cat((part * cos + rotate(part) * sin, rest), -1)

    return lambda query, key, cos, sin: (turned(query, cos, sin), turned(key, cos, sin))


def run_with(backend, interleaved=False):
    return lambda *given: rotary(*given, interleaved=interleaved, backend=backend)


def inputs_of(name, dtype=torch.float32, angle_dtype=None):
    heads, key_heads, tokens, width, rotated = SIZES[name]
    query, key = numbers(heads, tokens, width, dtype=dtype), numbers(key_heads, tokens, width, dtype=dtype)
    # Not of angles: a scaled rotary embedding has longer vectors, and nothing says that halves are equal.
    angles = [numbers(tokens, rotated, dtype=angle_dtype or dtype, seed=seed).detach() for seed in (1, 2)]
    return query, key, *angles


def assert_right(backend, interleaved, *inputs):
    assert_errs_like_pytorch(
        run_with(backend, interleaved), composed(interleaved), definition(interleaved), *inputs
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.parametrize(
    "name, dtype",
    slow_unless(
        lambda case: case[0] == "uneven" or case[1] == torch.float32,
        list(itertools.product(SIZES, DTYPES)),
    ),
    ids=str,
)
def test_the_error_is_at_most_twice_that_of_pytorch(name, dtype, interleaved, backend):
    assert_right(backend, interleaved, *inputs_of(name, dtype))


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_set_of_instructions_errs_as_little(instruction_set, dtype, interleaved):
    for name in SIZES:
        assert_right("native", interleaved, *inputs_of(name, dtype))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("angle_dtype", DTYPES, ids=str)
def test_cosines_of_any_dtype_are_taken_as_they_are(angle_dtype, backend):
    assert_right(backend, False, *inputs_of("uneven", torch.bfloat16, angle_dtype))


@pytest.mark.parametrize("backend", BACKENDS)
def test_angles_turn_vectors(backend):
    """Those of two tokens have a product that depends on the distance alone."""
    query, key, _, _ = inputs_of("llama", torch.float64)
    query, key = query[:1, :1].expand(1, 6, 16).detach(), key[:1, :1].expand(1, 6, 16).detach()
    angles = torch.arange(6, device=DEVICE)[:, None] * 0.7 ** torch.arange(8, device=DEVICE).double()
    angles = torch.cat([angles, angles], 1)
    turned = rotary(query, key, angles.cos(), angles.sin(), backend=backend)
    products = turned[0][0] @ turned[1][0].T
    for distance in range(-5, 6):
        diagonal = products.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
def test_strided_inputs_give_the_same_heads_as_dense_ones(interleaved, backend):
    angles = numbers(6, 12).detach()
    halves, alternating = (angles[:, :6], angles[:, 6:]), (angles[:, ::2], angles[:, 1::2])
    cases = {
        "one of three in one tensor": (numbers(6, 3, 4, 8)[:, 1].transpose(0, 1), halves),
        "entries apart": (numbers(4, 6, 16)[..., ::2], alternating),
        "one head many times": (numbers(1, 6, 8).expand(4, 6, 8), alternating),
        "tokens side by side": (numbers(4, 8, 6).transpose(1, 2), halves),
    }
    for name, (heads, turned_by) in cases.items():
        given = [heads.detach(), heads.detach()[1:3], *turned_by]
        assert not given[0].is_contiguous(), name
        found = []
        for tensors in (given, [tensor.contiguous() for tensor in given]):
            leaves = [tensor.detach().requires_grad_() for tensor in tensors[:2]]
            with poisoned_buffers():
                found.append(outputs_and_gradients(run_with(backend, interleaved), *leaves, *tensors[2:]))
        for mine, right in zip(*found, strict=True):
            torch.testing.assert_close(mine, right, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_heads_of_a_token_stand_together(backend):
    query, key, cos, sin = inputs_of("llama")
    for out in rotary(query, key, cos, sin, backend=backend):
        assert out.transpose(0, 1).is_contiguous()


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_tokens_give_nothing(backend):
    query, key, cos, sin = inputs_of("llama")
    query, key = query.detach()[:, :0].requires_grad_(), key.detach()[:, :0].requires_grad_()
    found = outputs_and_gradients(run_with(backend), query, key, cos[:0], sin[:0])
    assert [tensor.shape for tensor in found] == 2 * [query.shape, key.shape]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_no_number_stays_in_its_pair(dtype, backend):
    query, key, cos, sin = (tensor.detach() for tensor in inputs_of("gpt-neox", dtype))
    clean = rotary(query, key, cos, sin, backend=backend)[0]
    for bad in (float("inf"), -float("inf"), float("nan")):
        spoiled = query.clone()
        spoiled[1, 2, 1] = bad
        spoiled[2, 3, 7] = bad
        out = rotary(spoiled, key, cos, sin, backend=backend)[0]
        expected = clean.clone()
        expected[1, 2, [1, 3]] = composed(False)(spoiled, key, cos, sin)[0][1, 2, [1, 3]]
        expected[2, 3, 7] = bad
        torch.testing.assert_close(out, expected, rtol=0.02, atol=0, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
def test_gradcheck(interleaved, backend):
    inputs = [tensor.detach()[:, :2] for tensor in inputs_of("uneven", torch.float64)[:2]]
    angles = [tensor[:2] for tensor in inputs_of("uneven", torch.float64)[2:]]
    leaves = [tensor[:2].clone().requires_grad_() for tensor in inputs]

    def run(query, key):
        return rotary(query, key, *angles, interleaved=interleaved, backend=backend)

    # Every entry of a Jacobian would be a launch of the interpreter.
    assert torch.autograd.gradcheck(run, leaves, fast_mode=backend == "triton")
    if backend != "triton":
        assert torch.autograd.gradgradcheck(run, leaves)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_gradient_of_one_output_alone(backend):
    query, key, cos, sin = inputs_of("gpt-neox")
    out = rotary(query, key, cos, sin, backend=backend)
    d_query, d_key = torch.autograd.grad(out[0].sum(), (query, key), allow_unused=True)
    expected = torch.autograd.grad(definition(False)(query, key, cos, sin)[0].sum(), query)[0]
    torch.testing.assert_close(d_query, expected)
    assert not d_key.any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("transposed", [False, True])
def test_the_op_is_registered_correctly(transposed, backend):
    query, key, cos, sin = inputs_of("gpt-neox")
    arguments = (query.transpose(0, 1), key.transpose(0, 1), cos, sin, False, transposed, backend)
    torch.library.opcheck(torch.ops.softprompt.rotary.default, arguments)


@pytest.mark.parametrize("backend", BACKENDS)
def test_batches_of_gradients(backend):
    query, key, cos, sin = inputs_of("gpt-neox")
    assert_takes_batches_of_gradients(lambda query, key: run_with(backend)(query, key, cos, sin), query, key)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_it_compiles_into_one_graph_with_its_gradients(backend):
    assert_compiles_into_one_graph(run_with(backend), *inputs_of("gpt-neox"))


ONES = torch.ones(2, 3, 4)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"query": ONES[0]}, r"must be \[heads, N, D\] of one dtype, got \[3, 4\] in torch.float32"),
        ({"key": ONES[:, :2]}, r"\[2, 3, 4\] in torch.float32 and \[2, 2, 4\] in torch.float32"),
        ({"key": ONES.half()}, r"of one dtype, got .* and \[2, 3, 4\] in torch.float16"),
        ({"cos": ONES[0, :2]}, r"cos and sin must be \[N, R\] of one dtype with N = 3, got \[2, 4\]"),
        ({"sin": ONES[0, :, :2]}, r"got \[3, 4\] in torch.float32 and \[3, 2\] in torch.float32"),
        ({"sin": ONES[0].half()}, r"and \[3, 4\] in torch.float16"),
        ({"cos": ONES[0, :, :3], "sin": ONES[0, :, :3]}, "R must be even and at most D = 4, got 3"),
        ({"cos": torch.ones(3, 6), "sin": torch.ones(3, 6)}, "R must be even and at most D = 4, got 6"),
        ({"cos": ONES[0].clone().requires_grad_()}, "cos gets no gradient; pass it detached"),
        ({"query": ONES.long()}, "query must be fp16, bf16, fp32 or fp64, got torch.int64"),
        ({"cos": ONES[0].to("meta")}, "rotary: all tensors must be on one device"),
        ({"backend": "numpy"}, "rotary: unknown backend 'numpy'"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(change, message):
    refuses(rotary, message, {"query": ONES, "key": ONES, "cos": ONES[0], "sin": ONES[0]}, change)
