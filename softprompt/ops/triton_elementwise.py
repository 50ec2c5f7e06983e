"""`rms_norm`, `glu` and `rotary`, and the gradients of the first two, in one Triton launch each.

All are bound by memory: every number is read once and written once, and computed in fp32 (fp64 for fp64). No
program waits for another or adds to what another wrote, so results do not depend on the order of programs.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from softprompt.ops.rms_norm import dense
from softprompt.ops.triton_rows import NUM_WARPS, TILE_BYTES, tile_shape

# A thread holds 16 numbers of a row, two accesses of 16 bytes in 16 bits, until it knows the row's sum; rows
# of more than WIDEST numbers are read twice, in blocks of BLOCK.
ENTRIES_PER_WARP = 512
WIDEST = 16384
BLOCK = 4096
HEADS = 4  # that share the cosines and sines of a token in a program

TWO_ROOTS = tl.constexpr(1.5957691216057308)  # 2 sqrt(2 / pi)
CUBIC = tl.constexpr(0.044715 * 1.5957691216057308)


def norm_tile(width: int) -> tuple[int, int, int]:
    """Rows and columns (powers of two) of the tile of a program that needs whole rows, and its warps.

    Rows of q_norm and k_norm (64 to 256 numbers) share a program, so that its four warps are busy.
    """
    columns = triton.next_power_of_2(width) if width <= WIDEST else BLOCK
    rows = max(1, NUM_WARPS * ENTRIES_PER_WARP // columns)
    return rows, columns, max(NUM_WARPS, rows * columns // ENTRIES_PER_WARP)


def rotary_tile(width: int, rotated: int, itemsize: int) -> dict[str, int]:
    """The tile (powers of two) of a program that turns HEADS heads of some tokens: 4 KiB, or one token."""
    pairs, rest = (triton.next_power_of_2(max(1, size)) for size in (rotated // 2, width - rotated))
    tokens = max(1, TILE_BYTES // itemsize // (HEADS * max(2 * pairs, rest)))
    return {"TOKENS": tokens, "HEADS": HEADS, "PAIRS": pairs, "REST": rest}


def _accumulator(dtype: torch.dtype) -> tl.dtype:
    return tl.float64 if dtype == torch.float64 else tl.float32


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float, out: Tensor, inverse: Tensor) -> None:
    num_rows, width = x.shape
    if out.numel() == 0:
        return
    x = dense(x)
    rows, columns, num_warps = norm_tile(width)
    with torch.cuda.device_of(x):
        _rms_norm[(triton.cdiv(num_rows, rows),)](
            x,
            weight.contiguous(),
            out,
            inverse,
            num_rows,
            x.stride(0),
            WIDTH=width,
            EPS=eps,
            OFFSET=offset,
            ROWS=rows,
            COLUMNS=columns,
            num_warps=num_warps,
        )


def rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, inverse: Tensor, offset: float, d_x: Tensor
) -> None:
    num_rows, width = x.shape
    if d_x.numel() == 0:
        return
    grad, x = dense(grad), dense(x)
    rows, columns, num_warps = norm_tile(width)
    with torch.cuda.device_of(x):
        _rms_norm_backward[(triton.cdiv(num_rows, rows),)](
            grad,
            x,
            weight.contiguous(),
            inverse,
            d_x,
            num_rows,
            grad.stride(0),
            x.stride(0),
            WIDTH=width,
            OFFSET=offset,
            ROWS=rows,
            COLUMNS=columns,
            num_warps=num_warps,
        )


@triton.jit
def _load(pointers, inside, ACC: tl.constexpr):
    """A tile of the shape of `inside`, zeros elsewhere.

    What rows have in common (a weight, cosines) is loaded by every thread that needs it: the rows of a tile
    have one address and meet in the cache, where a smaller tile would take the way through shared memory.
    """
    return tl.load(tl.broadcast_to(pointers, inside.shape), mask=inside, other=0.0).to(ACC)


@triton.jit
def _load_scale(weight_ptr, columns, inside, OFFSET: tl.constexpr, ACC: tl.constexpr):
    """What normalised rows are multiplied with."""
    # Not the plain constant: it would be fp32 in fp64 arithmetic.
    return _load(weight_ptr + columns, inside, ACC) + tl.full((), OFFSET, ACC)


# Grid: one program for each ROWS rows. It owns them, and their entries of `inverse`.
# Moves: a row is read once and written once (2 H itemsize bytes, and 4 of its inverse); one of more than
# WIDEST numbers is read twice, the second time mostly from L2.
@triton.jit(do_not_specialize=["num_rows"])
def _rms_norm(
    x_ptr,  # [N, H]
    weight_ptr,  # [H]
    out_ptr,  # [N, H], contiguous
    inverse_ptr,  # [N] what x was multiplied with
    num_rows,
    x_stride,
    WIDTH: tl.constexpr,  # H
    EPS: tl.constexpr,
    OFFSET: tl.constexpr,  # of the weight
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    ACC: tl.constexpr = inverse_ptr.dtype.element_ty
    rows = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    columns = tl.arange(0, COLUMNS)[None, :]
    x_rows, out_rows, in_rows = x_ptr + rows * x_stride, out_ptr + rows * WIDTH, rows < num_rows
    inside = in_rows & (columns < WIDTH)
    x = _load(x_rows + columns, inside, ACC)
    squares = x * x
    if COLUMNS < WIDTH:
        for start in range(COLUMNS, WIDTH, COLUMNS):
            block = start + columns
            more = _load(x_rows + block, in_rows & (block < WIDTH), ACC)
            squares += more * more
    inverse = tl.rsqrt(tl.sum(squares, 1, keep_dims=True) / WIDTH + tl.full((), EPS, ACC))
    tl.store(inverse_ptr + rows, inverse, mask=in_rows)
    if COLUMNS >= WIDTH:
        out = x * inverse * _load_scale(weight_ptr, columns, inside, OFFSET, ACC)
        tl.store(out_rows + columns, out.to(out_ptr.dtype.element_ty), mask=inside)
    else:
        for start in range(0, WIDTH, COLUMNS):
            block = start + columns
            inside = in_rows & (block < WIDTH)
            out = _load(x_rows + block, inside, ACC) * inverse
            out *= _load_scale(weight_ptr, block, inside, OFFSET, ACC)
            tl.store(out_rows + block, out.to(out_ptr.dtype.element_ty), mask=inside)


# Grid: one program for each ROWS rows. It owns their gradients.
# Moves: the rows of grad and x are read once, those of d_x written (3 H itemsize bytes a row); of more than
# WIDEST numbers they are read twice, the second time mostly from L2.
@triton.jit(do_not_specialize=["num_rows"])
def _rms_norm_backward(
    grad_ptr,  # [N, H]
    x_ptr,  # [N, H]
    weight_ptr,  # [H]
    inverse_ptr,  # [N]
    d_x_ptr,  # [N, H], contiguous
    num_rows,
    grad_stride,
    x_stride,
    WIDTH: tl.constexpr,  # H
    OFFSET: tl.constexpr,  # of the weight
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    ACC: tl.constexpr = inverse_ptr.dtype.element_ty
    rows = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    columns = tl.arange(0, COLUMNS)[None, :]
    grad_rows, x_rows = grad_ptr + rows * grad_stride, x_ptr + rows * x_stride
    out_rows, in_rows = d_x_ptr + rows * WIDTH, rows < num_rows
    inverse = tl.load(inverse_ptr + rows, mask=in_rows, other=0.0)
    inside = in_rows & (columns < WIDTH)
    # The gradient of the normalised rows, and those rows.
    scaled = _load(grad_rows + columns, inside, ACC) * _load_scale(weight_ptr, columns, inside, OFFSET, ACC)
    normalised = _load(x_rows + columns, inside, ACC) * inverse
    products = scaled * normalised
    if COLUMNS < WIDTH:
        for start in range(COLUMNS, WIDTH, COLUMNS):
            block = start + columns
            inside = in_rows & (block < WIDTH)
            more = _load(grad_rows + block, inside, ACC) * _load_scale(weight_ptr, block, inside, OFFSET, ACC)
            products += more * (_load(x_rows + block, inside, ACC) * inverse)
    mean = tl.sum(products, 1, keep_dims=True) / WIDTH
    if COLUMNS >= WIDTH:
        d_x = (scaled - normalised * mean) * inverse
        tl.store(out_rows + columns, d_x.to(d_x_ptr.dtype.element_ty), mask=inside)
    else:
        for start in range(0, WIDTH, COLUMNS):
            block = start + columns
            inside = in_rows & (block < WIDTH)
            d_x = _load(grad_rows + block, inside, ACC) * _load_scale(weight_ptr, block, inside, OFFSET, ACC)
            d_x = (d_x - _load(x_rows + block, inside, ACC) * inverse * mean) * inverse
            tl.store(out_rows + block, d_x.to(d_x_ptr.dtype.element_ty), mask=inside)


def glu(gate: Tensor, up: Tensor, activation: int, out: Tensor) -> None:
    if out.numel() == 0:
        return
    gate, up = dense(gate), dense(up)
    grid, options = _gate_launch(gate, activation)
    with torch.cuda.device_of(gate):
        _glu[grid](
            gate,
            up,
            out,
            gate.shape[0],
            gate.stride(0),
            up.stride(0),
            **options,
        )


def glu_backward(
    grad: Tensor, gate: Tensor, up: Tensor, activation: int, d_gate: Tensor, d_up: Tensor
) -> None:
    if d_gate.numel() == 0:
        return
    grad, gate, up = dense(grad), dense(gate), dense(up)
    grid, options = _gate_launch(gate, activation)
    with torch.cuda.device_of(gate):
        _glu_backward[grid](
            grad,
            gate,
            up,
            d_gate,
            d_up,
            gate.shape[0],
            grad.stride(0),
            gate.stride(0),
            up.stride(0),
            **options,
        )


def _gate_launch(gate: Tensor, activation: int) -> tuple[tuple[int, int], dict[str, Any]]:
    """The grid, and what the two kernels of a gated unit are compiled for."""
    num_rows, width = gate.shape
    rows, columns = tile_shape(width, gate.element_size())
    return (triton.cdiv(num_rows, rows), triton.cdiv(width, columns)), {
        "WIDTH": width,
        "ACTIVATION": activation,
        "ACC": _accumulator(gate.dtype),
        "ROWS": rows,
        "COLUMNS": columns,
        "num_warps": NUM_WARPS,
    }


@triton.jit
def _sigmoid_and_derivative(gate, ACTIVATION: tl.constexpr):
    """Of an activation x * sigmoid(f(x)): the sigmoid and its derivative by x.

    SiLU has f(x) = x. GELU by tanh is x (1 + tanh(g(x))) / 2 = x * sigmoid(2 g(x)), in which nothing cancels.
    The exponential of -|f(x)| does not overflow, and gives the derivative without a difference.
    """
    inner, slope = gate, tl.full((), 1, gate.dtype)
    if ACTIVATION == 1:
        # Not the plain constants: those would be fp32 in fp64 arithmetic.
        linear, cubic = tl.full((), TWO_ROOTS, gate.dtype), tl.full((), CUBIC, gate.dtype)
        square = gate * gate
        inner, slope = gate * (linear + cubic * square), linear + 3 * cubic * square
    small = tl.exp(-tl.abs(inner))
    factor = 1 / (1 + small)
    return tl.where(inner < 0, small, 1) * factor, small * factor * factor * slope


# Grid: (row blocks, column blocks). A program owns ROWS rows and COLUMNS of their I entries.
# Moves: gate and up are read once, and as many numbers as one of them has are written.
@triton.jit(do_not_specialize=["num_rows"])
def _glu(
    gate_ptr,  # [N, I]
    up_ptr,  # [N, I]
    out_ptr,  # [N, I], contiguous
    num_rows,
    gate_stride,
    up_stride,
    WIDTH: tl.constexpr,  # I
    ACTIVATION: tl.constexpr,  # a number of ACTIVATIONS in glu.py
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    rows = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    columns = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    inside = (rows < num_rows) & (columns < WIDTH)
    gate = _load(gate_ptr + rows * gate_stride + columns, inside, ACC)
    up = _load(up_ptr + rows * up_stride + columns, inside, ACC)
    sigmoid, _ = _sigmoid_and_derivative(gate, ACTIVATION)
    out = gate * sigmoid * up
    tl.store(out_ptr + rows * WIDTH + columns, out.to(out_ptr.dtype.element_ty), mask=inside)


# Grid: (row blocks, column blocks). A program owns the gradients of ROWS rows and COLUMNS of their I entries.
# Moves: grad, gate and up are read once, and as many numbers as two of them have are written.
@triton.jit(do_not_specialize=["num_rows"])
def _glu_backward(
    grad_ptr,  # [N, I]
    gate_ptr,  # [N, I]
    up_ptr,  # [N, I]
    d_gate_ptr,  # [N, I], contiguous
    d_up_ptr,  # [N, I], contiguous
    num_rows,
    grad_stride,
    gate_stride,
    up_stride,
    WIDTH: tl.constexpr,  # I
    ACTIVATION: tl.constexpr,  # a number of ACTIVATIONS in glu.py
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    rows = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    columns = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    inside = (rows < num_rows) & (columns < WIDTH)
    grad = _load(grad_ptr + rows * grad_stride + columns, inside, ACC)
    gate = _load(gate_ptr + rows * gate_stride + columns, inside, ACC)
    up = _load(up_ptr + rows * up_stride + columns, inside, ACC)
    sigmoid, derivative = _sigmoid_and_derivative(gate, ACTIVATION)
    d_gate = grad * up * (sigmoid + gate * derivative)
    out = rows * WIDTH + columns
    tl.store(d_gate_ptr + out, d_gate.to(d_gate_ptr.dtype.element_ty), mask=inside)
    tl.store(d_up_ptr + out, (grad * (gate * sigmoid)).to(d_up_ptr.dtype.element_ty), mask=inside)


def rotary(
    query: Tensor,  # [N, Hq, D]
    key: Tensor,  # [N, Hkv, D]
    cos: Tensor,  # [N, R]
    sin: Tensor,  # [N, R]
    interleaved: bool,
    transposed: bool,
    out_query: Tensor,  # [N, Hq, D], contiguous
    out_key: Tensor,  # [N, Hkv, D], contiguous
) -> None:
    if out_query.numel() + out_key.numel() == 0:
        return
    query, key, cos, sin = (dense(tensor) for tensor in (query, key, cos, sin))
    num_tokens, _, width = query.shape
    rotated = cos.shape[1]
    tile = rotary_tile(width, rotated, query.element_size())
    head_blocks = [triton.cdiv(tensor.shape[1], HEADS) for tensor in (query, key)]
    with torch.cuda.device_of(query):
        _rotary[(triton.cdiv(num_tokens, tile["TOKENS"]) * sum(head_blocks),)](
            query,
            key,
            cos,
            sin,
            out_query,
            out_key,
            num_tokens,
            *head_blocks,
            query.shape[1],
            key.shape[1],
            *query.stride()[:2],
            *key.stride()[:2],
            cos.stride(0),
            sin.stride(0),
            WIDTH=width,
            ROTATED=rotated,
            INTERLEAVED=interleaved,
            TRANSPOSED=transposed,
            ACC=_accumulator(query.dtype),
            **tile,
            num_warps=NUM_WARPS,
        )


@triton.jit
def _load_pairs(
    pointers,  # [TOKENS, HEADS or 1, 1] of vectors
    in_vectors,  # [TOKENS, HEADS, 1]: which of them are there
    ROTATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    PAIRS: tl.constexpr,
    ACC: tl.constexpr,
):
    """[TOKENS, HEADS, PAIRS] twice: the first numbers of the pairs, and the second ones."""
    if INTERLEAVED:
        # Both numbers of a pair come with one access of 16 bytes, and are parted in the thread's registers.
        columns = tl.arange(0, 2 * PAIRS)[None, None, :]
        both = _load(pointers + columns, in_vectors & (columns < ROTATED), ACC)
        first, second = tl.split(tl.reshape(both, (both.shape[0], both.shape[1], PAIRS, 2)))
    else:
        columns = tl.arange(0, PAIRS)[None, None, :]
        inside = in_vectors & (columns < ROTATED // 2)
        first = _load(pointers + columns, inside, ACC)
        second = _load(pointers + ROTATED // 2 + columns, inside, ACC)
    return first, second


@triton.jit
def _rotate_heads(
    x_ptr,  # [N, heads, D]
    cos_ptr,  # [N, R]
    sin_ptr,  # [N, R]
    out_ptr,  # [N, heads, D], contiguous
    tokens,  # [TOKENS] of the program, int64
    heads,  # [HEADS] of the program
    num_tokens,
    num_heads,
    token_stride,
    head_stride,
    cos_stride,
    sin_stride,
    WIDTH: tl.constexpr,
    ROTATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    ACC: tl.constexpr,
    PAIRS: tl.constexpr,
    REST: tl.constexpr,
):
    """Writes some heads of some tokens."""
    tokens, heads = tokens[:, None, None], heads[None, :, None]
    inside = (tokens < num_tokens) & (heads < num_heads)
    x_rows = x_ptr + tokens * token_stride + heads * head_stride
    out_rows = out_ptr + (tokens * num_heads + heads) * WIDTH
    if ROTATED > 0:
        first, second = _load_pairs(x_rows, inside, ROTATED, INTERLEAVED, PAIRS, ACC)
        first_cos, second_cos = _load_pairs(
            cos_ptr + tokens * cos_stride, inside, ROTATED, INTERLEAVED, PAIRS, ACC
        )
        first_sin, second_sin = _load_pairs(
            sin_ptr + tokens * sin_stride, inside, ROTATED, INTERLEAVED, PAIRS, ACC
        )
        if TRANSPOSED:
            first_out = first * first_cos + second * second_sin
            second_out = second * second_cos - first * first_sin
        else:
            first_out = first * first_cos - second * first_sin
            second_out = second * second_cos + first * second_sin
        first_out = first_out.to(out_ptr.dtype.element_ty)
        second_out = second_out.to(out_ptr.dtype.element_ty)
        if INTERLEAVED:
            columns = tl.arange(0, 2 * PAIRS)[None, None, :]
            both = tl.join(first_out, second_out)
            both = tl.reshape(both, (both.shape[0], both.shape[1], 2 * PAIRS))
            tl.store(out_rows + columns, both, mask=inside & (columns < ROTATED))
        else:
            columns = tl.arange(0, PAIRS)[None, None, :]
            in_pairs = inside & (columns < ROTATED // 2)
            tl.store(out_rows + columns, first_out, mask=in_pairs)
            tl.store(out_rows + ROTATED // 2 + columns, second_out, mask=in_pairs)
    if ROTATED < WIDTH:
        columns = ROTATED + tl.arange(0, REST)[None, None, :]
        in_rest = inside & (columns < WIDTH)
        tl.store(out_rows + columns, tl.load(x_rows + columns, mask=in_rest), mask=in_rest)


# Grid: one program for each TOKENS tokens and HEADS heads, first those of the query, then those of the key;
# programs of the same tokens are neighbours, and find cosines and sines in L2.
# Moves: every number of query and key is read once and written once. Cosines and sines are read once for each
# HEADS heads.
@triton.jit(
    do_not_specialize=["num_tokens", "num_query_blocks", "num_key_blocks", "num_heads", "num_key_heads"]
)
def _rotary(
    query_ptr,  # [N, Hq, D]
    key_ptr,  # [N, Hkv, D]
    cos_ptr,  # [N, R]
    sin_ptr,  # [N, R]
    out_query_ptr,  # [N, Hq, D], contiguous
    out_key_ptr,  # [N, Hkv, D], contiguous
    num_tokens,
    num_query_blocks,  # of heads
    num_key_blocks,
    num_heads,
    num_key_heads,
    query_token_stride,
    query_head_stride,
    key_token_stride,
    key_head_stride,
    cos_stride,
    sin_stride,
    WIDTH: tl.constexpr,  # D
    ROTATED: tl.constexpr,  # R
    INTERLEAVED: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    ACC: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    PAIRS: tl.constexpr,
    REST: tl.constexpr,
):
    num_blocks = num_query_blocks + num_key_blocks
    block = tl.program_id(0) % num_blocks
    tokens = (tl.program_id(0) // num_blocks).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    if block < num_query_blocks:
        _rotate_heads(
            query_ptr,
            cos_ptr,
            sin_ptr,
            out_query_ptr,
            tokens,
            block * HEADS + tl.arange(0, HEADS),
            num_tokens,
            num_heads,
            query_token_stride,
            query_head_stride,
            cos_stride,
            sin_stride,
            WIDTH,
            ROTATED,
            INTERLEAVED,
            TRANSPOSED,
            ACC,
            PAIRS,
            REST,
        )
    else:
        _rotate_heads(
            key_ptr,
            cos_ptr,
            sin_ptr,
            out_key_ptr,
            tokens,
            (block - num_query_blocks) * HEADS + tl.arange(0, HEADS),
            num_tokens,
            num_key_heads,
            key_token_stride,
            key_head_stride,
            cos_stride,
            sin_stride,
            WIDTH,
            ROTATED,
            INTERLEAVED,
            TRANSPOSED,
            ACC,
            PAIRS,
            REST,
        )
