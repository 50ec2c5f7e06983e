"""`patch`: a PEFT prompt-tuning model, made fast in place.

The instance's class becomes a subclass of its own class whose `forward` takes the packed route and whose
`super().forward` is PEFT's. Nothing else is touched, and `unpatch` sets the class back.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any, TypeVar, cast

from peft import PeftModel, PeftModelForSeq2SeqLM
from torch import nn

from softprompt.eligibility import foreign_method
from softprompt.engine.batch import (
    ON_UNSUPPORTED,
    POSITIONS,
    check_option,
    check_switch,
)
from softprompt.engine.logits_layout import LOGITS
from softprompt.engine.model_spec import is_own_method
from softprompt.engine.placement import PLACEMENTS, bos_token_id
from softprompt.engine.runner import UnsupportedModelError, obstacle_to
from softprompt.nesting import base_of
from softprompt.ops.registry import AUTO, BACKENDS
from softprompt.patched_model import FRONTS, patched_class
from softprompt.prompt_encoders import is_pefts
from softprompt.state import STATE, PatchOptions, PatchState, give_state, plan_of, take_state
from softprompt.warn import warn

Model = TypeVar("Model", bound=nn.Module)


def patch(
    model: Model,
    *,
    positions: str = "padded",
    on_unsupported: str = "fallback",
    backend: str = AUTO,
    cuda_graphs: bool = True,
    compile: bool = False,
    fused: bool = True,
    placement: str = "prefix",
    logits: str = "full",
) -> Model:
    """Makes a PEFT prompt-tuning model compute its loss on the packed route, in place.

    P-tuning (`PromptEncoderConfig`) and multitask prompt tuning (`MultitaskPromptTuningConfig`) are served
    alike: the route needs the output of their encoders, and gives them its gradient.

    The same loop, Trainer, `generate` and adapter files work as before. Calls that the packed route does not
    serve (a request for attentions, hidden states or a cache) go to PEFT's own forward with one warning.
    Patching twice changes the options. A tiny self-check compares the route with the stock forward first.

    Args:
        model: a `PeftModelForCausalLM` or a `PeftModelForSeq2SeqLM` with adapters of one of these types.
        positions: "padded": every token has the position that PEFT's padded batch gives it, on any padding
            side; "compact": pads do not exist, so that training on padded batches equals each row alone.
        on_unsupported: what to do where only the stock forward is right: "fallback" (use it, warn once with
            the reason) or "error" (raise UnsupportedModelError).
        backend: "auto", or the back end that all ops use: "reference", "triton" or "native" (there is no
            native attention on a GPU, which then stays at "auto").
        cuda_graphs: on a GPU, record a training step as one CUDA graph when its size comes the second time,
            and replay it afterwards. Steps that cannot be recorded run as without, with one warning.
        compile: run the decoder of training steps through `torch.compile`; pays on a GPU, after minutes.
        fused: compute RMSNorm, gated MLPs and rotary embeddings in one op each where the model writes them
            out as many and a probe gives the same numbers (`explain` lists them); False: the modules' own
            code. Off under `compile`, since a compiler does the same.
        placement: "prefix": the prompt stands in front of the text; "after_bos": behind the text's first
            token, which has to be the model's BOS token in every row.
        logits: "full": `out.logits` is [B, P + L, V], as PEFT gives it; "text": [B, L, V], column c is the
            output at the text's column c and predicts label c + 1, as without a prompt; "labels": [B, L, V],
            column c predicts label c. An encoder-decoder's logits have no columns of the prompt: column c
            always predicts label c.

    Returns:
        The same model.

    Raises:
        TypeError: not a PEFT model.
        ValueError: an unknown option value, or a switch that is no bool; "after_bos" on a model without a
            BOS token.
        UnsupportedModelError: see `on_unsupported`; also for "compact" on a model that cannot be packed, and
            for "after_bos" on one that has no fast route.
    """
    check_option("positions", positions, POSITIONS)
    check_option("on_unsupported", on_unsupported, ON_UNSUPPORTED)
    check_option("placement", placement, PLACEMENTS)
    check_option("logits", logits, LOGITS)
    check_option("backend", backend, (AUTO, *BACKENDS))
    check_switch("cuda_graphs", cuda_graphs)
    check_switch("compile", compile)
    check_switch("fused", fused)
    if not isinstance(model, PeftModel):
        raise TypeError(
            "softprompt.patch takes a PEFT model (get_peft_model(...) or PeftModel.from_pretrained(...)), "
            f"got {type(model).__name__}; softprompt.forward takes a plain model and prompts"
        )
    options = PatchOptions(
        positions=positions,
        backend=backend,
        logits=logits,
        on_unsupported=on_unsupported,
        cuda_graphs=cuda_graphs,
        compile=compile,
        fused=fused,
        placement=placement,
    )
    known: PatchState | None = model.__dict__.get(STATE)
    state = PatchState(options, known.stock_class if known else type(model))
    state.refusal = _refusal(model)
    obstacle = state.refusal or _obstacle(model, options)
    if obstacle is None and placement == "after_bos":
        bos_token_id(base_of(model))
    if obstacle is not None:
        if on_unsupported == "error" or options.without_stock is not None:
            raise UnsupportedModelError(f"softprompt: {obstacle}")
        warn(f"PEFT's own forward stays in use: {obstacle}")
        state.said.add(obstacle)
    give_state(model, state)
    if state.refusal is None:
        _drop_bound_methods(model)
        if known is None or type(model) is known.stock_class:  # else fully_shard may stand in front of ours
            model.__class__ = patched_class(state.stock_class)
    return model


def unpatch(model: Model) -> Model:
    """Takes `patch` back: the model is again what it was. A model that is not patched is returned as it
    is.
    """
    if not isinstance(cast(object, model), nn.Module):
        raise TypeError(f"softprompt.unpatch takes a model, got {type(model).__name__}")
    state: PatchState | None = model.__dict__.get(STATE)
    if state is not None:
        if _adapters_off(model):
            raise RuntimeError(
                "unpatch the model outside of disable_adapter(), which puts its forward back at the end"
            )
        if type(model) not in (patched_class(state.stock_class), state.stock_class):
            raise RuntimeError(
                f"the class of the model became {type(model).__name__} after softprompt.patch (fully_shard "
                "does that); unpatch before"
            )
        _drop_bound_methods(model)
        model.__class__ = state.stock_class
        take_state(model)
    return model


@contextlib.contextmanager
def patched(model: Model, **options: Any) -> Iterator[Model]:
    """`patch(model, **options)` for the duration of a block; afterwards the model is as it was before."""
    before: PatchState | None = getattr(model, "__dict__", {}).get(STATE)
    patch(model, **options)
    try:
        yield model
    finally:
        if before is None:
            unpatch(model)
        else:
            give_state(model, before)
            if before.refusal is None:
                model.__class__ = patched_class(before.stock_class)


def _obstacle(model: PeftModel, options: PatchOptions) -> str | None:
    """Why no call of this model takes the fast route, or None."""
    if isinstance(model, PeftModelForSeq2SeqLM) and options.placement != "prefix":
        return f'placement="{options.placement}" is for decoder-only models, whose texts begin with BOS'
    return obstacle_to(plan_of(model), compact=options.compact)


def _refusal(model: PeftModel) -> str | None:
    """Why the class of this model is left alone, or None."""
    if not isinstance(model, tuple(FRONTS)):
        return (
            f"{type(model).__name__} is not a causal language model (task type CAUSAL_LM), "
            "and no encoder-decoder (SEQ_2_SEQ_LM)"
        )
    obstacle = foreign_method(model, "forward")
    if obstacle is not None:
        return obstacle
    replaced = model.__dict__.get("forward")
    if replaced is not None and not _leads_to_own(model, replaced):
        return (
            "the model's forward was replaced on the instance (accelerate's prepare does that); "
            "call softprompt.patch before"
        )
    return None


def _leads_to_own(model: PeftModel, forward: Any) -> bool:
    """Whether a forward on the instance ends in the one of its class, or of the patch."""
    if is_own_method(model, "forward", forward):
        return True
    innermost = inspect.unwrap(forward)
    innermost = getattr(innermost, "__func__", innermost)
    if innermost in {front.forward for front in FRONTS.values()}:
        return True
    # Around a wrapper that does not say what it wraps: set after the patch, it wraps the patch's forward.
    state: PatchState | None = model.__dict__.get(STATE)
    since = state is not None and state.refusal is None and not _adapters_off(model)
    return since and not is_pefts(innermost)


def _adapters_off(model: PeftModel) -> bool:
    """Whether a model is inside of `disable_adapter`, where its forward is the base model's."""
    return bool(getattr(model, "_adapters_disabled", False))


def _drop_bound_methods(model: nn.Module) -> None:
    """Removes copies of the class's own methods from the instance (PEFT's `disable_adapter` leaves them
    there).
    """
    for name in ("forward", "prepare_inputs_for_generation"):
        if is_own_method(model, name, model.__dict__.get(name)):
            del model.__dict__[name]
