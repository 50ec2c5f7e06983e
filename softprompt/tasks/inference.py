"""Labels by greedy generation, and the loss of labelled rows."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from softprompt.engine import model_spec, plan_for
from softprompt.generation.prefill import prefill_for
from softprompt.generation.stock import right_options
from softprompt.nesting import base_of
from softprompt.state import state_of
from softprompt.tasks.classification import Encoder
from softprompt.tasks.collate import collate_prompts
from softprompt.tasks.template import Row

Progress = Callable[[int], None]


@torch.no_grad()
def label_texts(
    model: Any,
    encoder: Encoder,
    texts: Sequence[Row],
    *,
    batch_size: int,
    progress: Progress | None = None,
) -> list[str]:
    """Let the model write the label of every text, greedily, until its end token.

    A text gets the same label in every batch: where the task's positions are "compact" and pads count in
    `generate`, only texts of one length are batched, so that there are none. Where the template reads several
    columns, a text stands for the row with them. `progress` is called with the number of rows done in each
    batch.
    """
    task = encoder.task
    prompts = [encoder.prompt(text) for text in texts]
    alike = task.positions == "compact" and not _pads_never_count(model)
    predicted = [""] * len(texts)
    options = right_options(model)
    with evaluation_mode(model):
        for rows in _batches([len(ids) for ids in prompts], batch_size, alike=alike):
            batch = collate_prompts(encoder, [prompts[row] for row in rows])
            generated = model.generate(
                **{name: tensor.to(model.device) for name, tensor in batch.items()},
                max_new_tokens=encoder.max_target,
                do_sample=False,
                num_beams=1,
                eos_token_id=encoder.stop_token_ids,
                pad_token_id=encoder.pad_token_id,
                **options,
            )
            new_ids = generated[:, batch["input_ids"].shape[1] :].tolist()
            for row, ids in zip(rows, new_ids, strict=True):
                predicted[row] = encoder.decode(ids)
            if progress is not None:
                progress(len(rows))
    return predicted


def _batches(lengths: Sequence[int], batch_size: int, *, alike: bool) -> Iterator[list[int]]:
    """Row numbers of each batch: in order, or of rows of one length only."""
    groups: dict[int, list[int]] = {}
    for row, length in enumerate(lengths):
        groups.setdefault(length if alike else 0, []).append(row)
    for rows in groups.values():
        for start in range(0, len(rows), batch_size):
            yield rows[start : start + batch_size]


def packs_texts(base: Any) -> bool:
    """Whether `generate` of the patched model leaves pads out, so that it can be patched as "compact"."""
    plan = plan_for(base)
    return plan.route == "packed" and prefill_for(base, plan).way == "packed"


def _pads_never_count(model: Any) -> bool:
    """Whether the model itself leaves pads out of its positions (BLOOM, OPT), or is patched to.

    Without a prompt in front, the `generate` of transformers leaves them out.
    """
    base, state = base_of(model), state_of(model)
    if model is base or (state is not None and state.options.positions == "compact"):
        return packs_texts(base)
    return model_spec.positions_from_mask(model_spec.config_of(base))


@contextmanager
def evaluation_mode(model: Any) -> Iterator[None]:
    """Put the model into evaluation mode for a block, and back into the mode that it was in."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
