"""Hooks and quantised layers in the parts of an encoder-decoder act as with PEFT."""

import pytest
import torch
from parity import assert_close
from quantised_modules import Linear8bitLt, replace_linears
from seq2seq_models import assert_same_answers, prompted, seq2seq_batch
from tiny_models import pair

import softprompt
from softprompt.engine import plan_for


def neftune(module, args, output):
    """Noise that depends on the shape of the padded batch, as NEFTune's does."""
    noise = torch.sin(torch.arange(output.numel(), dtype=output.dtype)).view(output.shape)
    return output + 5 * noise / (output.shape[1] * output.shape[2]) ** 0.5


def half_more(module, args, output):
    return type(output)(last_hidden_state=output.last_hidden_state * 1.5)


HOOKS = {
    "encoder": lambda model: model.get_base_model().get_encoder().register_forward_hook(half_more),
    "decoder": lambda model: model.get_base_model().get_decoder().register_forward_hook(half_more),
    "embedding": lambda model: model.word_embeddings.register_forward_hook(neftune),
}


@pytest.mark.parametrize("hang", HOOKS.values(), ids=HOOKS)
def test_hooks_that_come_after_the_patch_act_as_with_peft(hang):
    stock, fast = pair(prompted("t5"))
    softprompt.patch(fast, on_unsupported="error")
    quiet = fast(**seq2seq_batch()).loss
    for model in (stock, fast):
        hang(model)
    assert_same_answers(fast, stock, seq2seq_batch())
    stock, fast = (model(**seq2seq_batch()) for model in (stock, fast))
    assert (fast.loss - quiet).abs() > 1e-3
    got, expected = (output.encoder_last_hidden_state.detach()[:, :7] + 0 for output in (fast, stock))
    assert_close(got[0], expected[0], 1e-12, "encoder's hidden states")  # of the longest row


@pytest.mark.parametrize("part", ["encoder", "decoder"])
@pytest.mark.parametrize("threshold", [0.0, 2.0])
def test_layers_that_look_at_all_tokens_keep_the_columns_of_pads(part, threshold):
    model = prompted("t5-1.1", torch.float32)
    replace_linears(getattr(model.get_base_model(), part), lambda linear: Linear8bitLt(linear, threshold))
    stock, fast = pair(model)
    softprompt.patch(fast, on_unsupported="error")
    assert plan_for(fast.get_base_model(), encoder_decoder=True).trims == (threshold == 0)
    assert_same_answers(fast, stock, seq2seq_batch(width=20), 1e-5)
