"""Random batches for a patched model, and what PEFT makes of them, adapter by adapter or row by row."""

import functools
import re
import warnings
from collections import Counter
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import strategies as st
from parity import relative_error
from peft import PromptEncoderConfig, get_peft_model
from tiny_models import PADDED, VOCABULARY, build, pair, prompt_config
from torch import Tensor

import softprompt

# alibi in hooked modules, rotary, position table, window, softcap and window, convolutions on padded rows
MODELS = ("bloom", "llama", "gpt2", "mistral-window", "gemma2", "lfm2")
# PEFT keeps prompt tuning and P-tuning in models of their own.
LENGTHS = {"prompts": {"default": 4, "one": 1, "six": 6}, "encoded": {"default": 3, "five": 5}}
LOSS_BOUND = 2e-5  # PEFT's loss goes through fp32 logits: a text predicted well has few right digits
LOGITS_BOUND = 2e-5
IGNORED = -100


def lengths_of(name, kind):
    """Virtual tokens of each adapter; a padded batch holds prompts of one length."""
    return dict.fromkeys(LENGTHS[kind], 4) if name in PADDED else LENGTHS[kind]


@functools.cache
def stock_and_fast(name, kind):
    """Two models with the same adapters, of prompt tuning or of P-tuning."""
    base, model = build(name), None
    torch.manual_seed(5)
    for adapter, length in lengths_of(name, kind).items():
        config = prompt_config(base, length)
        if kind == "encoded":
            sizes = {"token_dim": config.token_dim, "num_layers": 1, "num_attention_heads": 1}
            config = PromptEncoderConfig(
                task_type="CAUSAL_LM", num_virtual_tokens=length, encoder_hidden_size=16, **sizes
            )
        if model is None:
            model = get_peft_model(base, config)
        else:
            model.add_adapter(adapter, config)
    model.prompt_encoder.to(torch.float64)
    return pair(model.eval())


@dataclass
class Case:
    """A batch, and how it is given to the patched model."""

    batch: dict[str, Tensor]
    kind: str  # of the adapters: "prompts" or "encoded"
    names: list[str]
    one_adapter: bool  # the active one, without adapter_names
    num_items: object
    positions: str
    logits: str
    again: bool
    wrong: tuple[str, int, int, int] | None  # tensor, row, column, value
    traits: list[str] = field(default_factory=list)

    @property
    def mask(self):
        given = self.batch.get("attention_mask")
        ids = self.batch["input_ids"]
        return torch.ones(ids.shape, dtype=torch.bool) if given is None else given.bool()


