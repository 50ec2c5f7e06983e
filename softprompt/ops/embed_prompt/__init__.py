"""Embedding lookup, cast and prompt concatenation of the packed row in one pass."""

from softprompt.ops.embed_prompt.api import embed_prompt

__all__ = ["embed_prompt"]
