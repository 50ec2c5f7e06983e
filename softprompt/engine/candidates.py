"""How likely each of several continuations is after each text, all of them in one packed row.

`[prompt | text_1 | its candidates | text_2 | its candidates | ...]`: the prompt and every text are computed
once. A candidate is a branch of its text: it sees the prompt, the text and itself.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from softprompt.engine import sharding
from softprompt.engine.batch import POSITIONS, Batch, check_batch, check_option, refuse_prompt_model
from softprompt.engine.losses import own_logits
from softprompt.engine.model_spec import CausalLM, body_of, position_limit, prompt_width, vocab_size
from softprompt.engine.plan import Plan, plan_for
from softprompt.engine.runner import UnsupportedModelError, obstacle_to
from softprompt.engine.self_check import reference_forward
from softprompt.layout import PackedLayout, branch_out, build_layout, raise_out_of_range
from softprompt.ops.registry import AUTO, BACKENDS
from softprompt.warn import warn

_LOGITS_AT_ONCE = 2**24  # numbers


def score(
    model: CausalLM,
    prompts: Tensor | Sequence[Tensor],  # [P, H], or K of [P_k, H]
    candidates: Sequence[Sequence[int]],  # C
    input_ids: Tensor,  # [B, L]
    attention_mask: Tensor | None = None,  # [B, L]
    prompt_of_row: Tensor | Sequence[int] | None = None,  # [B]
    *,
    positions: str = "padded",
    backend: str = AUTO,
) -> Tensor:
    """`log p(candidate_c | prompt, text_b)` of every candidate behind every text: the sum over its tokens.

    One forward over `ΣP + Σ len(text_b) + B * Σ (len(candidate_c) - 1)` tokens, where one candidate at a time
    takes C forwards over all of the prompt and the texts. Equal to that up to rounding. A model that cannot
    be packed is run one candidate at a time, with a warning; so is one whose rotary embedding depends on the
    longest row, where that is long enough to change it.

    Whatever ends a candidate (the end-of-sequence token, as a rule) is part of it: without an end, "no" is
    never less likely than "no complaint", because the longer one begins with it.

    Args:
        model: any transformers causal LM. It is run in the mode that it is in: call `model.eval()` before.
        prompts: one prompt [P, H], or K prompts of any lengths.
        candidates: C lists of token ids, none of them empty.
        input_ids: [B, L] integers, without the prompt. A text may be empty: its candidates follow the
            prompt at once, whatever the padding side.
        attention_mask: [B, L], 0 = pad, any padding side. None: no pads.
        prompt_of_row: [B], the number of the prompt of each row. None: prompt 0 (only with one prompt).
        positions: "padded": a text has the positions of the padded batch and a candidate goes on from there,
            so equal to PEFT on `[pads | text | candidate]`; "compact": pads do not exist, so equal to each
            row alone without padding. A model that is run one candidate at a time always does the latter.
        backend: "auto" or the name of a back end of the ops.

    Returns:
        [B, C] in fp32 (fp64 for fp64 models), differentiable in the prompts.

    Raises:
        TypeError: not a transformers model, or a PEFT model that brings a prompt of its own.
        IndexError: an id outside the vocabulary.
        ValueError: no candidates, an empty candidate, something else than token ids, shapes that do not fit,
            or prompt, text and candidate together longer than the model's positions.
        UnsupportedModelError: an encoder-decoder, or prompts of several lengths on a model that cannot be
            packed.
    """
    check_option("positions", positions, POSITIONS)
    check_option("backend", backend, (AUTO, *BACKENDS))
    refuse_prompt_model(model, "softprompt.score")
    batch = check_batch(
        prompts,
        prompt_width(model),
        input_ids=input_ids,
        inputs_embeds=None,
        attention_mask=attention_mask,
        labels=None,
        prompt_of_row=prompt_of_row,
    )
    continuations = _checked_candidates(candidates, vocab_size(model))
    longest_candidate = max(map(len, continuations))
    if sharding.by_fsdp(model):
        raise UnsupportedModelError(f"softprompt: {sharding.ONLY_FORWARD}")
    plan, compact = plan_for(model), positions == "compact"
    limit = position_limit(model, body_of(model)) if plan.position_limit is None else plan.position_limit
    _check_length(batch, longest_candidate, limit, compact=compact)
    longest = max(batch.prompt_lengths) + batch.shape[1] + longest_candidate
    packed = plan.route == "packed"
    branches = batch.shape[0] * sum(map(len, continuations))
    rows = sum(batch.prompt_lengths) + batch.shape[0] * batch.shape[1] + branches
    reason = obstacle_to(plan, compact=compact, longest=longest, rows=rows) if packed else plan.reason
    reason = reason or _rotary_obstacle(plan, batch, longest_candidate)
    if reason is None:
        return _packed(model, plan, batch, continuations, compact, backend)
    if getattr(model.config, "is_encoder_decoder", False) or len(set(batch.prompt_lengths)) > 1:
        raise UnsupportedModelError(f"softprompt: candidates cannot be scored: {reason}")
    warn(f"candidates are scored one at a time: {reason}")
    raise_out_of_range(batch.input_ids, None, vocab_size(model))
    return _one_at_a_time(model, batch, continuations, alike=plan.rotary_switch is not None)


def _checked_candidates(candidates: Sequence[Sequence[int]], vocabulary: int) -> list[list[int]]:
    try:
        checked = [[operator.index(token) for token in candidate] for candidate in candidates]
    except TypeError as error:
        raise ValueError(f"candidates must be lists of token ids, got {candidates!r}") from error
    if not checked:
        raise ValueError("expected at least one candidate, got none")
    for number, candidate in enumerate(checked):
        if not candidate:
            raise ValueError(f"candidate {number} has no tokens, expected at least one")
        for place, token in enumerate(candidate):
            if not 0 <= token < vocabulary:
                raise IndexError(
                    f"candidates[{number}][{place}] = {token} is outside the vocabulary 0 .. {vocabulary - 1}"
                )
    return checked


def _rotary_obstacle(plan: Plan, batch: Batch, candidate: int) -> str | None:
    """Why rows may not share a rotary embedding: the longest of them would change that of the others."""
    if plan.rotary_switch is None:
        return None
    longest = max(batch.prompt_lengths) + _longest_text(batch) + candidate
    if longest <= plan.rotary_switch:
        return None
    return (
        f"the model's rotary embedding changes beyond {plan.rotary_switch} positions, and prompt, text and "
        f"candidate take up to {longest}"
    )


def _longest_text(batch: Batch) -> int:
    return int((batch.attention_mask != 0).sum(1).max())


def _check_length(batch: Batch, candidate: int, limit: int | None, *, compact: bool) -> None:
    """Raises ValueError where a row does not fit the position table; a candidate's last token needs none."""
    if limit is None:
        return
    text = _longest_text(batch) if compact else batch.shape[1]
    longest = max(batch.prompt_lengths) + text + candidate - 1
    if longest > limit:
        raise ValueError(
            f"prompt ({max(batch.prompt_lengths)} tokens), text ({text}) and candidate ({candidate}) need "
            f"{longest} positions, but the model has {limit}: shorten the texts or the prompt"
        )


