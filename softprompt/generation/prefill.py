"""What `generate` starts from: the states of prompts and texts, in the slots of its cache.

Two ways, chosen for a model by the self-check (`prefill_for`):

- `packed`: the texts of a batch are computed as one packed row behind the known states of their prompts,
  so that neither prompts nor pads are computed. Their last column is left to the first decoding step.
- `shared`: the cache holds the states of the prompts alone, and the model's own first step computes the
  padded texts. For attention that the packed row does not reach.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from softprompt.engine import model_records, model_spec, self_check
from softprompt.engine.attention import AttentionContext
from softprompt.engine.attention_overrides import runs_the_op
from softprompt.engine.batch import Batch
from softprompt.engine.caches import cache_argument
from softprompt.engine.execution_plan import Plan, Positions
from softprompt.engine.model_spec import CausalLM
from softprompt.engine.overrides import IN_USE
from softprompt.engine.packed import check_length, embed_rows, packed_layout, run_body
from softprompt.engine.states import LayerStates, TextStates, joined, prompt_states
from softprompt.ops.registry import AUTO

# Their bias or mask counts places in the cache, so pads behind the prompt would count too.
_COUNT_PLACES = ("mpt", "gpt_neo")


@dataclass(frozen=True, eq=False)
class Start:
    """The cache before the first step, and what belongs to its slots and to those of the step."""

    states: LayerStates  # [B or 1, Hkv, S, D]; one row stands for all
    mask: Tensor  # [B, W] int64: cached slots, then the columns that the first step computes
    position_ids: Tensor | None  # [B, W]; None: places among the tokens that are not masked


# ------------------------------------------------------------------------------------------------- two ways
@torch.no_grad()
def start_packed(
    model: CausalLM,
    plan: Plan,
    batch: Batch,
    prompts: Sequence[LayerStates],
    *,
    positions: Positions,
    backend: str = AUTO,
) -> Start:
    """The states of prompts and texts but for the last column, computed as one packed row.

    Args:
        model: the causal LM.
        plan: of the model.
        batch: prompts and texts; for "compact" the pads stand on the left.
        prompts: the states of the batch's prompts.
        positions: see `Plan.layout_positions`. Where pads do not exist they come to stand before the prompt.
        backend: of the ops.
    """
    all_but_last = batch.attention_mask.clone()
    all_but_last[:, -1] = 0
    facts = plan.known_facts
    layout = packed_layout(
        replace(batch, attention_mask=all_but_last, labels=None),
        vocab_size=facts.vocab_size,
        positions=positions,
        position_limit=plan.position_limit,
        backend=backend,
    )
    known = joined(prompts)
    if layout.num_tokens:
        texts = TextStates(known)
        embeds = embed_rows(
            model.get_input_embeddings(), batch, layout, backend, readable=facts.reads_embedding
        )
        context = AttentionContext(layout, facts, backend, states=texts)
        run_body(model_spec.body_of(model), str(plan.seam), context, embeds[:, layout.prompt_tokens :])
        known = texts.collected()
    numbers = torch.arange(1, layout.num_rows + 1, device=layout.query_position.device)
    source = layout.scatter_rows(numbers[:, None])[..., 0][:, :-1]  # [B, S], 0 for pads
    if positions == "compact":
        source = source.gather(1, torch.argsort((source > 0).int(), dim=1, stable=True))
    index = (source - 1).clamp_min(0)
    states = known.map(lambda part: part[0, :, index].transpose(0, 1))
    mask = torch.cat([source > 0, batch.attention_mask[:, -1:] != 0], 1).long()
    return Start(states, mask, _slots(batch) if positions == "slots" else None)


def start_shared(plan: Plan, batch: Batch, prompts: Sequence[LayerStates], *, positions: Positions) -> Start:
    """The states of the prompts alone, see `start_packed`."""
    check_length(batch, positions, plan.position_limit)
    longest = max(batch.prompt_lengths)

    def padded(one: LayerStates) -> LayerStates:
        return one.map(lambda part: nn.functional.pad(part, (0, 0, longest - one.num_tokens, 0)))

    states = prompts[0]
    if len(prompts) > 1:
        rows = _prompt_of_row(batch)
        states = joined([padded(one) for one in prompts], 0).map(lambda part: part[rows])
    slots = torch.arange(longest, device=batch.attention_mask.device)
    in_prompt = slots >= (longest - _prompt_lengths(batch))[:, None]
    mask = torch.cat([in_prompt, batch.attention_mask != 0], 1).long()
    return Start(states, mask, _slots(batch) if positions == "slots" else None)


def _prompt_of_row(batch: Batch) -> Tensor:
    rows = batch.prompt_of_row
    device = batch.attention_mask.device
    return torch.zeros(batch.shape[0], dtype=torch.int64, device=device) if rows is None else rows.long()


def _prompt_lengths(batch: Batch) -> Tensor:
    """[B] the length of each row's prompt."""
    lengths = torch.tensor(batch.prompt_lengths, device=batch.attention_mask.device)
    return lengths[_prompt_of_row(batch)]


