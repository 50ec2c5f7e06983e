"""The index tensors of the packed row, built on the device in one op."""

from softprompt.ops.pack_layout.api import NEVER_A_KEY, LayoutTensors, pack_layout, prompt_offsets

__all__ = ["NEVER_A_KEY", "LayoutTensors", "pack_layout", "prompt_offsets"]
