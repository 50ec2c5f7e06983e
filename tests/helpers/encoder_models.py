"""PEFT models of P-tuning and of multitask prompt tuning."""

import torch
from peft import MultitaskPromptTuningConfig, PromptEncoderConfig, get_peft_model
from tiny_models import build

TASKS = 3
ENCODERS = {
    "mlp": (PromptEncoderConfig, {"encoder_hidden_size": 20}),
    "lstm": (
        PromptEncoderConfig,
        {"encoder_hidden_size": 12, "encoder_reparameterization_type": "LSTM", "encoder_num_layers": 2},
    ),
    "multitask": (MultitaskPromptTuningConfig, {"num_tasks": TASKS, "num_ranks": 2}),
}


def encoded(kind, name="llama", dtype=torch.float64, num_virtual_tokens=4):
    """A PEFT model of one of these types, with an encoder whose every part matters."""
    base = build(name, dtype)
    torch.manual_seed(3)
    model = get_peft_model(base, config_of(base, kind, num_virtual_tokens))
    spread(model)
    return model


def config_of(base, kind, num_virtual_tokens=4):
    config, options = ENCODERS[kind]
    return config(
        task_type="CAUSAL_LM",
        num_virtual_tokens=num_virtual_tokens,
        token_dim=base.get_input_embeddings().embedding_dim,
        num_layers=1,
        num_attention_heads=1,
        **options,
    )


def spread(model):
    """The numbers that PEFT starts with are so small that mistakes would not show."""
    model.prompt_encoder.to(next(model.get_base_model().parameters()).dtype)
    for parameter in model.prompt_encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
