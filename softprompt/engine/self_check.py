"""The numeric self-check: candidates run on two short rows, beside the model's own padded forward.

What is faster is taken where its loss, its prompt gradient or its logits are those of the reference forward,
and for no other reason. The same loop serves decoders, encoder-decoders and the prefill of `generate`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor, nn

from softprompt.engine import model_spec, precision, sharding
from softprompt.engine.batch import Batch, prompts_of_rows
from softprompt.engine.encoder_decoder import DecoderInputs, shifted
from softprompt.engine.leftovers import without_leftovers
from softprompt.engine.model_spec import CausalLM
from softprompt.ops.constants import IGNORE_INDEX

LOSS, GRADIENT, LOGITS = "loss", "prompt gradient", "logits"  # what is compared
# Largest allowed error relative to the reference forward: (loss, prompt gradient and logits). Softmax, rotary
# tables and ALiBi are fp32 inside fp64 models; in 16 bit the reference itself is this far from the truth.
_TOLERANCES = {torch.float64: (1e-5, 1e-4), torch.float32: (1e-4, 2e-3)}
_TOLERANCE_16_BIT = (5e-2, 2e-1)
_PERTURBATION = 64.0  # of pads, times the largest number of the other tokens
_EXACT = 1e-5  # largest relative difference by pads of models that compute in fp32 or fp64

Candidate = TypeVar("Candidate")


class ReferenceFailedError(RuntimeError):
    """The model's own forward itself cannot serve as a reference."""


# ------------------------------------------------------------------------------------------------- the loop
@dataclass(frozen=True)
class Verdict(Generic[Candidate]):
    """What a self-check found."""

    chosen: Candidate | None = None  # None: no candidate holds
    errors: Mapping[str, float] = field(default_factory=dict)  # of the chosen one, relative to the reference
    rejected: tuple[str, ...] = ()  # candidates that came before, and what was wrong with each


def first_that_holds(
    candidates: Mapping[str, Candidate],
    run: Callable[[Candidate], Mapping[str, Tensor]],
    expected: Mapping[str, Tensor],
    bounds: Mapping[str, float],
) -> Verdict[Candidate]:
    """Runs candidates in order up to the first whose results are what is expected.

    Args:
        candidates: by the name that a rejection is told with.
        run: the results of a candidate, by name; what it raises rejects the candidate.
        expected: the reference's results, by name.
        bounds: largest allowed error of each result, relative to what is expected.
    """
    rejected: list[str] = []
    for name, candidate in candidates.items():
        try:
            got = run(candidate)
        except Exception as error:  # the reason is kept, and a slower candidate or the reference takes over
            first_line = str(error).splitlines()[0] if str(error) else ""
            rejected.append(f"{name}: {type(error).__name__}: {first_line}")
            continue
        errors = {part: relative_error(got[part], value) for part, value in expected.items()}
        if all(error <= bounds[part] for part, error in errors.items()):
            return Verdict(candidate, errors, tuple(rejected))
        first, *others = errors
        rest = "".join(f", {part} by {errors[part]:.1e}" for part in others)
        rejected.append(f"{name}: {first} off by {errors[first]:.1e}{rest}")
    return Verdict(rejected=tuple(rejected))


def relative_error(got: Tensor, expected: Tensor) -> float:
    """`|got - expected| / |expected|` in fp64."""
    got, expected = got.double(), expected.double()
    return float((got - expected).norm() / expected.norm().clamp_min(1e-12))


def tolerances(model: CausalLM) -> dict[str, float]:
    """Largest allowed errors relative to the reference forward, by what is compared."""
    loss, others = _TOLERANCES.get(precision.coarsest_dtype(model), _TOLERANCE_16_BIT)
    return {LOSS: loss, GRADIENT: others, LOGITS: others}


@contextlib.contextmanager
def evaluating(model: CausalLM) -> Iterator[None]:
    """Evaluation mode with gradients, without autocast and what `generate` left; all is put back."""
    flags = [(module, module.training) for module in model.modules()]
    device_type = sharding.device_of(model.get_input_embeddings()).type
    try:
        model.eval()
        with (
            without_leftovers(model),
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast(device_type, enabled=False),
        ):
            yield
    finally:
        for module, flag in flags:
            module.training = flag


# -------------------------------------------------------------------------------------------- the reference
def reference_forward(model: CausalLM, batch: Batch, **kwargs: Any) -> Any:
    """The padded forward as PEFT runs it: every row with its own copy of the prompt, all positions through
    the head.

    Args:
        model: the language model.
        batch: prompts of one length, texts and labels.
        kwargs: further arguments of the model's forward, or others than the batch's: the labels of an
            encoder-decoder stand in no column of the texts.
    """
    embeds = batch.inputs_embeds
    if embeds is None:
        embeds = model.get_input_embeddings()(batch.input_ids)
    prompts = prompts_of_rows(batch.prompts, batch, embeds)
    num_rows, length = prompts.shape[:2]
    ones = torch.ones(num_rows, length, device=embeds.device)
    labels = batch.labels
    if labels is not None:
        labels = torch.cat([labels.new_full((num_rows, length), IGNORE_INDEX), labels], 1)
    return model(
        inputs_embeds=torch.cat([prompts, embeds], 1),
        attention_mask=torch.cat([ones, batch.attention_mask.to(embeds.device)], 1),
        **{"labels": labels, "use_cache": False, "return_dict": True, **kwargs},
    )


