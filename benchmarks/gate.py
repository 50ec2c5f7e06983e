"""No time without the right numbers: loss and prompt gradient of a variant against PEFT's.

An fp32 case is compared with PEFT itself. A narrower one is compared with PEFT in fp32 on the same weights,
one row after the other so that it fits the memory: its dtype rounds PEFT's numbers too, so a variant may be
off by twice as much as PEFT in that dtype, and by the case's tolerance beyond that.
"""

from __future__ import annotations

import copy
import gc
import math
from dataclasses import dataclass
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor

from benchmarks.cases import Case, StepBatch
from benchmarks.runner import Runner, adapter_names, prompt_config

_LOGIT_BYTES = 1 << 29  # of the rows that are computed together for the truth


@dataclass(frozen=True, eq=False)
class Truth:
    """What loss and gradient should be, and how far off a variant may be."""

    loss: float
    grad: Tensor  # [ΣP, H] fp64
    source: str
    allowed_loss: float
    allowed_gradient: float

    def check(self, loss: float, grad: Tensor) -> dict[str, Any]:
        """Errors of a variant; NaN is no number in JSON, and passes no comparison."""
        loss_difference, gradient_error = self.errors(loss, grad)
        return {
            "loss_difference": loss_difference if math.isfinite(loss_difference) else None,
            "gradient_error": gradient_error if math.isfinite(gradient_error) else None,
            "passed": loss_difference <= self.allowed_loss and gradient_error <= self.allowed_gradient,
        }

    def errors(self, loss: float, grad: Tensor) -> tuple[float, float]:
        """|loss - truth|, and |grad - truth| / |truth| in Euclidean norms."""
        return abs(loss - self.loss), float((grad - self.grad).norm() / self.grad.norm())


def truth_of(case: Case, base: Any, batch: StepBatch, reference: Runner | None) -> Truth:
    """The truth of a case, and the errors that it allows.

    Args:
        case: what is checked.
        base: the causal LM.
        batch: of the case.
        reference: PEFT on this case; None where it cannot run.

    Raises:
        ValueError: PEFT's numbers are no reference.
    """
    if case.dtype == "float32":
        loss, grad = reference.loss_and_gradient() if reference else _by_rows(case, base, batch)
        truth = Truth(loss, grad, "PEFT", case.loss_tolerance, case.gradient_tolerance)
    else:
        own = reference.loss_and_gradient() if reference else _by_rows(case, base, batch)
        truth = _narrow_truth(case, base, batch, own)
    norm = float(truth.grad.norm())
    if not (math.isfinite(truth.loss) and math.isfinite(norm) and norm > 0):
        raise ValueError(
            f"{case.name}: PEFT's loss is {truth.loss} and its gradient's norm {norm}: no reference"
        )
    return truth


def _narrow_truth(case: Case, base: Any, batch: StepBatch, own: tuple[float, Tensor]) -> Truth:
    try:
        wide = copy.deepcopy(base).float()
        loss, grad = _by_rows(case, wide, batch)
    except torch.OutOfMemoryError:
        # PEFT and softprompt in bf16 are 2 % apart with BLOOM-560m and 3 % with Llama-3.2-1B (on a CPU, with
        # random weights), each as far from float32 as the other; in deeper models they are further apart.
        return Truth(*own, f"PEFT in {case.dtype} (no memory for float32)", 2e-2, 1e-1)
    finally:
        wide = None
        gc.collect()
    exact = Truth(loss, grad, "PEFT in float32 on the same weights", 0, 0)
    loss_error, gradient_error = exact.errors(*own)
    return Truth(
        loss,
        grad,
        exact.source,
        2 * loss_error + case.loss_tolerance,
        2 * gradient_error + case.gradient_tolerance,
    )


def _by_rows(case: Case, base: Any, batch: StepBatch) -> tuple[float, Tensor]:
    """PEFT's loss and gradient, summed over a few rows at a time."""
    torch.manual_seed(1)
    model = get_peft_model(base, prompt_config(case)).to(case.device)
    names = adapter_names(case)
    for name in names[1:]:
        model.add_adapter(name, prompt_config(case))
    model.to(case.device).train()
    row_bytes = 4 * (case.num_virtual_tokens + batch.padded_length) * case.shape.config["vocab_size"]
    together = max(1, _LOGIT_BYTES // row_bytes)
    total = 0.0
    for name in names:
        model.set_adapter(name)
        for start in range(0, case.rows, together):
            rows = {key: tensor[start : start + together] for key, tensor in batch.inputs.items()}
            loss = model(**rows, num_items_in_batch=batch.num_labels * len(names)).loss
            loss.backward()
            total += float(loss.detach())
    grad = torch.cat([model.prompt_encoder[name].embedding.weight.grad.double() for name in names])
    return total, grad
