"""`check_batch`: what it makes of a forward's arguments."""

import pytest
import torch

from softprompt.engine.batch import check_batch

IDS = torch.arange(6).view(2, 3)
PROMPT = torch.zeros(4, 8)


def check(prompts=(PROMPT,), **changes):
    arguments = {
        "input_ids": IDS,
        "inputs_embeds": None,
        "attention_mask": None,
        "labels": None,
        "prompt_of_row": None,
    }
    return check_batch(list(prompts), 8, **(arguments | changes))


def test_a_missing_mask_means_no_pads():
    batch = check()
    assert batch.attention_mask.shape == (2, 3)
    assert bool((batch.attention_mask == 1).all())
    assert batch.shape == (2, 3)
    assert batch.prompt_lengths == (4,)


def test_input_embeddings_win_over_ids():
    embeds = torch.zeros(2, 5, 8)
    batch = check(inputs_embeds=embeds)
    assert batch.input_ids is None
    assert batch.inputs_embeds is embeds
    assert batch.shape == (2, 5)


@pytest.mark.parametrize(
    "rows", [[1, 0], (1, 0), torch.tensor([1, 0]), torch.tensor([1, 0], dtype=torch.uint8)]
)
def test_the_prompts_of_rows_become_one_int32_tensor(rows):
    batch = check([PROMPT, torch.ones(2, 8)], prompt_of_row=rows)
    assert batch.prompt_of_row.dtype == torch.int32
    assert batch.prompt_of_row.tolist() == [1, 0]
    assert batch.joined_prompts(torch.device("cpu")).tolist() == [[0.0] * 8] * 4 + [[1.0] * 8] * 2


# what is given -> part of the message
WRONG = {
    "no ids": ({"input_ids": None}, "You have to provide either input_ids or inputs_embeds"),
    "ids of rank 1": ({"input_ids": IDS[0]}, r"input_ids must be \[B, L\], got shape \[3\]"),
    "ids of rank 3": ({"input_ids": IDS[None]}, r"input_ids must be \[B, L\], got shape \[1, 2, 3\]"),
    "float ids": ({"input_ids": IDS.float()}, "input_ids must be integers, got torch.float32"),
    "bool ids": ({"input_ids": IDS.bool()}, "input_ids must be integers, got torch.bool"),
    "no rows": ({"input_ids": IDS[:0]}, r"the batch is empty.* got shape \[0, 3\]"),
    "embeddings of another width": (
        {"inputs_embeds": torch.zeros(2, 3, 7)},
        r"inputs_embeds must be \[B, L, 8\], got \[2, 3, 7\]",
    ),
    "embeddings of rank 2": ({"inputs_embeds": torch.zeros(3, 8)}, r"must be \[B, L, 8\], got \[3, 8\]"),
    "a longer mask": (
        {"attention_mask": torch.ones(2, 7)},
        r"attention_mask must be \[B, L\] = \[2, 3\], without the prompt, got shape \[2, 7\]",
    ),
    "a mask of rank 4": ({"attention_mask": torch.ones(2, 1, 3, 3)}, r"got shape \[2, 1, 3, 3\]"),
    "a mask of rank 1": ({"attention_mask": torch.ones(3)}, r"got shape \[3\]"),
    "longer labels": (
        {"labels": torch.ones(2, 7)},
        r"labels must be \[B, L\] = \[2, 3\].* got shape \[2, 7\]",
    ),
    "float labels": ({"labels": torch.ones(2, 3)}, "labels must be integers, got torch.float32"),
    "bool labels": ({"labels": torch.ones(2, 3) > 0}, "labels must be integers, got torch.bool"),
    "no prompts": ({"prompts": ()}, "expected at least one prompt, got none"),
    "a wide prompt": ({"prompts": (torch.zeros(4, 9),)}, r"prompt 0 must be \[P, 8\], got \[4, 9\]"),
    "a flat prompt": ({"prompts": (PROMPT, torch.zeros(8))}, r"prompt 1 must be \[P, 8\], got \[8\]"),
    "an empty prompt": (
        {"prompts": (torch.zeros(0, 8),)},
        "prompt 0 has no virtual tokens, expected at least one",
    ),
    "two prompts for no rows": ({"prompts": (PROMPT, PROMPT)}, "2 prompts need prompt_of_row"),
    "too few prompts of rows": ({"prompt_of_row": [0]}, "one entry for each of 2 rows, got 1"),
    "an unknown prompt": ({"prompt_of_row": [0, 1]}, r"prompt_of_row\[1\] = 1 is not one of the 1 prompts"),
    "a negative prompt": ({"prompt_of_row": [-1, 0]}, r"prompt_of_row\[0\] = -1 is not one of the 1 prompts"),
}


@pytest.mark.parametrize("changes, message", WRONG.values(), ids=WRONG)
def test_what_does_not_fit_is_refused_with_what_was_given(changes, message):
    with pytest.raises(ValueError, match=message):
        check(**changes)
