"""Prompts in front of every row of a padded batch: embeddings, mask, labels and positions in one pass."""

from softprompt.ops.prepend_prompt.api import PrependedBatch, prepend_prompt

__all__ = ["PrependedBatch", "prepend_prompt"]
