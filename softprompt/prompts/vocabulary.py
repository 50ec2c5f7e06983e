"""The vectors of a model's vocabulary, as a prompt beside them sees them.

A soft prompt enters a model as `inputs_embeds`, so its vectors are of the kind that the input embedding
module returns. What the module does to its weight (Gemma multiplies by sqrt(H)) is part of them; what the
model does to `inputs_embeds` later (Granite's multiplier, BLOOM's LayerNorm) meets the prompt, too, and is
not. So every vector here comes out of a call of the module, never out of its weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from softprompt.engine import model_spec
from softprompt.engine.model_spec import prompt_width
from softprompt.nesting import base_of

_BLOCK_BYTES = 64 * 2**20


def width_of(model: Any) -> int:
    """H, the length of a token's vector."""
    return prompt_width(base_of(model))


def vocab_size_of(model: Any) -> int:
    """V, the number of vectors."""
    return model_spec.vocab_size(base_of(model))


def check_ids(model: Any, ids: Tensor) -> None:
    """Raises ValueError where one of the token ids [N] is outside of the model's vocabulary."""
    size = vocab_size_of(model)
    outside = ids[(ids < 0) | (ids >= size)]
    if len(outside):
        raise ValueError(
            f"token id {int(outside[0])} is outside of the model's vocabulary of {size}: "
            "the tokenizer is not that of the model"
        )


@torch.no_grad()
def embed(model: Any, token_ids: Sequence[int] | Tensor) -> Tensor:
    """[N, H] fp32 vectors of N tokens, on the CPU.

    Raises:
        ValueError: an id is outside of the vocabulary.
    """
    ids = torch.as_tensor(token_ids, dtype=torch.long)
    check_ids(model, ids)
    embedding = base_of(model).get_input_embeddings()
    rows: Tensor = embedding(ids.to(embedding.weight.device)).detach().clone().to("cpu", torch.float32)
    return rows


@torch.no_grad()
def dtype_of(model: Any) -> torch.dtype:
    """In which dtype the model gets the vectors of its tokens; a quantised table has another one."""
    embedding = base_of(model).get_input_embeddings()
    dtype: torch.dtype = embedding(torch.zeros(1, 1, dtype=torch.long, device=embedding.weight.device)).dtype
    return dtype


@torch.no_grad()
def blocks(model: Any, vocab_size: int | None = None) -> Iterator[tuple[int, Tensor]]:
    """The vocabulary block by block: the first id, and [n, H] fp64 vectors on the embedding's device.

    Args:
        model: a causal LM, or a PEFT model around one.
        vocab_size: leave out the ids from here on (many tables are longer than their tokenizer).
    """
    embedding = base_of(model).get_input_embeddings()
    size = vocab_size_of(model) if vocab_size is None else vocab_size
    step = max(1, _BLOCK_BYTES // (8 * width_of(model)))
    for start in range(0, size, step):
        ids = torch.arange(start, min(start + step, size), device=embedding.weight.device)
        yield start, embedding(ids).detach().to(torch.float64)


def mean_and_std(model: Any) -> tuple[Tensor, Tensor]:
    """[H] and [H], fp64 on the CPU: mean and standard deviation of the vocabulary in every dimension."""
    total = squares = torch.zeros(width_of(model), dtype=torch.float64)
    for _, vectors in blocks(model):
        total = total + vectors.sum(0).cpu()
        squares = squares + vectors.square().sum(0).cpu()
    size = vocab_size_of(model)
    mean = total / size
    return mean, (squares / size - mean.square()).clamp(min=0).sqrt()


def scale_of(model: Any) -> float:
    """The root mean square of all numbers of the vocabulary's vectors."""
    mean, std = mean_and_std(model)
    return float((mean.square() + std.square()).mean().sqrt())
