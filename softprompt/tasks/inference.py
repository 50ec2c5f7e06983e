"""Labels by greedy generation, and the loss of labelled rows."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from softprompt.tasks.classification import IGNORED, Encoder, Example
from softprompt.tasks.collate import LeftPadCollator

Progress = Callable[[int], None]


@torch.no_grad()
def label_texts(
    model: Any,
    encoder: Encoder,
    texts: Sequence[str],
    *,
    batch_size: int,
    progress: Progress | None = None,
) -> list[str]:
    """Let the model write the label of every text, greedily, until its end token.

    Where the task pads to `max_length`, prompts are padded to the longest that training knows, so that a text
    gets the same label in every batch. `progress` is called with the number of rows done in each batch.
    """
    length = encoder.max_prompt if encoder.task.padding == "max_length" else None
    collate = LeftPadCollator(encoder.pad_token_id, length)
    predicted: list[str] = []
    with evaluation_mode(model):
        for start in range(0, len(texts), batch_size):
            prompts = [encoder.prompt(text) for text in texts[start : start + batch_size]]
            batch = collate([{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in prompts])
            generated = model.generate(
                input_ids=batch["input_ids"].to(model.device),
                attention_mask=batch["attention_mask"].to(model.device),
                max_new_tokens=encoder.max_target,
                do_sample=False,
                num_beams=1,
                eos_token_id=encoder.stop_token_ids,
                pad_token_id=encoder.pad_token_id,
            )
            new_ids = generated[:, batch["input_ids"].shape[1] :].tolist()
            predicted.extend(encoder.decode(ids) for ids in new_ids)
            if progress is not None:
                progress(len(prompts))
    return predicted


@torch.no_grad()
def mean_loss(
    model: Any,
    collate: LeftPadCollator,
    examples: Sequence[Example],
    *,
    batch_size: int,
    progress: Progress | None = None,
) -> float:
    """Return the mean loss over all target tokens of the examples, in nats per token."""
    total, count = 0.0, 0
    with evaluation_mode(model):
        for start in range(0, len(examples), batch_size):
            rows = examples[start : start + batch_size]
            batch = {name: tensor.to(model.device) for name, tensor in collate(rows).items()}
            targets = int((batch["labels"] != IGNORED).sum())
            total += float(model(**batch).loss) * targets
            count += targets
            if progress is not None:
                progress(len(rows))
    return total / count


@contextmanager
def evaluation_mode(model: Any) -> Iterator[None]:
    """Put the model into evaluation mode for a block, and back into the mode that it was in."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
