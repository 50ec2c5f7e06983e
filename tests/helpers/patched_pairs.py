"""A PEFT model beside its patched twin, and what `explain` says of the twin."""

import torch
from peft import PromptTuningConfig, get_peft_model
from tiny_models import pair

import softprompt

FUSED = "fused"
OWN = "the model's own head on label rows: "


def prompted(base, dtype=torch.float32):
    """A PEFT model around a base whose first parameter may be anything."""
    torch.manual_seed(3)
    width = base.get_input_embeddings().embedding_dim
    config = PromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=4, token_dim=width, num_layers=1, num_attention_heads=1
    )
    model = get_peft_model(base, config)
    model.prompt_encoder.to(dtype)
    return model


def facts(model):
    """The route, and what `explain` says of head and embedding."""
    report = softprompt.explain(model)
    details = dict(report.details)
    return report.route, details.get("head", ""), details.get("embedding", "")


def patched_pair(model, **options):
    stock, fast = pair(model)
    return stock, softprompt.patch(fast, on_unsupported="error", **options)
