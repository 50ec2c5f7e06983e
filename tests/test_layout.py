from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from softprompt.layout import build_layout, round_up
from softprompt.ops.constants import MASKED_KEY
from softprompt.ops.registry import KERNELS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ["reference", "triton"]
MASK = [[0, 0, 1, 1], [1, 1, 0, 0], [0, 1, 1, 1]]
LABELS = [[-100, -100, -100, 5], [-100, 4, -100, -100], [-100, 6, -100, -100]]
IDS = [[9, 9, 1, 5], [2, 4, 9, 9], [9, 6, 7, 8]]
PROMPT_OF_ROW = [1, 0, 1]


def tensor(values, dtype=torch.int64):
    return torch.tensor(values, dtype=dtype, device=DEVICE)


def make_layout(**options):
    given = {
        "attention_mask": tensor(MASK),
        "prompt_lengths": [2, 3],
        "labels": tensor(LABELS),
        "input_ids": tensor(IDS),
        "prompt_of_row": tensor(PROMPT_OF_ROW),
        "vocab_size": 10,
    }
    return build_layout(**{**given, **options})


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_batch_is_cut_to_its_tokens_and_labels(backend):
    layout = make_layout(backend=backend)
    # Row 2 starts with a pad that predicts the label of its first token.
    assert layout.token_index.tolist() == [-1] * 5 + [2, 3, 4, 5, 8, 9, 10, 11]
    assert layout.position_ids.tolist() == [0, 1, 0, 1, 2, 5, 6, 2, 3, 3, 4, 5, 6]
    assert layout.query_position.tolist() == layout.position_ids.tolist()
    assert layout.key_position.tolist() == [0, 1, 0, 1, 2, 5, 6, 2, 3, MASKED_KEY, 4, 5, 6]
    assert layout.segments.tolist() == [0, 0, 1, 1, 1, 2, 2, 3, 3, 4, 4, 4, 4]
    assert layout.prefix_id.tolist() == [0, 0, 1, 1, 1, 1, 1, 0, 0, 1, 1, 1, 1]
    assert layout.cu_prompts.tolist() == [0, 2, 5]
    assert layout.cu_texts.tolist() == [5, 7, 9, 13]
    assert layout.label_rows.tolist() == [5, 7, 9]
    assert layout.label_targets.tolist() == [5, 4, 6]
    assert layout.prompt_of_row.tolist() == PROMPT_OF_ROW


def test_the_sizes_are_numbers_that_the_host_knows():
    layout = make_layout()
    assert (layout.num_rows, layout.num_tokens, layout.num_labels, layout.prompt_tokens) == (13, 8, 3, 5)
    assert (layout.longest_text, layout.longest_context) == (4, 7)
    assert (layout.batch_shape, layout.prompt_lengths) == ((3, 4), (2, 3))


def test_all_index_tensors_are_int32():
    layout = make_layout()
    tensors = [value for value in vars(layout).values() if isinstance(value, torch.Tensor)]
    assert len(tensors) == 11
    assert {value.dtype for value in tensors} == {torch.int32}


def test_without_a_choice_every_row_sees_the_first_prompt():
    layout = make_layout(prompt_of_row=None)
    assert layout.prompt_of_row.tolist() == [0, 0, 0]
    assert layout.prefix_id[5:].tolist() == [0] * 8


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bucket, num_rows", [(1, 13), (8, 16), (13, 13), (64, 64)])
def test_dummies_fill_the_token_bucket(bucket, num_rows, backend):
    layout = make_layout(token_bucket=bucket, backend=backend)
    assert layout.num_rows == num_rows
    assert layout.num_tokens == 8
    own = [2 + 3 + row for row in range(13, num_rows)]
    assert layout.token_index[13:].tolist() == [-1] * len(own)
    assert layout.segments[13:].tolist() == layout.prefix_id[13:].tolist() == own


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bucket, num_labels", [(1, 3), (2, 4), (16, 16)])
def test_ignored_labels_fill_the_label_bucket(bucket, num_labels, backend):
    layout = make_layout(label_bucket=bucket, backend=backend)
    assert layout.num_labels == 3
    assert layout.label_rows.tolist() == [5, 7, 9] + [0] * (num_labels - 3)
    assert layout.label_targets.tolist() == [5, 4, 6] + [-100] * (num_labels - 3)


def test_no_label_leaves_no_label_row():
    layout = make_layout(labels=None, label_bucket=4)
    assert layout.num_labels == 0
    assert layout.label_rows.shape == layout.label_targets.shape == (0,)


@pytest.mark.parametrize("count, bucket, expected", [(0, 4, 0), (1, 4, 4), (4, 4, 4), (5, 4, 8), (7, 1, 7)])
def test_round_up_gives_the_next_multiple(count, bucket, expected):
    assert round_up(count, bucket) == expected


def test_the_attention_is_told_the_same_row():
    layout = make_layout(token_bucket=16)
    attention = layout.attention
    for name in (
        "query_position",
        "key_position",
        "segments",
        "prefix_id",
        "cu_prompts",
        "cu_texts",
        "prompt_of_row",
    ):
        assert getattr(attention, name) is getattr(layout, name)
    assert (attention.num_rows, attention.num_tokens, attention.longest_text) == (16, 8, 4)
    assert attention.prompt_lengths == (2, 3)
    assert layout.attention is attention


