"""Columns that are -100 in all rows do not reach the decoder, and have PEFT's logits all the same."""

import pytest
import torch
from marks import slow_unless
from parity import assert_close, prompt_of
from peft import LoraConfig, get_peft_model
from seq2seq_models import (
    FAMILIES,
    KEEP_COLUMNS,
    QUICK_FAMILIES,
    assert_same_answers,
    build,
    config_of,
    encoded,
    prompted,
    seq2seq_batch,
)
from tiny_models import VOCABULARY, pair

import softprompt
from softprompt.engine.lazy_logits import LazyLogits


def padded(batch=None, columns=6):
    """A batch whose labels are as if padded to a fixed length."""
    batch = seq2seq_batch() if batch is None else batch
    return batch | {"labels": torch.nn.functional.pad(batch["labels"], (0, columns), value=-100)}


def patched(stock):
    stock, fast = pair(stock)
    return stock, softprompt.patch(fast, on_unsupported="error")


def columns_of(model, batch, **kwargs):
    """Columns that the decoder sees in a step, and the step's output."""
    seen = []

    def keep(module, args, given):
        inputs = given.get("input_ids")
        seen.append((given["inputs_embeds"] if inputs is None else inputs).shape[1])

    handle = model.get_base_model().get_decoder().register_forward_pre_hook(keep, with_kwargs=True)
    output = model(**batch, **kwargs)
    handle.remove()
    (columns,) = seen
    return columns, output


@pytest.mark.parametrize("name", slow_unless(QUICK_FAMILIES, FAMILIES))
def test_every_family_gives_the_numbers_of_peft_for_padded_labels(name):
    stock, fast = patched(prompted(name, torch.float32 if name == "led" else torch.float64))
    bound = {"t5gemma": 1e-6, "led": 1e-5}.get(name, 1e-12)
    for side in ("right", "left"):
        assert_same_answers(fast, stock, padded(seq2seq_batch(side)), bound)
    # t5gemma masks pads of its decoder.
    assert columns_of(fast, padded())[0] == (11 if name in (*KEEP_COLUMNS, "t5gemma") else 5)


def test_what_is_left_out_is_computed_when_it_is_looked_at():
    stock, fast = patched(prompted("t5"))
    outputs = [model(**padded()) for model in (stock, fast)]
    lazy = outputs[1].logits
    assert isinstance(lazy, LazyLogits)
    assert lazy.shape == (3, 11, VOCABULARY)
    with torch.no_grad():  # as an optimizer does
        for model in (stock, fast):
            prompt_of(model).add_(1)
    assert not lazy.is_materialized
    assert_close(lazy.detach() + 0, outputs[0].logits.detach(), 1e-12, "logits")


@pytest.mark.parametrize("name", ["t5", "bart"])
@pytest.mark.parametrize("way", ["used", "handed on"])
def test_logits_of_all_columns_carry_their_gradient_to_the_prompt(name, way):
    grads = []
    for model in patched(prompted(name)):
        model.zero_grad()
        output = model(**padded())
        if way == "used":
            (
                output.loss + output.logits.square().mean() + output.encoder_last_hidden_state[:, :4].sum()
            ).backward()
        else:  # to code that takes the wrapper itself
            torch.autograd.backward(
                [output.loss, output.logits], [None, torch.ones(3, 11, VOCABULARY).double()]
            )
        grads.append(prompt_of(model).grad.clone())
    # T5's norms round to fp32: here the gradients of both parts, where PEFT's round their sum.
    assert_close(grads[1], grads[0], 1e-7 if name == "t5" else 1e-12, "gradient")


CHANGES = {
    "no mask": {"attention_mask": None},
    "decoder_input_ids": {"decoder_input_ids": torch.arange(3, 36).view(3, 11)},
    "num_items_in_batch": {"num_items_in_batch": torch.tensor(9)},
    "one column": {"labels": torch.tensor([[5, -100, -100], [-100, -100, -100], [7, -100, -100]])},
}


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
def test_other_arguments_are_as_with_peft(changes):
    stock, fast = patched(prompted("t5"))
    batch = padded() | changes
    assert_same_answers(fast, stock, batch)
    assert columns_of(fast, batch)[0] == (1 if "labels" in changes else 5)


def test_autocast_and_checkpointing_are_as_with_peft():
    stock, fast = patched(prompted("t5", torch.float32).train())
    for model in (stock, fast):
        model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, got = (model(**padded(), use_cache=False) for model in (stock, fast))
    assert got.logits.dtype == expected.logits.dtype
    assert_close(got.logits.detach().float(), expected.logits.detach().float(), 2e-2, "logits")


IDS = torch.arange(33).view(3, 11)
GIVEN = {
    "decoder_inputs_embeds": lambda model: model.word_embeddings(IDS),
    # The first column of the last row sees nothing, and so the average of all columns.
    "decoder_attention_mask": lambda model: (IDS % 3 != 1).long(),
}


@pytest.mark.parametrize("given", GIVEN)
def test_embeddings_and_masks_of_the_decoder_are_left_as_they_are_given(given):
    stock, fast = patched(prompted("t5"))
    batch = padded() | {given: GIVEN[given](stock)}
    assert_same_answers(fast, stock, batch)
    assert columns_of(fast, batch)[0] == 11


def test_prompts_of_the_decoder_keep_all_columns():
    stock, fast = patched(encoded("multitask"))
    tasks = {"task_ids": torch.tensor([2, 0, 2])}
    assert_same_answers(fast, stock, padded(), **tasks)
    assert columns_of(fast, padded(), **tasks)[0] == 4 + 11


def test_a_decoder_that_trains_keeps_all_columns():
    adapted = get_peft_model(build("t5"), LoraConfig(r=2, target_modules=["q"], init_lora_weights=False))
    model = get_peft_model(adapted.base_model.model, config_of()).double()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name or "prompt_encoder" in name)
    stock, fast = patched(model)
    assert_same_answers(fast, stock, padded())
    assert columns_of(fast, padded())[0] == 11


def test_dropout_without_these_columns_is_said_once():
    fast = softprompt.patch(prompted("t5", dropout_rate=0.3).train(), on_unsupported="error")
    with pytest.warns(UserWarning, match="left out and draw no masks"):
        output = fast(**padded(seq2seq_batch(width=7)))
    assert torch.isfinite(output.logits.detach()).all()


def test_labels_that_are_longer_than_the_positions_are_refused_with_their_pads():
    fast = softprompt.patch(prompted("bart"), on_unsupported="error")
    with pytest.raises(ValueError, match="the decoder's input is 70 tokens long"):
        fast(**padded(columns=65))
