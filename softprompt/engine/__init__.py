"""Any transformers causal LM + prompts + a padded batch -> loss, prompt gradient, and logits on demand."""

from softprompt.engine.forward import forward
from softprompt.engine.plan import Plan, plan_for

__all__ = ["Plan", "forward", "plan_for"]
