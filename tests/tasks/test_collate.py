import pytest
import torch

from softprompt.tasks.collate import LeftPadCollator

ROWS = [
    {"input_ids": [5, 6, 7], "attention_mask": [1, 1, 1], "labels": [-100, 6, 7]},
    {"input_ids": [8], "attention_mask": [1], "labels": [8]},
]


@pytest.mark.parametrize("length, extra", [(None, 0), (5, 2)])
def test_rows_are_padded_on_the_left(length, extra):
    batch = LeftPadCollator(9, length)(ROWS)
    expected = {
        "input_ids": [[9] * extra + [5, 6, 7], [9] * (extra + 2) + [8]],
        "attention_mask": [[0] * extra + [1, 1, 1], [0] * (extra + 2) + [1]],
        "labels": [[-100] * extra + [-100, 6, 7], [-100] * (extra + 2) + [8]],
    }
    assert {name: tensor.tolist() for name, tensor in batch.items()} == expected
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_prompts_without_labels_get_none():
    prompts = [{name: row[name] for name in ("input_ids", "attention_mask")} for row in ROWS]
    assert sorted(LeftPadCollator(9)(prompts)) == ["attention_mask", "input_ids"]


def test_a_row_longer_than_the_fixed_length_is_refused():
    with pytest.raises(ValueError, match="a row has 3 tokens, expected at most 2"):
        LeftPadCollator(9, 2)(ROWS)