def reference_step(model: CausalLM, batch: Batch, **kwargs: Any) -> tuple[Any, dict[str, Tensor]]:
    """Output of `reference_forward`, its loss and the gradient of its one prompt.

    Raises:
        ReferenceFailedError: the forward fails, or its numbers are not finite.
    """
    try:
        output = reference_forward(model, batch, **kwargs)
        if not output.loss.requires_grad:
            raise RuntimeError("the loss has no gradient, as layers with rounded activations give none")
        results = loss_and_gradient(output.loss, batch)
    except Exception as error:
        raise ReferenceFailedError(
            f"the model's own forward fails on soft prompts: {type(error).__name__}: {error}"
        ) from error
    if not all(result.isfinite().all() for result in results.values()):
        raise ReferenceFailedError("the model's own loss or prompt gradient is not finite")
    return output, results


def loss_and_gradient(loss: Tensor, batch: Batch) -> dict[str, Tensor]:
    """A loss and the gradient of the batch's one prompt, as they are compared."""
    (grad,) = torch.autograd.grad(loss, batch.prompts[0])
    return {LOSS: loss.detach(), GRADIENT: grad}


# ---------------------------------------------------------------------------------------------- the probes
def probe_batch(model: CausalLM) -> Batch:
    """Two left-padded rows with a label on each first token, the hardest case, behind a prompt of real
    embeddings.
    """
    embedding = model.get_input_embeddings()
    vocabulary = model_spec.vocab_size(model)
    device = sharding.device_of(embedding if hasattr(embedding, "weight") else model)
    numbers = torch.arange(3, 19, device=device)
    ids = (numbers * numbers * 31 + numbers * 7) % vocabulary
    input_ids = ids[:12].view(2, 6)
    attention_mask = torch.tensor([[0, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1]], device=device)
    labels = torch.where(attention_mask.bool(), input_ids, IGNORE_INDEX)
    labels[0, 2] = IGNORE_INDEX
    with torch.no_grad():
        prompt = embedding(ids[None, 12:])[0].detach().clone()
    prompt = prompt.to(torch.promote_types(prompt.dtype, torch.float32)).requires_grad_()
    return Batch((prompt,), None, input_ids, None, attention_mask, labels)


def encoder_decoder_probe(model: CausalLM) -> tuple[Batch, DecoderInputs]:
    """Two rows with a hole, pads of their own and one that they share; some labels do not count, nor does a
    last column of them.
    """
    batch = probe_batch(model)
    mask = torch.tensor([[1, 1, 0, 1, 1, 0], [1, 1, 1, 0, 0, 0]], device=batch.attention_mask.device)
    labels = cast(Tensor, batch.input_ids).flip(1)[:, :4].clone()
    labels[0, 1] = labels[1, 2:] = IGNORE_INDEX
    labels = nn.functional.pad(labels, (0, 1), value=IGNORE_INDEX)
    return replace(batch, attention_mask=mask, labels=None), DecoderInputs(labels)


# ------------------------------------------------------------------------------------------------- the pads
@torch.no_grad()
def padding_obstacle(model: CausalLM, batch: Batch, inputs: DecoderInputs | None = None) -> str | None:
    """Why a probe's pads may not be dropped, as a sentence, or None; costs two reference forwards.

    Layers that round all tokens of a batch with one scale let what stands in pads change the other tokens.
    Those that are known are known by name (`precision.whole_batch_obstacle`); others show it where a pad
    holds the largest number.

    Args:
        model: the language model.
        batch: of the probe.
        inputs: what an encoder-decoder's decoder reads in the probe.
    """
    try:
        embeds, real, logits_of = _texts(model, batch) if inputs is None else _both(model, batch, inputs)
        perturbed = embeds.clone()
        # A single number of a vector stands out behind a normalisation as well.
        perturbed[..., 0] = torch.where(real, embeds[..., 0], _PERTURBATION * embeds.abs().amax())
        expected = logits_of(embeds)
        error = relative_error(logits_of(perturbed), expected)
        if error <= max(_EXACT, 4 * torch.finfo(precision.coarsest_dtype(model)).eps):
            return None
    except Exception as failure:
        return f"whether pads change the other tokens cannot be tried: {type(failure).__name__}: {failure}"
    return (
        f"numbers that stand out in pads change the other tokens (logits by {error:.1e}, tried on two rows)"
    )


# [B, C, H] what a model reads, [B, C] what of it are no pads, and the logits that count from such inputs
_Reading = tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]


def _texts(model: CausalLM, batch: Batch) -> _Reading:
    embeds = model.get_input_embeddings()(batch.input_ids)
    real = batch.attention_mask.bool().to(embeds.device)

    def logits_of(embeds: Tensor) -> Tensor:
        texts = replace(batch, input_ids=None, inputs_embeds=embeds, labels=None)
        logits: Tensor = reference_forward(model, texts).logits[:, batch.prompt_lengths[0] :]
        return logits[real.to(logits.device)]

    return embeds, real, logits_of


def _both(model: CausalLM, batch: Batch, inputs: DecoderInputs) -> _Reading:
    """The texts of the encoder, and behind them the decoder's inputs as labels make them."""
    texts = model.get_input_embeddings()(batch.input_ids)
    labels = cast(Tensor, inputs.labels)
    # Its own, which may differ from the encoder's.
    embedding = model.get_decoder().get_input_embeddings() or model.get_input_embeddings()
    embeds = torch.cat([texts, embedding(shifted(model, labels)).to(texts)], 1)
    scored = (labels != IGNORE_INDEX).any(0)
    real = torch.cat([batch.attention_mask.any(0), scored]).expand(embeds.shape[:2])

    def logits_of(embeds: Tensor) -> Tensor:
        first, second = embeds.split([texts.shape[1], labels.shape[1]], 1)
        encoded = replace(batch, input_ids=None, inputs_embeds=first)
        logits: Tensor = reference_forward(model, encoded, decoder_inputs_embeds=second).logits[:, scored]
        return logits

    return embeds, real, logits_of
