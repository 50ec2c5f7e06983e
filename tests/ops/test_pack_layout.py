import importlib

import pytest
import torch
from backends import BACKENDS, DEVICE
from hypothesis import example, given, settings
from hypothesis import strategies as st
from poison import poisoned_buffers

from softprompt.ops.pack_layout import MASKED_KEY, LayoutTensors, pack_layout

VOCAB = 7


def oracle(
    mask,
    prompt_lengths,
    labels,
    input_ids,
    prompt_of_row,
    positions,
    capacity,
    label_capacity,
    vocab_size=VOCAB,
):
    """`pack_layout` word for word, one entry at a time, on lists."""
    num_rows, row_length = len(mask), len(mask[0]) if mask else 0
    num_prompts = len(prompt_lengths)
    rows, cu_texts, label_rows, label_targets = [], [], [], []
    last_of_prompt, text_lengths, contexts = [], [], []
    for prompt, length in enumerate(prompt_lengths):
        for place in range(length):
            rows.append((-1, place, place, place, prompt, prompt))
        last_of_prompt.append(len(rows) - 1)
    for b in range(num_rows):
        prompt = prompt_of_row[b] if prompt_of_row else 0
        cu_texts.append(len(rows))
        packed_at, rank, last = {}, 0, last_of_prompt[prompt]
        for c in range(row_length):
            real = mask[b][c] != 0
            label = labels[b][c] if labels else -100
            following = labels[b][c + 1] if labels and c + 1 < row_length else -100
            if positions == "compact":
                if real and label != -100:
                    label_rows.append(last)
                    label_targets.append(label)
            elif label != -100:
                label_rows.append(packed_at[c - 1] if c else last_of_prompt[prompt])
                label_targets.append(label)
            if not real and (positions == "compact" or following == -100):
                continue
            padded, ranked = prompt_lengths[prompt] + c, prompt_lengths[prompt] + rank
            slot = ranked if positions == "compact" else padded
            position = {"slots": padded, "mask": ranked if real else -1, "compact": ranked}[positions]
            rows.append(
                (b * row_length + c, position, slot, slot if real else MASKED_KEY, num_prompts + b, prompt)
            )
            packed_at[c] = last = len(rows) - 1
            rank += real
        text_lengths.append(len(packed_at))
        contexts.append(len(packed_at) + prompt_lengths[prompt])
    cu_texts.append(len(rows))
    num_tokens, num_labels = len(rows) - sum(prompt_lengths), len(label_rows)
    for dummy in range(len(rows), capacity):
        own = num_prompts + num_rows + dummy
        rows.append((-1, 0, 0, 0, own, own))
    wrong_ids = sum(not 0 <= i < vocab_size for line in input_ids or [] for i in line)
    wrong_labels = sum(i != -100 and not 0 <= i < vocab_size for line in labels or [] for i in line)
    unused = label_capacity - num_labels
    return LayoutTensors(
        *(list(column) for column in zip(*rows, strict=True)),
        cu_texts,
        label_rows + [0] * unused,
        label_targets + [-100] * unused,
        [num_tokens, num_labels, wrong_ids + wrong_labels, max([0, *text_lengths]), max([0, *contexts])],
    )


def tensor_of(lists, shape, dtype=torch.int64):
    return None if lists is None else torch.tensor(lists, dtype=dtype, device=DEVICE).reshape(shape)


def check(backend, case):
    """The op on tensors gives what the oracle gives on lists."""
    mask, lengths, labels, ids, prompt_of_row, positions, token_slack, label_slack, shape, dtype = case
    capacity, label_capacity = (
        sum(lengths) + shape[0] * shape[1] + token_slack,
        shape[0] * shape[1] + label_slack,
    )
    with poisoned_buffers():
        actual = pack_layout(
            tensor_of(mask, shape, dtype),
            lengths,
            labels=tensor_of(labels, shape),
            input_ids=tensor_of(ids, shape),
            prompt_of_row=tensor_of(prompt_of_row, shape[:1]),
            vocab_size=VOCAB,
            positions=positions,
            capacity=capacity,
            label_capacity=label_capacity,
            backend=backend,
        )
    expected = oracle(mask, lengths, labels, ids, prompt_of_row, positions, capacity, label_capacity)
    for name, tensor, values in zip(LayoutTensors._fields, actual, expected, strict=True):
        assert tensor.dtype == torch.int32
        assert tensor.tolist() == values, name


