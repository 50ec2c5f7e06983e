"""`generate` with the prompt computed once: what a call asks for, and what is done about it.

The keys and values of an adapter's prompt are computed at its first call and kept until its values change.
Each call gets a cache that begins with them, and transformers' own `generate` does the rest: it sees the
user's ids, so lengths, processors and streamers are about those alone.
"""

from softprompt.generation.call import GenerateCall, read_call, refuse_what_goes_wrong, stock_reason
from softprompt.generation.prompt_cache import CachedPrompt
from softprompt.generation.serve import generate

__all__ = ["CachedPrompt", "GenerateCall", "generate", "read_call", "refuse_what_goes_wrong", "stock_reason"]
