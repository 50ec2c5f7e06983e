"""Attention over the packed row: causal in the prompt, prompt and own earlier tokens in the texts."""

from softprompt.ops.shared_prompt_attention.api import shared_prompt_attention
from softprompt.ops.shared_prompt_attention.layout import AttentionLayout

__all__ = ["AttentionLayout", "shared_prompt_attention"]
