"""What a patched step never makes: logits of rows without labels, copies of the prompt, and pads."""

import math

import pytest
from parity import make_batch
from tiny_models import prompted
from torch.profiler import ProfilerActivity, profile

import softprompt

ROWS, PROMPT, VOCABULARY = 6, 11, 131
BATCH = make_batch((9, 3, 6, 4, 2, 7), "left", "answer", vocabulary=VOCABULARY, width=13)
NUM_LABELS = int((BATCH["labels"] != -100).sum())
NUM_TOKENS = int(BATCH["attention_mask"].sum())
PREDICTORS = 1  # the text of two tokens has a label on its first one, which its pad predicts
PADDED_TOKENS = ROWS * (PROMPT + 13)
PACKED_TOKENS = PROMPT + NUM_TOKENS + PREDICTORS


def shapes_of_a_step(model):
    """The shapes of all tensors that the ops of a step read or write, also inside this package's ops."""
    model.train()
    model(**BATCH).loss.backward()  # plans and caches
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        model(**BATCH).loss.backward()
    return {tuple(shape) for event in profiler.events() for shape in tensors(event.input_shapes)}


def tensors(shapes):
    """Shapes of the tensors among an op's arguments; those of a list of tensors are nested."""
    for shape in shapes:
        if shape and isinstance(shape[0], list):
            yield from shape
        elif shape:
            yield shape


def rows_of_logits(shapes):
    """The largest number of rows that any tensor over the vocabulary has; the head's weight is none."""
    hidden = {(VOCABULARY, width) for width in (32, 48)} | {(width, VOCABULARY) for width in (32, 48)}
    return max((math.prod(s) // VOCABULARY for s in shapes if VOCABULARY in s and s not in hidden), default=0)


def rows_of_the_body(shapes, hidden_size):
    """The largest number of rows that any tensor of hidden states has."""
    return max(math.prod(s) // hidden_size for s in shapes if len(s) == 3 and s[-1] == hidden_size)


@pytest.mark.parametrize(
    "name, hidden_size", [("llama", 48), ("bloom", 32), ("gpt2", 48), ("gemma2", 48), ("opt", 48)]
)
def test_a_packed_step_has_no_logits_beyond_the_labels_and_no_pads(name, hidden_size):
    model = prompted(name, num_virtual_tokens=PROMPT, vocab_size=VOCABULARY)
    stock = shapes_of_a_step(model)
    assert rows_of_logits(stock) == PADDED_TOKENS
    assert rows_of_the_body(stock, hidden_size) == PADDED_TOKENS
    fast = shapes_of_a_step(softprompt.patch(model, on_unsupported="error"))
    assert rows_of_logits(fast) == NUM_LABELS
    assert rows_of_the_body(fast, hidden_size) == PACKED_TOKENS


def test_a_padded_step_has_no_logits_beyond_the_labels():
    model = prompted("lfm2", num_virtual_tokens=PROMPT, vocab_size=VOCABULARY)
    assert rows_of_logits(shapes_of_a_step(model)) == PADDED_TOKENS
    fast = shapes_of_a_step(softprompt.patch(model, on_unsupported="error"))
    assert rows_of_logits(fast) == NUM_LABELS


def test_a_head_that_is_called_sees_the_label_rows_only():
    model = prompted("llama", num_virtual_tokens=PROMPT, vocab_size=VOCABULARY)
    model.get_base_model().lm_head.register_forward_hook(lambda module, args, output: output * 0.5)
    fast = shapes_of_a_step(softprompt.patch(model, on_unsupported="error"))
    assert rows_of_logits(fast) == NUM_LABELS


def test_the_frozen_weights_get_no_gradients():
    model = prompted("llama", num_virtual_tokens=PROMPT, vocab_size=VOCABULARY)
    shapes_of_a_step(softprompt.patch(model))
    assert all(p.grad is None for p in model.get_base_model().parameters())
    assert sum(p.grad is not None for p in model.parameters()) == 1
