"""Who runs a case: each variant makes a model on a shared base that is trained by the same loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from peft import PromptTuningConfig, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel

import softprompt
from benchmarks import peers
from benchmarks.cases import STEP, Case
from softprompt.state import state_of


def _loss_of_model(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    loss: Tensor = model(**inputs).loss
    return loss


@dataclass(frozen=True)
class Variant:
    """One way to run a step."""

    name: str
    about: str
    build: Callable[[PreTrainedModel, PromptTuningConfig], Any]  # takes the base model, which variants share
    own: bool = False  # softprompt, not a peer
    in_turn: bool = False  # of several prompts, one after the other, as PEFT has to
    loss: Callable[[Any, dict[str, Tensor]], Tensor] = _loss_of_model
    obstacle: Callable[[], str | None] = lambda: None  # why it cannot run here, asked before it is built
    doubt: Callable[[Any], str | None] = lambda model: None  # why a step was not what the name says
    wrap: Callable[[Any], Any] = lambda model: model  # what is called in place of the model
    keeps_memory: bool = False  # its recorded step holds the memory of a step between the steps
    compiles: bool = False  # takes long to build; the first to go where time is short
    optional: bool = False  # not run where time is short
    warm_up: int = 1  # steps before it runs as it will go on
    kinds: tuple[str, ...] = (STEP,)  # of the cases that it serves

    def seconds(self, case: Case) -> float:
        """What running it takes on a GPU beside the others, estimated: compilers need time for each layer."""
        config = case.shape.config
        layers = config.get("n_layer") or config.get("num_hidden_layers")
        if not self.optional or not case.seconds:
            return 0.0
        return case.seconds / 8 + (10 + 1.5 * layers if self.compiles else 0)


def _patch(**options: bool) -> Callable[[PreTrainedModel, PromptTuningConfig], Any]:
    def build(base: PreTrainedModel, config: PromptTuningConfig) -> Any:
        return softprompt.patch(get_peft_model(base, config), on_unsupported="error", **options)

    return build


def _graphs_of(model: Any) -> Any:
    runner = state_of(model).runner
    return None if runner is None else runner.graphs


def _doubt_of_graph(model: Any) -> str | None:
    graphs = _graphs_of(model)
    if graphs is None or not graphs.statistics.replayed:
        return f"the step was not recorded: {graphs.obstacle if graphs is not None else 'no step was run'}"
    return None


def _doubt_of_compiled_graph(model: Any) -> str | None:
    graphs = _graphs_of(model)
    if graphs is not None and graphs.compile_obstacle:
        return f"the decoder was not compiled: {graphs.compile_obstacle}"
    return _doubt_of_graph(model)


REFERENCE = Variant("peft", "PEFT as users run it", get_peft_model, kinds=("step", "ensemble", "generate"))
VARIANTS = (
    REFERENCE,
    Variant(
        "softprompt",
        "the same after softprompt.patch(model)",
        _patch(),
        own=True,
        kinds=("step", "ensemble"),
    ),
    Variant(
        "softprompt in turn",
        "a patched step for each prompt",
        _patch(),
        own=True,
        in_turn=True,
        kinds=("ensemble",),
    ),
)

OURS = (
    Variant(
        "softprompt eager",
        "softprompt.patch(model, cuda_graphs=False)",
        _patch(cuda_graphs=False),
        own=True,
        kinds=("step", "ensemble", "generate"),
    ),
    Variant(
        "softprompt graph",
        "softprompt.patch(model): the step is one CUDA graph",
        _patch(cuda_graphs=True),
        own=True,
        doubt=_doubt_of_graph,
        keeps_memory=True,
        warm_up=4,
        kinds=("step", "ensemble"),
    ),
    Variant(
        "softprompt compile+graph",
        "softprompt.patch(model, compile=True)",
        _patch(cuda_graphs=True, compile=True),
        own=True,
        doubt=_doubt_of_compiled_graph,
        keeps_memory=True,
        compiles=True,
        optional=True,
        warm_up=4,
    ),
)
PEERS = (
    Variant(
        "peft+chunked",
        "PEFT with a head like TRL's chunked loss: label rows only, recomputed in chunks",
        get_peft_model,
        loss=peers.headed(peers.chunked_loss),
        optional=True,
    ),
    Variant(
        "peft+cce",
        "PEFT with Apple's cut cross-entropy as its head, its gradient filter off",
        get_peft_model,
        loss=peers.headed(peers.cce_loss),
        obstacle=peers.missing("cut_cross_entropy", "cut-cross-entropy"),
        optional=True,
    ),
    Variant(
        "peft+liger",
        "PEFT with Liger's fused linear cross-entropy as its head",
        get_peft_model,
        loss=peers.headed(peers.liger_loss),
        obstacle=peers.missing("liger_kernel", "liger-kernel"),
        optional=True,
    ),
    Variant(
        "peft+compile",
        "torch.compile of PEFT's model",
        get_peft_model,
        wrap=peers.compiled(),
        compiles=True,
        optional=True,
        warm_up=3,
    ),
    Variant(
        "peft+reduce-overhead",
        'torch.compile of PEFT\'s model with mode="reduce-overhead" (CUDA graphs)',
        get_peft_model,
        wrap=peers.compiled("reduce-overhead"),
        keeps_memory=True,
        compiles=True,
        optional=True,
        warm_up=5,
    ),
)
# In the order in which they are run; the first ones get what time there is.
CPU_VARIANTS = (*VARIANTS, PEERS[0], PEERS[3])
GPU_VARIANTS = (REFERENCE, *OURS, *PEERS[:3], PEERS[4], PEERS[3])


def variants_of(device: str, names: Sequence[str] = ()) -> tuple[Variant, ...]:
    """Who runs the cases of a suite: PEFT, and of the others all that there are, or those of some names.

    Raises:
        ValueError: a name of no variant of the device.
    """
    variants = CPU_VARIANTS if device == "cpu" else GPU_VARIANTS
    unknown = sorted(set(names) - {variant.name for variant in variants})
    if unknown:
        known = ", ".join(variant.name for variant in variants)
        raise ValueError(f"unknown variants {', '.join(unknown)}, expected of {known}")
    return tuple(one for one in variants if one is REFERENCE or not names or one.name in names)
