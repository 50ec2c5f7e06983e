"""Cross-entropy of the label rows through a linear head; see `api.py`."""

from softprompt.ops.linear_cross_entropy.api import linear_cross_entropy

__all__ = ["linear_cross_entropy"]
