"""Cross-entropy of the label rows through a linear head; see `api.py`."""

from softprompt.ops.linear_cross_entropy.api import check_num_items, linear_cross_entropy

__all__ = ["check_num_items", "linear_cross_entropy"]
