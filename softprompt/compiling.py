"""What a patched model does where its forward is traced or transformed.

A packed step reads the layout of its batch, so its size is not known while `torch.compile` traces it: it runs
outside of the graph, which breaks there. Where no break is allowed (`torch.export`, `torch.jit.trace`, fake
tensors) PEFT's forward is traced, which is one graph; it also is what `torch.func` transforms.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

from softprompt.eligibility import reason_for_peft
from softprompt.state import model_named, plan_of

ONE_GRAPH = (
    "torch.compile(fullgraph=True) or torch.export wants one graph, and a packed step runs outside "
    "of graphs (where fullgraph=True is left out, it does)"
)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def peft_is_traced(name: str, given: str, mixed: bool) -> bool:
    """Whether a traced call is PEFT's own forward, noted as every call that PEFT serves.

    It runs once for each graph, while that is traced, and takes nothing but constants.

    Args:
        name: of the state of the patched model, see `model_named`.
        given: see `given_names`.
        mixed: whether the call names an adapter for each row.

    Raises:
        UnsupportedModelError: PEFT's forward cannot serve the call, or the patch does not allow it.
    """
    model = model_named(name)
    reason: str | None = ONE_GRAPH
    if not _one_graph():
        arguments = {n.removeprefix("no "): not n.startswith("no ") for n in given.split(",") if n}
        reason = reason_for_peft(model, plan_of(model), [model.active_adapter], arguments)
    if reason is None:
        return False
    model._softprompt.fall_back(reason, ["of each row"] if mixed else None)
    return True


def given_names(arguments: dict[str, Any]) -> str:
    """The arguments of a call that are not None, with commas between them; "no " marks a False."""
    return ",".join(
        f"no {name}" if value is False else name for name, value in arguments.items() if value is not None
    )


def transform_in_use(model: Any, values: Iterable[Any]) -> str | None:
    """Why a call is PEFT's because something transforms it, as a sentence, or None.

    Args:
        model: the patched model.
        values: the tensors of the call, and None.
    """
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "a torch.func transform (grad, vmap, jvp, ...) has no rule for packed steps"
    if torch._C._is_tracing():
        return "torch.jit.trace would record the layout of this one batch"
    if forward_ad._current_level >= 0:
        return "forward-mode AD has no rule for packed steps"
    modes = (torch._C._TorchDispatchModeKey.FAKE, torch._C._TorchDispatchModeKey.PROXY)
    prompts = model.prompt_encoder.parameters() if hasattr(model, "prompt_encoder") else ()
    fake = any(torch._C._get_dispatch_mode(mode) is not None for mode in modes)
    tensors = [value for value in (*values, *prompts) if isinstance(value, torch.Tensor)]
    if fake or any(isinstance(tensor, FakeTensor) or tensor.is_meta for tensor in tensors):
        return "fake and meta tensors have no values, which the layout of a packed step is read from"
    return None


def _one_graph() -> bool:
    """Whether what is being traced now may not break; True where that cannot be told."""
    try:
        from torch._dynamo.symbolic_convert import InstructionTranslator

        tracer: Any = InstructionTranslator.current_tx()
        return bool(tracer.one_graph or tracer.error_on_graph_break)
    except (ImportError, AttributeError):
        return True
