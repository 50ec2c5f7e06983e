"""What a soft prompt has come to mean: the tokens that its vectors lie near, and how far they have moved.

Lester et al. 2021, section 7: the nearest tokens of a virtual token by cosine form clusters of words, and
labels that a prompt started from are still among them after training.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from softprompt.prompts.adapters import check_prompt, prompt_parameter
from softprompt.prompts.vocabulary import blocks, vocab_size_of, width_of


@dataclass(frozen=True, eq=False)
class Nearest:
    """The k nearest tokens of P vectors, nearest first.

    Attributes:
        token_ids: [P, k] int64.
        values: [P, k] fp64: cosines, or distances.
    """

    token_ids: Tensor
    values: Tensor


@dataclass(frozen=True, eq=False)
class Movement:
    """How far P virtual tokens are from where they started.

    Attributes:
        distance: [P] fp64, L2 norm of the difference.
        cosine: [P] fp64, between start and now.
        initial_norms: [P] fp64.
        initial_token_ids: [P] int64, the token that each start was nearest to by cosine.
    """

    distance: Tensor
    cosine: Tensor
    initial_norms: Tensor
    initial_token_ids: Tensor


@dataclass(frozen=True, eq=False)
class Inspection:
    """What `inspect_prompt` found; tensors are on the CPU.

    Attributes:
        norms: [P] fp64, L2 norms of the virtual tokens.
        similarity: [P, P] fp64, cosines between virtual tokens.
        by_cosine: nearest tokens by the angle.
        by_distance: nearest tokens by the L2 distance.
        vocabulary_norms: [V] fp64, L2 norms of the tokens.
        movement: against the initial prompt, None where that was not given.
    """

    norms: Tensor
    similarity: Tensor
    by_cosine: Nearest
    by_distance: Nearest
    vocabulary_norms: Tensor
    movement: Movement | None

    def to_dict(self, tokenizer: Any) -> dict[str, Any]:
        """The same as plain Python values, with the tokens as text, ready for JSON."""

        def near(nearest: Nearest, place: int, key: str) -> list[dict[str, Any]]:
            pairs = zip(nearest.token_ids[place].tolist(), nearest.values[place].tolist(), strict=True)
            return [{"token_id": i, "token": token_text(tokenizer, i), key: value} for i, value in pairs]

        tokens: list[dict[str, Any]] = []
        for place, norm in enumerate(self.norms.tolist()):
            entry: dict[str, Any] = {
                "virtual_token": place,
                "norm": norm,
                "nearest_by_cosine": near(self.by_cosine, place, "cosine"),
                "nearest_by_distance": near(self.by_distance, place, "distance"),
            }
            if self.movement is not None:
                started_at = int(self.movement.initial_token_ids[place])
                entry["movement"] = {
                    "distance": float(self.movement.distance[place]),
                    "cosine": float(self.movement.cosine[place]),
                    "initial_norm": float(self.movement.initial_norms[place]),
                    "initial_token_id": started_at,
                    "initial_token": token_text(tokenizer, started_at),
                }
            tokens.append(entry)
        quantiles = norm_quantiles(self.vocabulary_norms)
        return {
            "num_virtual_tokens": len(tokens),
            "vocabulary_norms": dict(zip(("p05", "median", "p95"), quantiles, strict=True)),
            "virtual_tokens": tokens,
            "similarity": self.similarity.tolist(),
        }


@torch.no_grad()
def inspect_prompt(
    model: Any,
    prompt: Tensor | None = None,
    *,
    initial: Tensor | None = None,
    neighbours: int = 5,
    vocab_size: int | None = None,
) -> Inspection:
    """Compares a soft prompt with the vocabulary, with itself and with its start.

    The vocabulary is gone through in blocks of some 64 MiB, in fp64: beside the table itself this needs
    one block, its [P, block] scores and [V] norms.

    Args:
        model: a transformers causal LM, or a PEFT model around one.
        prompt: [P, H]; by default the active adapter's.
        initial: [P, H] that the prompt started from.
        neighbours: k, tokens to name for each virtual token.
        vocab_size: leave out token ids from here on; `len(tokenizer)` where the table is longer.

    Raises:
        TypeError: no prompt, and not a PEFT model.
        ValueError: a prompt of another width than the model's tokens or with values that are not finite, an
            initial prompt of another shape, or a number out of range.
    """
    if prompt is None:
        prompt = prompt_parameter(model)
    width, size = width_of(model), vocab_size_of(model)
    check_prompt(prompt, width=width)
    if initial is not None:
        check_prompt(initial, width=width, num_virtual_tokens=len(prompt), source="the initial prompt")
    size = size if vocab_size is None else vocab_size
    if not 1 <= size <= vocab_size_of(model):
        raise ValueError(f"vocab_size must be from 1 to {vocab_size_of(model)}, got {vocab_size}")
    if not 1 <= neighbours <= size:
        raise ValueError(f"neighbours must be from 1 to {size}, got {neighbours}")
    vectors = prompt.detach().to("cpu", torch.float64)
    start = None if initial is None else initial.detach().to("cpu", torch.float64)
    by_cosine, by_distance, norms, started_at = _search(model, vectors, start, neighbours, size)
    unit = _unit(vectors)
    return Inspection(
        norms=vectors.norm(dim=1),
        similarity=unit @ unit.T,
        by_cosine=by_cosine,
        by_distance=by_distance,
        vocabulary_norms=norms,
        movement=None if start is None or started_at is None else _movement(vectors, start, started_at),
    )


def norm_quantiles(norms: Tensor) -> list[float]:
    """The 5 %, 50 % and 95 % quantiles of [V] norms."""
    ranks = [round(share * (len(norms) - 1)) for share in (0.05, 0.5, 0.95)]
    return norms.sort().values[ranks].tolist()  # torch.quantile takes no more than 16 million numbers


def near_any(nearest: Nearest, token_ids: Iterable[int]) -> list[int]:
    """The places of the vectors that have one of the tokens among their nearest."""
    hits = torch.isin(nearest.token_ids, torch.tensor(sorted(token_ids), dtype=torch.int64)).any(dim=1)
    places: list[int] = hits.nonzero().flatten().tolist()
    return places


def token_text(tokenizer: Any, token_id: int) -> str:
    """A token as readable text: a space in front of a word stays one."""
    return str(tokenizer.decode([token_id]))


def _search(
    model: Any,
    vectors: Tensor,
    start: Tensor | None,
    neighbours: int,
    size: int,
) -> tuple[Nearest, Nearest, Tensor, Tensor | None]:
    """In one pass: nearest by cosine and by distance, [V] norms of the tokens, [P] nearest of the start."""
    nothing = Nearest(
        torch.empty(len(vectors), 0, dtype=torch.int64), torch.empty(len(vectors), 0, dtype=torch.float64)
    )
    cosine = distance = first = nothing
    norms = torch.empty(size, dtype=torch.float64)
    for offset, block in blocks(model, size):
        device, lengths = block.device, block.norm(dim=1)
        norms[offset : offset + len(block)] = lengths.cpu()
        here = vectors.to(device)
        products = here @ block.T
        scale = lengths.clamp_min(torch.finfo(torch.float64).tiny)
        cosines = products / (here.norm(dim=1, keepdim=True).clamp_min(1e-300) * scale)
        squares = lengths.square() - 2 * products + here.square().sum(1, keepdim=True)
        cosine = _best(cosine, cosines, offset, neighbours)
        distance = _best(distance, -squares, offset, neighbours)
        if start is not None:
            first = _best(first, _unit(start.to(device)) @ (block / scale[:, None]).T, offset, 1)
    distances = Nearest(distance.token_ids, (-distance.values).clamp_min(0).sqrt())
    return cosine, distances, norms, None if start is None else first.token_ids[:, 0]


def _best(so_far: Nearest, scores: Tensor, offset: int, count: int) -> Nearest:
    """The `count` highest of the scores [P, n] of tokens from `offset` on, and of those found before."""
    values, ids = scores.topk(min(count, scores.shape[1]), dim=1)
    values = torch.cat([so_far.values, values.cpu()], 1)
    ids = torch.cat([so_far.token_ids, ids.cpu() + offset], 1)
    values, chosen = values.topk(min(count, values.shape[1]), dim=1)
    return Nearest(ids.gather(1, chosen), values)


def _movement(vectors: Tensor, start: Tensor, started_at: Tensor) -> Movement:
    return Movement(
        distance=(vectors - start).norm(dim=1),
        cosine=(_unit(vectors) * _unit(start)).sum(1),
        initial_norms=start.norm(dim=1),
        initial_token_ids=started_at,
    )


def _unit(vectors: Tensor) -> Tensor:
    """[n, H] scaled to length 1; a vector of zeros stays what it is."""
    return torch.nn.functional.normalize(vectors, dim=1, eps=1e-300)