# ------------------------------------------------------------------------------------------- all at once
def _packed(
    model: CausalLM,
    plan: Plan,
    batch: Batch,
    candidates: list[list[int]],
    compact: bool,
    backend: str,
) -> Tensor:
    device, num_rows = batch.attention_mask.device, batch.shape[0]
    firsts = torch.tensor([candidate[0] for candidate in candidates], device=device)
    # Fed: all tokens but a candidate's last, which only has to be predicted.
    fed = torch.tensor([t for c in candidates for t in c[:-1]], dtype=torch.int64, device=device)
    followers = torch.tensor([t for c in candidates for t in c[1:]], dtype=torch.int64, device=device)
    number = [n for n, c in enumerate(candidates) for _ in c[:-1]]
    place = [p for c in candidates for p in range(len(c) - 1)]
    candidate_of = torch.tensor(number, dtype=torch.int64, device=device)

    layout = _layout_of(plan, batch, fed, candidate_of, place, compact, backend)
    rows = plan.decode(model, _with_candidates(batch, fed), layout, backend=backend)
    lengths = (batch.attention_mask != 0).sum(1)
    starts = layout.cu_texts[:-1].long()
    ends = starts + lengths
    of_prompt = layout.cu_prompts.long()[layout.prompt_of_row.long() + 1]
    before = torch.where(lengths > 0, ends, of_prompt) - 1  # the row that predicts a candidate's first token
    branches = (ends[:, None] + torch.arange(fed.shape[0], device=device)).reshape(-1)

    total = _log_probabilities(model, rows.hidden, before, firsts.expand(num_rows, -1), rows.output_class)
    if not fed.shape[0]:
        return total
    each = _log_probabilities(
        model, rows.hidden, branches, followers.repeat(num_rows)[:, None], rows.output_class
    )
    return total.index_add(1, candidate_of, each.view(num_rows, -1))