def mask_of(pattern, length, count):
    real = {"left": [0] * (length - count) + [1] * count, "right": [1] * count + [0] * (length - count)}
    return real.get(pattern) or [1 if (c * 5 + count) % 3 else 0 for c in range(length)]


@st.composite
def batches(draw):
    num_rows, row_length = draw(st.integers(0, 4)), draw(st.integers(0, 6))
    pattern = st.sampled_from(["left", "right", "holes"])
    mask = [mask_of(draw(pattern), row_length, draw(st.integers(0, row_length))) for _ in range(num_rows)]
    # A sampled -100 is the common case, and values on both sides of the vocabulary are among the others.
    label = st.sampled_from([-100] * 4 + list(range(-2, VOCAB + 2)))
    line = st.lists(label, min_size=row_length, max_size=row_length)
    batch = st.lists(line, min_size=num_rows, max_size=num_rows)
    lengths = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    return (
        mask,
        lengths,
        draw(st.none() | batch),
        draw(st.none() | batch),
        draw(st.none() | st.lists(st.integers(0, len(lengths) - 1), min_size=num_rows, max_size=num_rows)),
        draw(st.sampled_from(["slots", "mask", "compact"])),
        draw(st.integers(0, 3)),
        draw(st.integers(0, 3)),
        (num_rows, row_length),
        draw(st.sampled_from([torch.int64, torch.bool, torch.float32, torch.uint8, torch.bfloat16])),
    )


def batch_of(mask, *, lengths=(2,), labels=None, ids=None, prompt_of_row=None, positions="slots", shape=None):
    shape = shape or (len(mask), len(mask[0]))
    return (mask, list(lengths), labels, ids, prompt_of_row, positions, 0, 0, shape, torch.int64)