class HostReads(TorchDispatchMode):
    """Notes the ops that make the host wait for a value, also inside `pack_layout`."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.softprompt.pack_layout.default:
            with self:
                return KERNELS[func](*args)
        if func._opname in ("_local_scalar_dense", "nonzero", "masked_select", "unique_dim", "_unique2"):
            self.seen.append(func._opname)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("backend", ["reference"] if DEVICE == "cpu" else BACKENDS)
def test_the_host_reads_the_counts_and_nothing_else(backend):
    inputs = {"labels": tensor(LABELS), "input_ids": tensor(IDS), "prompt_of_row": tensor(PROMPT_OF_ROW)}
    mask, lists = tensor(MASK), []
    tolist = torch.Tensor.tolist

    def noted(self):
        lists.append(tuple(self.shape))
        return tolist(self)

    with mock.patch.object(torch.Tensor, "tolist", noted), HostReads() as reads:
        build_layout(mask, [2, 3], **inputs, vocab_size=10, token_bucket=8, label_bucket=4, backend=backend)
    assert lists == [(5,)]
    assert reads.seen == []


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "name, places, message",
    [
        (
            "input_ids",
            {(1, 2): 10},
            r"input_ids\[1, 2\] = 10 is outside the vocabulary 0 .. 9 \(1 such value\)",
        ),
        (
            "input_ids",
            {(0, 3): -1},
            r"input_ids\[0, 3\] = -1 is outside the vocabulary 0 .. 9 \(1 such value\)",
        ),
        ("input_ids", {(2, 0): 99, (2, 1): -100}, r"input_ids\[2, 0\] = 99 .* \(2 such values\)"),
        ("labels", {(2, 3): 10}, r"labels\[2, 3\] = 10 is outside the vocabulary 0 .. 9 \(1 such value\)"),
        ("labels", {(0, 1): -1, (1, 0): 2**40}, r"labels\[0, 1\] = -1 .* \(2 such values\)"),
    ],
)
def test_a_value_outside_the_vocabulary_is_named_with_its_place(name, places, message, backend):
    values = tensor({"input_ids": IDS, "labels": LABELS}[name])
    for place, value in places.items():
        values[place] = value
    with pytest.raises(IndexError, match=message):
        make_layout(**{name: values}, backend=backend)


def test_ids_are_named_before_labels():
    with pytest.raises(IndexError, match=r"input_ids\[0, 0\] = 50 "):
        make_layout(input_ids=tensor(IDS) + 41, labels=tensor(LABELS) + 200)


@pytest.mark.parametrize("positions", ["slots", "mask", "compact"])
def test_packed_rows_go_back_to_their_place_in_the_padded_batch(positions):
    layout = make_layout(positions=positions, token_bucket=8)
    packed = torch.randn(layout.num_rows, 2, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    expected = torch.zeros(3, 3 + 4, 2, device=DEVICE)
    starts, lengths = [0, 2], [2, 3]
    for b, prompt in enumerate(PROMPT_OF_ROW):
        for place in range(lengths[prompt]):
            expected[b, 3 - lengths[prompt] + place] = packed[starts[prompt] + place]
    for row, index in enumerate(layout.token_index.tolist()):
        if index >= 0:
            expected[index // 4, 3 + index % 4] = packed[row]
    assert torch.equal(layout.scatter_rows(packed), expected)


def test_the_gradient_of_scattered_rows_is_gathered_from_where_they_went():
    layout = make_layout(token_bucket=8)
    packed = torch.randn(layout.num_rows, 2, dtype=torch.float64, device=DEVICE, requires_grad=True)
    assert torch.autograd.gradcheck(layout.scatter_rows, packed)


def test_rows_of_a_batch_without_columns_are_the_prompts():
    empty = torch.zeros(3, 0, dtype=torch.int64, device=DEVICE)
    layout = make_layout(attention_mask=empty, labels=empty, input_ids=empty)
    packed = torch.arange(5.0, device=DEVICE)[:, None]
    assert layout.scatter_rows(packed)[..., 0].tolist() == [[2, 3, 4], [0, 0, 1], [2, 3, 4]]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"labels": tensor([[1]])}, r"labels must have the shape of attention_mask \[3, 4\], got \[1, 1\]"),
        ({"labels": tensor(LABELS).float()}, "labels must be integers"),
        (
            {"input_ids": tensor(IDS)[:2]},
            r"input_ids must have the shape of attention_mask \[3, 4\], got \[2, 4\]",
        ),
        ({"prompt_of_row": tensor([0])}, r"prompt_of_row must be \[3\], got shape \[1\]"),
        ({"prompt_lengths": []}, "at least one length"),
        ({"prompt_lengths": [2, 0]}, "each at least 1"),
        ({"positions": "absolute"}, "positions must be one of slots, mask, compact, got 'absolute'"),
        ({"backend": "numpy"}, "unknown backend 'numpy'"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        make_layout(**change)
