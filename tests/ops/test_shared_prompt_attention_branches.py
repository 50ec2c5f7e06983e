"""Texts with branches: every branch goes on from its text as if the others were not there."""

from dataclasses import replace

import pytest
import torch
from attention_problem import BACKENDS, HEADS, OPTIONS, hold, results, tensors, with_vectors

from softprompt.layout import branch_out, build_layout
from softprompt.ops.shared_prompt_attention import shared_prompt_attention

PROMPTS, TEXTS, BRANCHES = [3, 2], ("rrr..", "..rrr", "rrrrr"), (2, 1, 3)
PROMPT_OF_ROW = torch.tensor([0, 1, 0])


def columns():
    branch = [n + 1 for n, length in enumerate(BRANCHES) for _ in range(length)]
    place = [p for length in BRANCHES for p in range(length)]
    return torch.tensor(branch, dtype=torch.int32), torch.tensor(place, dtype=torch.int32)


def layout_of(chosen=None, positions="compact"):
    """Of the texts with their branches, or of the texts with one of the branches as their ends."""
    mask = torch.tensor([[letter == "r" for letter in row] for row in TEXTS]).long()
    extra = sum(BRANCHES) if chosen is None else BRANCHES[chosen]
    whole = torch.cat([mask, torch.ones(len(TEXTS), extra, dtype=torch.int64)], 1)
    layout = build_layout(whole, PROMPTS, prompt_of_row=PROMPT_OF_ROW, positions=positions)
    return layout if chosen is not None else branch_out(layout, mask, *columns(), positions)


def rows_with(chosen):
    """Rows of the branched layout that the layout with one branch has too, in order."""
    layout = layout_of()
    branch = layout.branches
    return ((branch == 0) | (branch == chosen + 1)).nonzero()[:, 0]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "triton"])
def test_a_branch_gives_what_it_gives_alone(backend, options, monkeypatch):
    backend = hold(monkeypatch, backend)
    layout = layout_of()
    inputs = tensors(layout.attention, HEADS[1])
    options = with_vectors(OPTIONS[options], HEADS[1][0])
    together = shared_prompt_attention(*inputs, layout.attention, backend=backend, **options)
    for chosen in range(len(BRANCHES)):
        rows = rows_with(chosen)
        alone = shared_prompt_attention(
            *(tensor[:, rows] for tensor in inputs),
            layout_of(chosen).attention,
            backend="reference",
            **options,
        )
        torch.testing.assert_close(together[:, rows], alone, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("backend", ["dense", "padded"])
def test_gradients_are_those_of_the_reference(backend, monkeypatch):
    layout = layout_of().attention
    inputs = tensors(layout)
    expected = results(inputs, layout, {}, backend="reference")
    layout.plans.clear()
    for got, want in zip(
        results(inputs, layout, {}, backend=hold(monkeypatch, backend)), expected, strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("positions", ["compact", "slots", "mask"])
def test_positions_and_slots_are_those_of_the_branch_alone(positions):
    layout = layout_of(positions=positions)
    padded_right = TEXTS.index("rrr..")
    for chosen in range(len(BRANCHES)):
        rows, alone = rows_with(chosen), layout_of(chosen, positions)
        for name in ("position_ids", "query_position", "key_position"):
            got, want = getattr(layout, name)[rows], getattr(alone, name).clone()
            if not (positions == "compact" or (positions == "mask" and name == "position_ids")):
                # Alone it stands behind the pads of its row, here behind its text.
                first, last = alone.cu_texts[padded_right : padded_right + 2].tolist()
                want[first + 3 : last] -= 2
            assert torch.equal(got, want), name


def test_the_triton_kernels_refuse_branches():
    layout = layout_of().attention
    with pytest.raises(ValueError, match="the kernels know no branches of texts"):
        shared_prompt_attention(*tensors(layout, dtype=torch.float32), layout, backend="triton")


def test_branches_of_another_length_are_refused():
    layout = layout_of().attention
    wrong = replace(layout, branches=layout.branches[1:])
    with pytest.raises(ValueError, match=rf"branches must be \[T\] = \[{layout.num_rows}\]"):
        shared_prompt_attention(*tensors(layout), wrong)


def test_a_compiled_call_knows_the_branches():
    layout = layout_of().attention
    inputs = [tensor.detach() for tensor in tensors(layout)]
    expected = shared_prompt_attention(*inputs, layout, backend="reference")

    def call(query, key, value):
        return shared_prompt_attention(query, key, value, layout, backend="reference")

    compiled = torch.compile(call, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*inputs), expected)
