"""What every route is measured by: a batch behind prompts on the model's own forward."""

from __future__ import annotations

from typing import Any

import torch

from softprompt.engine.batch import Batch
from softprompt.engine.families import CausalLM


def reference_forward(model: CausalLM, batch: Batch, **kwargs: Any) -> Any:
    """The padded forward as PEFT runs it: every row with its own copy of the prompt, all positions through
    the head.
    """
    embeds = batch.inputs_embeds
    if embeds is None:
        embeds = model.get_input_embeddings()(batch.input_ids)
    length, (num_rows, _) = batch.prompt_lengths[0], batch.shape
    prompts = torch.stack([prompt.to(embeds.device) for prompt in batch.prompts])
    if batch.prompt_of_row is None:
        prompts = prompts.expand(num_rows, -1, -1)
    else:
        prompts = prompts[batch.prompt_of_row.long()]
    mask = torch.cat(
        [torch.ones(num_rows, length, device=embeds.device), batch.attention_mask.to(embeds.device)], dim=1
    )
    labels = batch.labels
    if labels is not None:
        labels = torch.cat([labels.new_full((num_rows, length), -100), labels], dim=1)
    return model(
        inputs_embeds=torch.cat([prompts.to(embeds.dtype), embeds], 1),
        attention_mask=mask,
        labels=labels,
        use_cache=False,
        return_dict=True,
        **kwargs,
    )