NOTHING = [-100, -100, -100]
CASES = {
    "no rows": batch_of([], shape=(0, 5)),
    "no columns": batch_of([[], [], []], lengths=(2, 5), prompt_of_row=[0, 1, 0], shape=(3, 0)),
    "one token": batch_of([[1]], labels=[[3]], ids=[[VOCAB]]),
    "one pad with a label": batch_of([[0]], labels=[[3]]),
    "only pads": batch_of([[0, 0, 0]] * 2, labels=[NOTHING] * 2),
    "labels on pads, left": batch_of([[0, 0, 1], [0, 1, 1]], labels=[[1, 2, 3]] * 2),
    "labels on pads, right": batch_of([[1, 0, 0], [1, 1, 0]], labels=[[1, 2, 3]] * 2, positions="mask"),
    "labels on pads, compact": batch_of([[1, 0, 1], [0, 1, 0]], labels=[[1, 2, 3]] * 2, positions="compact"),
    "first token of a left-padded text": batch_of([[0, 0, 1]], labels=[[-100, -100, 4]], positions="mask"),
    "no label": batch_of([[1, 1, 1]], labels=[NOTHING]),
    "three prompts": batch_of(
        [[1, 1]] * 4, lengths=(3, 1, 2), prompt_of_row=[2, 0, 1, 2], labels=[[1, 2]] * 4
    ),
    "ids and labels out of range": batch_of(
        [[1, 1, 0]], labels=[[-1, VOCAB, -100]], ids=[[-100, VOCAB + 5, 2**40]]
    ),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_edge_cases_match_the_definition(name, backend):
    check(backend, CASES[name])


@settings(max_examples=200, deadline=None)
@given(batches())
def test_the_reference_matches_the_definition(case):
    check("reference", case)


@settings(max_examples=25, deadline=None)
@given(batches())
@example(CASES["three prompts"])
@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_the_kernels_match_the_definition(backend, case):
    check(backend, case)


@pytest.mark.parametrize("positions", ["slots", "mask", "compact"])
@pytest.mark.parametrize("shape", [(5, 16), (3, 40)], ids=["rows share a tile", "a row needs several tiles"])
def test_a_batch_of_several_tiles_matches_the_definition(shape, positions, monkeypatch):
    monkeypatch.setattr(importlib.import_module("softprompt.ops.triton_layout"), "TILE", 32)
    generator = torch.Generator().manual_seed(0)

    def draw(low, high):
        return torch.randint(low, high, shape, generator=generator)

    labels = torch.where(draw(0, 3) == 0, draw(-1, VOCAB + 1), -100).tolist()
    prompt_of_row = [b % 2 for b in range(shape[0])]
    case = (
        draw(0, 2).tolist(),
        [3, 4],
        labels,
        draw(-1, VOCAB + 1).tolist(),
        prompt_of_row,
        positions,
        50,
        9,
        shape,
    )
    check("triton", (*case, torch.int64))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.uint8, torch.int8, torch.int32, torch.float16, torch.bfloat16, torch.float64]
)
def test_a_mask_of_any_dtype_marks_what_is_not_zero(dtype, backend):
    mask = torch.tensor([[0.0, 1.0, -1.0, -0.0, 2.0]], device=DEVICE).to(dtype)
    expected = [c for c in range(5) if mask[0, c].item() != 0]
    layout = pack_layout(mask, [1], backend=backend)
    assert layout.token_index[1 : 1 + len(expected)].tolist() == expected
    assert layout.counts[0].item() == len(expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_labels_and_ids_of_any_integer_dtype_are_read_as_numbers(dtype, backend):
    values = torch.tensor([[156, 3, 200]], device=DEVICE).to(dtype)  # 156 is -100 in eight bits
    layout = pack_layout(
        torch.ones_like(values), [2], labels=values, input_ids=values, vocab_size=160, backend=backend
    )
    assert layout.label_targets.tolist() == [156, 3, 200]
    assert layout.counts.tolist() == [3, 3, 2, 3, 5]


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs_give_the_same_layout_as_dense_ones(backend):
    generator = torch.Generator().manual_seed(1)
    wide = [torch.randint(-1, 3, (3, 10, 2), generator=generator).to(DEVICE) for _ in range(3)]
    views = {
        "columns apart": [tensor[:, :5, 0] for tensor in wide],
        "rows apart": [tensor[..., 0].contiguous()[:, 2:7] for tensor in wide],
        "transposed": [tensor[..., 0].contiguous().T[:4] for tensor in wide],
    }
    for mask, labels, ids in views.values():
        prompt_of_row = torch.tensor([1, 0] * mask.shape[0], device=DEVICE)[: 2 * mask.shape[0] : 2]
        strided = pack_layout(
            mask,
            [2, 1],
            labels=labels,
            input_ids=ids,
            prompt_of_row=prompt_of_row,
            vocab_size=2,
            backend=backend,
        )
        dense = pack_layout(
            mask.contiguous(),
            [2, 1],
            labels=labels.contiguous(),
            input_ids=ids.contiguous(),
            prompt_of_row=prompt_of_row.contiguous(),
            vocab_size=2,
            backend="reference",
        )
        for actual, expected in zip(strided, dense, strict=True):
            assert torch.equal(actual, expected)


def test_what_a_token_sees_is_what_it_sees_in_the_padded_batch():
    mask = torch.tensor([[0, 1, 1, 0], [1, 0, 1, 0]])
    labels = torch.tensor([[-100, 2, -100, 5], [-100, -100, 3, 4]])
    lengths, prompt_of_row = [2, 3], [1, 0]
    layout = pack_layout(
        mask,
        lengths,
        labels=labels,
        prompt_of_row=torch.tensor(prompt_of_row),
        capacity=15,
        backend="reference",
    )
    ends = layout.cu_texts.tolist()

    def padded_places(row):
        """Row, place and whether it is a key, of every padded token that a packed token stands for."""
        index = layout.token_index[row].item()
        if index >= 0:
            b, c = divmod(index, 4)
            return [(b, lengths[prompt_of_row[b]] + c, bool(mask[b, c]))]
        prompt, place = (0, row) if row < 2 else (1, row - 2)
        return [(b, place, True) for b in range(2) if prompt_of_row[b] == prompt]

    for query in range(ends[-1]):
        for key in range(ends[-1]):
            visible = (
                layout.segments[key] == layout.segments[query]
                or layout.segments[key] == layout.prefix_id[query]
            ) and layout.key_position[key] <= layout.query_position[query]
            expected = any(
                b == other and column <= place and is_key
                for b, place, _ in padded_places(query)
                for other, column, is_key in padded_places(key)
            )
            assert bool(visible) == expected, (query, key)
    assert ends == [5, 8, 11]
    for dummy in range(ends[-1], 15):
        assert (layout.segments == layout.segments[dummy]).nonzero().tolist() == [[dummy]]
        assert layout.prefix_id[dummy] == layout.segments[dummy]


def ones(*shape, dtype=torch.int64):
    return torch.ones(shape, dtype=dtype)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"attention_mask": ones(3)}, r"attention_mask must be \[B, L\], got shape \[3\]"),
        ({"labels": ones(2, 4)}, r"labels must have the shape of attention_mask \[2, 3\], got \[2, 4\]"),
        (
            {"input_ids": ones(1, 3)},
            r"input_ids must have the shape of attention_mask \[2, 3\], got \[1, 3\]",
        ),
        ({"labels": ones(2, 3, dtype=torch.float32)}, "labels must be integers, got torch.float32"),
        ({"input_ids": ones(2, 3, dtype=torch.bool)}, "input_ids must be integers, got torch.bool"),
        ({"prompt_of_row": ones(3)}, r"prompt_of_row must be \[2\], got shape \[3\]"),
        (
            {"prompt_of_row": ones(2, dtype=torch.float32)},
            "prompt_of_row must be integers, got torch.float32",
        ),
        ({"prompt_lengths": []}, r"at least one length, each at least 1, got \[\]"),
        ({"prompt_lengths": [2, 0]}, r"at least one length, each at least 1, got \[2, 0\]"),
        ({"positions": "padded"}, "positions must be one of slots, mask, compact, got 'padded'"),
        ({"capacity": 7}, "capacity must be at least 8 .*, got 7"),
        ({"label_capacity": 5}, r"label_capacity must be at least B\*L = 6, got 5"),
        ({"backend": "numpy"}, "unknown backend 'numpy'"),
        ({"labels": ones(2, 3).to("meta")}, "all tensors must be on one device"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        pack_layout(**{"attention_mask": ones(2, 3), "prompt_lengths": [2], **change})


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_op_is_registered_correctly(backend):
    mask = torch.tensor([[0, 1, 1], [1, 1, 0]], device=DEVICE)
    arguments = (mask, mask * 3, mask, mask[:, 0], [2, 3], VOCAB, "mask", 14, 8, backend)
    torch.library.opcheck(torch.ops.softprompt.pack_layout.default, arguments)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_it_compiles_into_one_graph(backend):
    mask = torch.tensor([[0, 1, 1], [1, 1, 0]], device=DEVICE)

    def layout(mask, labels):
        return pack_layout(mask, [2, 3], labels=labels, positions="mask", backend=backend)

    compiled = torch.compile(layout, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(compiled(mask, mask * 3), layout(mask, mask * 3), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.gpu
def test_the_host_does_not_wait_for_the_gpu():
    mask = torch.ones(2, 3, dtype=torch.int64, device="cuda")
    pack_layout(mask, [2, 3], labels=mask, backend="triton")  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        layout = pack_layout(mask, [2, 3], labels=mask, backend="triton")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert layout.counts.tolist() == [6, 6, 0, 3, 5]


POINTERS = {
    **dict.fromkeys(("mask_ptr", "labels_ptr", "ids_ptr"), "*i64"),
    **{f"{name}_ptr": "*i32" for name in ("prompt_of_row", "cu_prompts", *LayoutTensors._fields)},
}
EVERYTHING = {"POSITIONS": "mask", "ROWS": 32, "COLUMNS": 64}
ONLY_A_MASK = {
    **dict.fromkeys(("labels_ptr", "ids_ptr", "prompt_of_row_ptr", "cu_prompts_ptr")),
    **{"POSITIONS": "compact", "ROWS": 1, "COLUMNS": 2048},
}


@pytest.mark.slow
def test_the_kernel_compiles_for_three_gpu_generations_without_spilling(compile_kernels):
    module = importlib.import_module("softprompt.ops.triton_layout")
    names = module._pack_layout.arg_names
    cases = [
        {
            "module": module.__name__,
            "kernel": "_pack_layout",
            "signature": [[n, "constexpr" if n in constexprs else POINTERS.get(n, "i32")] for n in names],
            "constexprs": constexprs,
            "num_warps": module.NUM_WARPS,
        }
        for constexprs in (EVERYTHING, ONLY_A_MASK)
    ]
    records = compile_kernels(cases)
    assert [record["arch"] for record in records] == [80, 90, 100] * 2
    for record in records:
        assert record["cubin_bytes"] > 0
        assert record["local"] == 0
        assert record["shared"] <= 48 * 1024
