"""Models with random weights: times depend on shapes, not on quality."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

BLOOM_VOCABULARY = 250_880
LLAMA_VOCABULARY = 128_256


@dataclass(frozen=True)
class Shape:
    """A model with random weights: times depend on shapes, not on quality."""

    name: str
    model_type: str
    config: dict[str, Any]  # for transformers' AutoConfig

    def build(self, dtype: torch.dtype, device: str) -> PreTrainedModel:
        """The model, its weights drawn from seed 0."""
        torch.manual_seed(0)
        config = AutoConfig.for_model(self.model_type, **self.config)
        with torch.device(device):
            return AutoModelForCausalLM.from_config(config, dtype=dtype)


def bloom(num_layers: int, hidden_size: int, vocab_size: int = BLOOM_VOCABULARY, head_dim: int = 64) -> Shape:
    """A BLOOM shape."""
    return Shape(
        f"BLOOM {num_layers} x {hidden_size}, vocabulary {vocab_size:,}",
        "bloom",
        {
            "n_layer": num_layers,
            "hidden_size": hidden_size,
            "n_head": hidden_size // head_dim,
            "vocab_size": vocab_size,
        },
    )


def llama(
    num_layers: int,
    hidden_size: int,
    intermediate_size: int,
    num_heads: int,
    *,
    num_key_heads: int = 8,
    vocab_size: int = LLAMA_VOCABULARY,
    tied: bool,
) -> Shape:
    """A Llama-3 shape."""
    return Shape(
        f"Llama {num_layers} x {hidden_size}, heads {num_heads}/{num_key_heads}, vocabulary {vocab_size:,}",
        "llama",
        {
            "num_hidden_layers": num_layers,
            "hidden_size": hidden_size,
            "intermediate_size": intermediate_size,
            "num_attention_heads": num_heads,
            "num_key_value_heads": num_key_heads,
            "head_dim": hidden_size // num_heads,
            "vocab_size": vocab_size,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": tied,
        },
    )


BLOOM_560M = bloom(24, 1024)
LLAMA_1B = llama(16, 2048, 8192, 32, tied=True)
LLAMA_3B = llama(28, 3072, 8192, 24, tied=True)
LLAMA_8B = llama(32, 4096, 14336, 32, tied=False)

_TOYS = {
    "bloom": bloom(2, 32, vocab_size=512, head_dim=16),
    "llama": llama(2, 32, 64, 2, num_key_heads=1, vocab_size=512, tied=True),
}


def toy_of(shape: Shape) -> Shape:
    """A tiny model of the same kind."""
    return _TOYS[shape.model_type]
