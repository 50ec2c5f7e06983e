"""Numbers that several ops, or an op and its callers, have in common."""

from __future__ import annotations

IGNORE_INDEX = -100  # a target without loss and gradient, as in `torch.nn.functional.cross_entropy`
MASKED_KEY = 2**31 - 1  # key position of a token that no query attends to
# Rows of a buffer of logits are whole blocks of 32 entries: kernels can use vector loads for any V, and a
# library's product that takes a row in blocks (AMX: 64 bytes, whatever V is) stays within the row.
ROW_ALIGNMENT = 32
LOG2E = 1.4426950408889634  # kernels keep scores in units of log2, so that exp2 serves for exp
