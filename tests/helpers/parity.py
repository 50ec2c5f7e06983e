"""Batches, and the comparison of two models on them."""

import warnings
from dataclasses import dataclass

import torch
from tiny_models import VOCABULARY
from torch import Tensor

LENGTHS = (7, 3, 5)  # in rows of 8 every pad still sees the prompt through a window of 6


def make_batch(
    lengths=LENGTHS, side="right", labels="answer", *, holes=False, width=None, seed=0, vocabulary=VOCABULARY
):
    """A padded batch of random texts.

    Args:
        lengths: tokens of each text.
        side: where the pads are.
        labels: "answer" (the last two tokens), "everywhere" (all tokens), "first" (the first token),
            "pads" (all tokens and all pads), or None.
        holes: mask some tokens inside the texts.
        width: L; the longest text plus one when not given, so that every row has a pad.
        seed: of the texts.
        vocabulary: V.
    """
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths) + 1 if width is None else width
    shape = (len(lengths), width)
    input_ids = torch.randint(3, vocabulary, shape, generator=generator)
    column = torch.arange(width).expand(shape)
    length = torch.tensor(lengths)[:, None]
    rank = column if side == "right" else column - (width - length)
    mask = (rank >= 0) & (rank < length)
    chosen = {
        "answer": mask & (rank >= length - 2),
        "everywhere": mask,
        "first": mask & (rank == 0),
        "pads": torch.ones_like(mask),
        None: None,
    }[labels]
    batch = {"input_ids": input_ids, "attention_mask": (mask & (rank % 3 != 1 if holes else True)).long()}
    if chosen is not None:
        batch["labels"] = torch.where(chosen, input_ids, -100)
    return batch


@dataclass
class Step:
    """What one forward and backward gave."""

    loss: Tensor
    logits: Tensor
    grads: dict[str, Tensor]


def step(model, batch, **kwargs):
    """Loss, logits and the gradients of everything trainable."""
    model.zero_grad(set_to_none=True)
    output = model(**batch, **kwargs)
    output.loss.backward()
    grads = {n: p.grad.detach().clone() for n, p in model.named_parameters() if p.grad is not None}
    return Step(output.loss.detach(), output.logits.detach() + 0, grads)


def relative_error(got, expected):
    """Norm of the difference relative to the norm of what is expected."""
    got, expected = got.double(), expected.double()
    scale = expected.norm()
    return float((got - expected).norm() / (scale if scale > 0 else 1))


def assert_close(got, expected, bound, what):
    """Compares shapes, and norms with a relative bound."""
    assert got.shape == expected.shape, f"{what}: shape {list(got.shape)}, expected {list(expected.shape)}"
    error = relative_error(got, expected)
    assert error <= bound, f"{what} is off by {error:.1e}, allowed are {bound:.1e}"


def real_columns(batch, num_virtual_tokens):
    """[B, P + L] bool: prompt columns and tokens that are not masked."""
    mask = batch["attention_mask"].bool() if batch.get("attention_mask") is not None else None
    source = batch.get("input_ids", batch.get("inputs_embeds"))
    if mask is None:
        mask = torch.ones(source.shape[:2], dtype=torch.bool)
    return torch.cat([torch.ones(mask.shape[0], num_virtual_tokens, dtype=torch.bool), mask], 1)


def assert_same_step(fast, stock, batch, bound=2e-6, **kwargs):
    """The patched model gives PEFT's loss, logits at real tokens, and gradients."""
    expected, got = step(stock, batch, **kwargs), step(fast, batch, **kwargs)
    assert_close(got.loss, expected.loss, bound, "loss")
    assert got.grads.keys() == expected.grads.keys()
    for name, grad in expected.grads.items():
        assert_close(got.grads[name], grad, 10 * bound, f"gradient of {name}")
    assert got.logits.shape == expected.logits.shape
    assert got.logits.dtype == expected.logits.dtype
    real = real_columns(batch, expected.logits.shape[1] - _row_length(batch))
    assert_close(got.logits[real], expected.logits[real], 10 * bound, "logits")


def _row_length(batch):
    source = batch.get("input_ids")
    return (batch["inputs_embeds"] if source is None else source).shape[1]


def prompt_of(model, adapter="default"):
    """The prompt's parameter."""
    return model.prompt_encoder[adapter].embedding.weight


@dataclass
class Outcome:
    """What a call did: its value or its error, and what it said."""

    value: object
    error: tuple[type, str] | None
    warnings: list[str]


def outcome(action, *args, **kwargs):
    """The outcome of a call; warnings of this package and of torch itself do not count."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        value, error = None, None
        try:
            value = action(*args, **kwargs)
        except Exception as raised:
            error = (type(raised), str(raised))
    said = [str(w.message) for w in caught if issubclass(w.category, UserWarning)]
    return Outcome(value, error, [text for text in said if not text.startswith(("softprompt", "Converting"))])
