"""The fused head that TRL's trainers put on a language model: what it says of the label rows alone.

`trl.trainer.utils.add_fused_lm_head` sets a forward on the instance. Asked with `fused_lm_head=True` it gives
log-probabilities (and more) of each token's label in place of logits, otherwise it calls the model's own
forward. Its trainers ask for nothing else, so a patched model has to answer it to be of use there.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional

from softprompt.engine.batch import Batch
from softprompt.engine.losses import decoder_returns
from softprompt.engine.model_spec import CausalLM, is_own_method
from softprompt.engine.packed import DecoderOutput
from softprompt.ops.constants import IGNORE_INDEX

ASKED = "fused_lm_head"


def scores_tokens(model: CausalLM) -> bool:
    """Whether the forward of an instance is TRL's, around that of its class and nothing else."""
    forward = model.__dict__.get("forward")
    if forward is None:
        return False
    while not is_own_method(model, "forward", forward):
        forward = _wrapped_by_trl(model, forward)
        if forward is None:
            return False
    return True


def _wrapped_by_trl(model: CausalLM, forward: Any) -> Any:
    """The forward that TRL's calls where it is not asked, None where this is none of TRL's."""
    function: Any = getattr(forward, "__func__", None)
    bound = getattr(forward, "__self__", None) is model
    if not bound or ASKED not in (getattr(function, "__kwdefaults__", None) or ()):
        return None
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    return cells["original_forward"].cell_contents if "original_forward" in cells else None


def token_scores(
    model: CausalLM,
    batch: Batch,
    rows: DecoderOutput,
    *,
    compact: bool,
    arguments: dict[str, Any],
) -> Any:
    """What the fused head of a model says of a batch: as on padded rows, from the label rows alone.

    Args:
        model: the causal LM, see `scores_tokens`.
        batch: with labels.
        rows: what the decoder made of it.
        compact: whether labels at pads do not count.
        arguments: of the call, for the head.

    Returns:
        TRL's output. Its fields are [B, P + L - 1], where column c is about the label of column c + 1 of
        `[prompt | text]`, and 0 where there is none.
    """
    if batch.labels is None:
        raise ValueError(f"{ASKED}=True needs labels, got none")
    counted = batch.labels != IGNORE_INDEX
    if compact:
        counted = counted & (batch.attention_mask != 0)
    width = rows.padded_shape[1] - 1
    counted = functional.pad(counted, (width - counted.shape[1], 0))
    hidden = rows.hidden[rows.label_rows[: rows.num_labels].long()][None]
    targets = rows.label_targets[: rows.num_labels].long()[None]
    with decoder_returns(model, hidden, rows.output_class):
        output = model(inputs_embeds=hidden, shift_labels=targets, **{ASKED: True}, **arguments)
    for name, value in list(output.items()):
        if isinstance(value, Tensor) and value.shape == targets.shape:
            output[name] = value.new_zeros(counted.shape).masked_scatter(counted, value)
    return output
