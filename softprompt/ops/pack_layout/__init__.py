"""The index tensors of the packed row, built on the device in one op."""

from softprompt.ops.pack_layout.api import MASKED_KEY, LayoutTensors, pack_layout, prompt_offsets

__all__ = ["MASKED_KEY", "LayoutTensors", "pack_layout", "prompt_offsets"]
