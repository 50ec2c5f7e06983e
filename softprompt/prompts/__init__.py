"""Soft prompts as vectors: where they start, what they come to mean, and how they leave."""

from softprompt.prompts import export, init
from softprompt.prompts.inspection import Inspection, inspect_prompt

__all__ = ["Inspection", "export", "init", "inspect_prompt"]