def _with_candidates(batch: Batch, fed: Tensor) -> Batch:
    num_rows = batch.shape[0]
    ids, mask = batch.input_ids, batch.attention_mask
    if ids is None:
        raise ValueError("candidates are scored behind input_ids, not behind inputs_embeds")
    return replace(
        batch,
        input_ids=torch.cat([ids, fed.to(ids.dtype).expand(num_rows, -1)], 1),
        attention_mask=torch.cat([mask, mask.new_ones(num_rows, fed.shape[0])], 1),
    )


def _layout_of(
    plan: Plan,
    batch: Batch,
    fed: Tensor,
    candidate_of: Tensor,
    place: list[int],
    compact: bool,
    backend: str,
) -> PackedLayout:
    whole = _with_candidates(batch, fed)
    positions = plan.layout_positions(compact)
    layout = build_layout(
        whole.attention_mask,
        whole.prompt_lengths,
        input_ids=whole.input_ids,
        prompt_of_row=whole.prompt_of_row,
        vocab_size=plan.known_facts.vocab_size,
        positions=positions,
        backend=backend,
    )
    places = torch.tensor(place, dtype=torch.int32, device=fed.device)
    return branch_out(layout, batch.attention_mask, candidate_of.int() + 1, places, positions)


def _log_probabilities(
    model: CausalLM, hidden: Tensor, rows: Tensor, targets: Tensor, output_class: type
) -> Tensor:
    """[R, n]: log-probabilities of the tokens `targets` [R, n] in the rows [R] of `hidden`.

    The logits of few rows are there at a time.
    """
    parts, first, count = [], 0, 1
    while first < rows.shape[0]:
        logits = own_logits(model, hidden[rows[first : first + count]][None], output_class)[0]
        logits = logits if logits.dtype == torch.float64 else logits.float()
        wanted = logits.gather(1, targets[first : first + count])
        parts.append(wanted - logits.logsumexp(1, keepdim=True))
        first += count
        count = max(1, _LOGITS_AT_ONCE // logits.shape[1])
    return torch.cat(parts)


# ------------------------------------------------------------------------------------------ one at a time
def _one_at_a_time(model: CausalLM, batch: Batch, candidates: list[list[int]], *, alike: bool) -> Tensor:
    """[B, C]; where `alike`, rows of one length are run together and others are not, so without any pad."""
    lengths = (batch.attention_mask != 0).sum(1)
    groups = [torch.arange(len(lengths), device=lengths.device)]
    if alike:
        groups = [(lengths == length).nonzero()[:, 0] for length in lengths.unique()]
    parts = []
    for rows in groups:
        part = _rows_of(batch, rows)
        parts.append(torch.stack([_alone(model, part, c, feed_last=alike) for c in candidates], 1))
    return torch.cat(parts)[torch.cat(groups).argsort()]


def _rows_of(batch: Batch, rows: Tensor) -> Batch:
    """Some rows of a batch, with their texts to the front and no more pads behind them than must be.

    So no padding side and no recurrent state matters.
    """
    mask = batch.attention_mask[rows]
    order = (mask == 0).int().argsort(dim=1, stable=True)[:, : int((mask != 0).sum(1).max())]
    return replace(
        batch,
        input_ids=torch.as_tensor(batch.input_ids)[rows].gather(1, order),
        attention_mask=mask.gather(1, order),
        prompt_of_row=None if batch.prompt_of_row is None else batch.prompt_of_row[rows],
    )


def _alone(model: CausalLM, batch: Batch, candidate: list[int], *, feed_last: bool) -> Tensor:
    """[B] log-probabilities of one candidate, in rows that are padded behind it.

    Its last token has only to be predicted: it is fed where the length of the row changes the numbers.
    """
    tokens = torch.tensor(candidate, dtype=torch.int64, device=batch.attention_mask.device)
    whole = _with_candidates(batch, tokens if feed_last else tokens[:-1])
    whole = _rows_of(whole, torch.arange(len(batch.attention_mask), device=tokens.device))
    logits = reference_forward(model, whole).logits
    logits = logits if logits.dtype == torch.float64 else logits.float()
    last = batch.prompt_lengths[0] + (batch.attention_mask != 0).sum(1) - 1
    columns = last[:, None] + torch.arange(len(candidate), device=last.device)
    rows = logits.take_along_dim(columns[:, :, None], 1)
    wanted = rows.gather(2, tokens.expand(len(last), -1)[:, :, None])[:, :, 0]
    scores: Tensor = (wanted - rows.logsumexp(2)).sum(1)
    return scores