def _slots(batch: Batch) -> Tensor:
    """[B, W] places in the padded layout of each row alone, with its own prompt in front."""
    longest = max(batch.prompt_lengths)
    places = torch.arange(longest + batch.shape[1], device=batch.attention_mask.device)
    return (places - (longest - _prompt_lengths(batch))[:, None]).clamp_min(0)


# ------------------------------------------------------------------------------------------------ the cache
def filled_cache(model: CausalLM, states: LayerStates, num_rows: int) -> DynamicCache:
    """A new growing cache that begins with `states`, each row of them for `num_rows / rows` rows.

    Nothing is copied where one row stands for all: a growing cache never writes into what it was given.
    """
    cache = DynamicCache(config=model_spec.config_of(model))
    for layer, key, value in zip(cache.layers, states.keys, states.values, strict=True):
        key, value = _rows(key, num_rows), _rows(value, num_rows)
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            layer.update(key, value)
            continue
        layer.lazy_initialization(key, value)
        if isinstance(layer, DynamicSlidingWindowLayer):
            layer.cumulative_length = states.num_tokens
            key, value = (part[:, :, -layer.sliding_window + 1 :] for part in (key, value))
        layer.keys, layer.values = key, value
    return cache


def fill(cache: Cache, states: LayerStates, num_rows: int) -> None:
    """Puts `states` into an empty cache of any kind, which copies them."""
    for number, (key, value) in enumerate(zip(states.keys, states.values, strict=True)):
        cache.update(_rows(key, num_rows), _rows(value, num_rows), number)


def _rows(states: Tensor, num_rows: int) -> Tensor:
    if states.shape[0] == 1:
        return states.expand(num_rows, -1, -1, -1)
    return states.repeat_interleave(num_rows // states.shape[0], 0)


def counts_places(model: CausalLM) -> bool:
    """Whether pads between prompt and text change what a model computes, whatever its positions are."""
    config = model_spec.config_of(model)
    windows = (isinstance(layer, DynamicSlidingWindowLayer) for layer in DynamicCache(config=config).layers)
    return config.model_type in _COUNT_PLACES or any(windows)


# ---------------------------------------------------------------------------------------------- self-check
@dataclass(frozen=True)
class Prefill:
    """How the calls of a model start, and why."""

    way: str | None  # "packed", "shared", or None: the prompt cannot be computed beforehand
    reason: str


def prefill_for(model: CausalLM, plan: Plan) -> Prefill:
    """How a model's calls start, found by running two short rows; made once for each plan."""
    with IN_USE:
        known = model_records.last(model, "prefill")
        if known is None or known[0] is not plan:  # a plan that was made again may be equal
            return model_records.put(model, "prefill", plan, _choose(model, plan))
        prefill: Prefill = known[1]
        return prefill


def describe(prefill: Prefill) -> str:
    """Half a sentence for people."""
    if prefill.way is None:
        return f"PEFT's own: {prefill.reason}"
    if prefill.way == "packed":
        return "each prompt is computed once and kept, texts are packed"
    return f"each prompt is computed once and kept, texts stay padded: {prefill.reason}"


def _choose(model: CausalLM, plan: Plan) -> Prefill:
    if plan.route != "packed":
        return Prefill(None, plan.reason)
    ways, reasons = ["packed", "shared"], []
    if not runs_the_op(plan.seam):
        ways.remove("packed")
        reasons.append("its attention does not run on the packed row's own")
    with self_check.evaluating(model), torch.no_grad():
        batch = replace(self_check.probe_batch(model), labels=None)
        verdict = self_check.first_that_holds(
            {way: way for way in ways},
            lambda way: {self_check.LOGITS: _first_step(model, plan, batch, way)},
            {self_check.LOGITS: self_check.reference_forward(model, batch).logits[:, -1]},
            self_check.tolerances(model),
        )
    reason = "; ".join([*reasons, *verdict.rejected])
    if verdict.chosen is None:
        reason = "a prompt that is computed beforehand gives other logits than the model: " + reason
    return Prefill(verdict.chosen, reason)


def _first_step(model: CausalLM, plan: Plan, batch: Batch, way: str) -> Tensor:
    """[B, V] logits behind the last column."""
    prompts = [prompt_states(model, batch.prompts[0])]
    if way == "packed":
        start = start_packed(model, plan, batch, prompts, positions=plan.positions)
    else:
        start = start_shared(plan, batch, prompts, positions=plan.positions)
    num_new = start.mask.shape[1] - start.states.num_tokens
    extra = {}
    if start.position_ids is not None and model_spec.takes_position_ids(model_spec.body_of(model)):
        extra["position_ids"] = start.position_ids[:, -num_new:]
    output = model(
        input_ids=batch.input_ids[:, -num_new:] if batch.input_ids is not None else None,
        attention_mask=start.mask,
        use_cache=True,
        return_dict=True,
        **{cache_argument(model): filled_cache(model, start.states, batch.shape[0])},
        **extra,
    )
    logits: Tensor = output.logits[:, -1]
    return logits