@st.composite
def cases(draw, compact=True):
    """Texts of any length on any side, holes, labels on any columns (pads too), an adapter for each row."""
    num_rows, width = draw(st.integers(1, 5)), draw(st.integers(0, 9))
    side = draw(st.sampled_from(["left", "right", "holes", "none"]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    input_ids = torch.randint(0, VOCABULARY, (num_rows, width), generator=generator)
    if side == "holes":
        mask = torch.rand(num_rows, width, generator=generator) < draw(st.sampled_from([0.3, 0.8]))
    elif side == "none":
        mask = torch.ones(num_rows, width, dtype=torch.bool)
    else:
        lengths = torch.tensor(draw(st.lists(st.integers(0, width), min_size=num_rows, max_size=num_rows)))
        column = torch.arange(width)
        column = column if side == "right" else width - 1 - column
        mask = column < lengths[:, None]
    share = draw(st.sampled_from([0.0, 0.2, 1.0]))
    labelled = torch.rand(num_rows, width, generator=generator) < share
    where = draw(st.sampled_from(["anywhere", "text", "first"]))
    if where != "anywhere":
        labelled &= mask if where == "text" else mask & (mask.cumsum(1) == 1)
    integers = st.sampled_from([torch.int64, torch.int64, torch.int32])
    batch = {
        "input_ids": input_ids.to(draw(integers)),
        "labels": torch.where(labelled, input_ids, IGNORED).to(draw(integers)),
    }
    if side != "none":
        kinds = [torch.int64, torch.bool, torch.float32, torch.int32, torch.uint8]
        batch["attention_mask"] = mask.to(draw(st.sampled_from(kinds)))
    if draw(st.integers(0, 9)) == 0:
        del batch["labels"]
    one_adapter = draw(st.booleans())
    kind = draw(st.sampled_from(["prompts", "prompts", "encoded"]))
    one = st.sampled_from(list(LENGTHS[kind]))
    names = (
        [draw(one)] * num_rows if one_adapter else draw(st.lists(one, min_size=num_rows, max_size=num_rows))
    )
    case = Case(
        batch,
        kind,
        names,
        one_adapter,
        draw(st.sampled_from([None, 1, 7, torch.tensor(5)])),
        draw(st.sampled_from(["padded", "compact"])) if compact else "padded",
        draw(st.sampled_from(["full", "text", "labels"])),
        draw(st.integers(0, 4)) == 0,
        _wrong(draw, batch) if width and draw(st.integers(0, 14)) == 0 else None,
    )
    case.traits = _traits(case, side, draw(st.integers(0, 4)) == 0)
    return case


def _wrong(draw, batch):
    num_rows, width = batch["input_ids"].shape
    tensor = draw(st.sampled_from([name for name in ("input_ids", "labels") if name in batch]))
    value = draw(st.sampled_from([VOCABULARY, VOCABULARY + 1000, -1, -101]))
    return tensor, draw(st.integers(0, num_rows - 1)), draw(st.integers(0, width - 1)), value


def _traits(case, side, embeds):
    """What the case is made of, to be counted."""
    mask, labels = case.mask, case.batch.get("labels")
    found = {
        f"{case.positions} positions": True,
        f"pads: {side}": True,
        f"logits: {case.logits}": case.logits != "full",
        "several adapters": len(set(case.names)) > 1,
        "P-tuning": case.kind == "encoded",
        "the active adapter": case.one_adapter,
        "inputs_embeds": embeds and case.wrong is None,
        "an empty text": bool((mask.sum(1) == 0).any()),
        "no text at all": int(mask.sum()) == 0,
        "one token in all": int(mask.sum()) == 1,
        "no labels": labels is None,
        "all labels -100": labels is not None and bool((labels == IGNORED).all()),
        "labels on pads": labels is not None and bool(((labels != IGNORED) & ~mask).any()),
        "num_items_in_batch": case.num_items is not None,
        "the same batch again": case.again,
        "an id or a label out of range": case.wrong is not None,
    }
    return [trait for trait, there in found.items() if there]


# ------------------------------------------------------------------------------------------------ the oracle
def parts_of(case):
    """The calls of PEFT that make up a case: adapter, rows, and its arguments."""
    labelled = {name: value.long() for name, value in case.batch.items() if name in ("input_ids", "labels")}
    if case.positions == "compact":
        for row, adapter in enumerate(case.names):
            kept = case.mask[row]
            yield adapter, [row], {name: value[row][kept][None] for name, value in labelled.items()}
        return
    whole = labelled | {n: v.clone() for n, v in case.batch.items() if n == "attention_mask"}
    for adapter in LENGTHS[case.kind]:
        rows = [row for row, name in enumerate(case.names) if name == adapter]
        if rows:
            yield adapter, rows, {name: value[rows] for name, value in whole.items()}


def peft_result(stock, case):
    """Summed loss, number of labels, gradients by adapter, and the logits of each row."""
    stock.zero_grad(set_to_none=True)
    loss, count, logits = torch.zeros((), dtype=torch.float64), 0, {}
    for adapter, rows, given in parts_of(case):
        stock.set_adapter(adapter)
        if "labels" in given:
            output = stock(**given, num_items_in_batch=1)
            output.loss.backward()
            loss, count = loss + output.loss.detach(), count + int((given["labels"] != IGNORED).sum())
        else:
            with torch.no_grad():
                output = stock(**given, use_cache=False)
        logits |= dict(zip(rows, output.logits.detach(), strict=True))
    return loss, count, {adapter: gradients(stock, adapter) for adapter in LENGTHS[case.kind]}, logits


def gradients(model, adapter):
    """All gradients of an adapter's encoder in one row; the empty row where there are none."""
    parameters = model.prompt_encoder[adapter].parameters()
    found = [parameter.grad.flatten() for parameter in parameters if parameter.grad is not None]
    return torch.cat(found) if found else torch.zeros(0, dtype=torch.float64)


# --------------------------------------------------------------------------------------------- the comparison
@dataclass
class Errors:
    """The largest errors so far, and how often each trait came."""

    loss: float = 0.0
    gradient: float = 0.0
    logits: float = 0.0
    batches: int = 0
    traits: Counter = field(default_factory=Counter)

    def add(self, what, got, expected, bound, floor=0.0):
        error = float((got - expected).norm())
        assert error <= bound * float(expected.norm()) + floor, f"{what} is off by {error:.1e}"
        if float(expected.norm()) > floor:
            setattr(self, what, max(getattr(self, what), relative_error(got, expected)))


def check(name, case, errors=None):
    """The patched model gives PEFT's loss, gradients and logits, or names the value that is out of range."""
    errors = Errors() if errors is None else errors
    errors.batches += 1
    errors.traits.update(case.traits)
    stock, fast = stock_and_fast(name, case.kind)
    softprompt.patch(fast, on_unsupported="error", positions=case.positions, logits=case.logits)
    fast.zero_grad(set_to_none=True)
    if case.wrong is not None:
        return _check_refusal(fast, case)
    loss, count, grads, logits = peft_result(stock, case)
    output = run(fast, case)
    if not all(row.isfinite().all() for row in (loss, *logits.values())):
        # transformers' eager attention of a pad that sees nothing is NaN, which spreads to all columns.
        errors.traits["PEFT gives NaN, and the patched model does not"] += 1
        assert output.logits.isfinite().all()
        assert output.loss is None or output.loss.isfinite()
        return None
    if "labels" in case.batch:
        items = max(count, 1) if case.num_items is None else float(case.num_items)
        output.loss.backward()
        errors.add("loss", output.loss.detach(), loss / items, LOSS_BOUND, 1e-5 / items)
        for adapter in LENGTHS[case.kind]:
            got = gradients(fast, adapter)
            if adapter not in case.names:
                assert got.numel() == 0, f"adapter {adapter}, which no row has, got a gradient"
            else:
                errors.add("gradient", got, grads[adapter] / items, LOSS_BOUND, 1e-5 / items)
    else:
        assert output.loss is None
    _check_logits(case, lengths_of(name, case.kind), output.logits.detach() + 0, logits, errors)
    if case.again:
        again = run(fast, case)
        assert torch.equal(again.logits.detach() + 0, output.logits.detach() + 0)
        assert output.loss is None or torch.equal(again.loss, output.loss)
    return None


def run(fast, case):
    given = dict(case.batch)
    if "inputs_embeds" in case.traits:
        given["inputs_embeds"] = fast.get_base_model().get_input_embeddings()(given.pop("input_ids"))
    if case.one_adapter:
        fast.set_adapter(case.names[0])
    else:
        given["adapter_names"] = case.names
    extra = {} if case.num_items is None else {"num_items_in_batch": case.num_items}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="softprompt: every label")
        return fast(**given, **extra, use_cache=False)


def _check_refusal(fast, case):
    name, row, column, value = case.wrong
    changed = case.batch[name].clone()
    changed[row, column] = value
    case.batch = case.batch | {name: changed}
    message = (
        f"{name}[{row}, {column}] = {value} is outside the vocabulary 0 .. {VOCABULARY - 1} (1 such value)"
    )
    with pytest.raises(IndexError, match=f"^{re.escape(message)}$"):
        run(fast, case)


def _check_logits(case, lengths, got, expected, errors):
    longest = max(lengths[adapter] for adapter in case.names)
    width = case.batch["input_ids"].shape[1]
    labels = case.batch.get("labels")
    assert got.shape == (len(case.names), width + (longest if case.logits == "full" else 0), VOCABULARY)
    for row, adapter in enumerate(case.names):
        length, real = lengths[adapter], case.mask[row]
        # The row of PEFT's logits that belongs to each column of the text.
        place = torch.arange(width) if case.positions == "padded" else real.long().cumsum(0) - 1
        columns = real
        if case.logits == "labels":
            # What no label asks for is not computed behind pads.
            columns, place = (real if labels is None else real & (labels[row] != IGNORED)), place - 1
        texts = expected[row][length + place[columns]]
        rows = got[row]
        if case.logits == "full":
            prompt = slice(longest - length, longest)
            errors.add("logits", rows[prompt], expected[row][:length], LOGITS_BOUND)
            rows = rows[longest:]
        errors.add("logits", rows[columns], texts, LOGITS_BOUND, 1e-12)
