"""Tensor functions of the packed row. They know nothing of transformers or PEFT.

`registry.py` names their back ends and chooses one for each call. A small op is one file with its reference
in plain PyTorch, the oracle of the tests and the fallback; a large one is a folder.
"""

from softprompt.ops.embed_prompt import embed_prompt
from softprompt.ops.linear_cross_entropy import linear_cross_entropy
from softprompt.ops.pack_layout import pack_layout
from softprompt.ops.prepend_prompt import prepend_prompt
from softprompt.ops.shared_prompt_attention import shared_prompt_attention

__all__ = ["embed_prompt", "linear_cross_entropy", "pack_layout", "prepend_prompt", "shared_prompt_attention"]
