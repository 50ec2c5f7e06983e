"""How each reason for not taking the fast route comes about. In its sentence {} stands for values.

A row of `ROWS` names a sentence and an action. The action gets the `Kit` of `test_reasons.py`, makes a
model, does what the fast route does not serve, and returns the model that `softprompt.explain` is then asked
about. A new reason in the sources needs a row in one of these modules.
"""

import importlib.util
import types

import torch
from tiny_models import build
from torch import nn

from reasons import calls, encoder_decoders, generation, models, steps, weights
from reasons.calls import ADAPTERS, CALLS
from reasons.rows import BATCH, Row, pattern_of
from softprompt.engine import attention_modules, model_spec, precision, sharding, step_graph
from softprompt.ops import registry

__all__ = ["ADAPTERS", "BATCH", "CALLS", "DIRECT", "ELSEWHERE", "ROWS", "Row", "pattern_of"]


def without_triton(kit):
    kit.monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    return registry.triton_availability.__wrapped__("cuda").reason


# Reasons that no whole model shows on a machine without a GPU: sentence -> what gives it
DIRECT = {
    "the attention modules of {} are not known": lambda kit: attention_modules.obstacle(nn.Module(), "llama"),
    "no module runs {}": lambda kit: attention_modules.obstacle(nn.Module(), "bloom"),
    "the weights are on {}, the batch is on {}": lambda kit: step_graph._lasting_obstacle(
        build("llama"), torch.device("meta")
    ),
    "the model names no output embeddings": lambda kit: model_spec.head_obstacle(
        types.SimpleNamespace(get_output_embeddings=lambda: None)
    ),
    "{} is on the meta device": lambda kit: precision.weight_obstacle("it", torch.empty(1, device="meta")),
    "{} holds {} numbers": lambda kit: precision.weight_obstacle("it", torch.empty(1, dtype=torch.int8)),
    "there are no native ops for {} tensors": lambda kit: registry.native_availability("meta").reason,
    "triton is not installed (pip install triton)": without_triton,
    "Triton needs CUDA tensors, or TRITON_INTERPRET=1 for the CPU; got {}": (
        lambda kit: registry.triton_availability.__wrapped__("meta").reason
    ),
}


PARTS = (calls, models, weights, steps, generation, encoder_decoders)
ROWS = [row for part in PARTS for row in part.rows()]

# Reasons that need other processes: sentence -> what the test of two ranks looks for
_OF_RANKS = {
    sharding.UNCHECKED: "call softprompt.patch before fully_shard",
    sharding.DISAGREE: "not the same on all ranks",
    f"softprompt: {sharding.ROWS_OF_ADAPTERS}": "leaves the prompts whole",
    "the weights are sharded by fully_shard, which is served for decoder-only models": (
        "served for decoder-only models"
    ),
    sharding.ONLY_FORWARD: "only forward gathers them",
    f"softprompt: {sharding.ONLY_FORWARD}": "softprompt.ensemble.losses(fast",
    f"softprompt: {sharding.ONLY_FORWARD}: generate does not": "fast.generate(",
    f"softprompt: {{}}; {sharding.NOT_EMBEDDED}": "embeds the texts outside of the model",
}
# Reasons that other tests bring about: sentence -> (file below tests/, what it looks for)
ELSEWHERE = {
    **{sentence: ("distributed/fsdp_checks.py", phrase) for sentence, phrase in _OF_RANKS.items()},
    "a {} with a prompt of its own lies below it, which the fast route would skip": (
        "test_nested.py",
        "with a prompt of its own lies below it",
    ),
    "a {} below it has hooks or a replaced forward, which the fast route would skip": (
        "test_nested.py",
        "below it has hooks or a replaced forward",
    ),
    "a {} below it has a forward of its own, which the fast route would skip": (
        "test_nested.py",
        "below it has a forward of its own",
    ),
    "a {} below it does more than its layers in the language model": (
        "test_nested.py",
        "below it does more than its layers",
    ),
    "an activated LoRA below it is told outside of the language model where it begins": (
        "test_nested.py",
        "an activated LoRA below it",
    ),
    "softprompt: PEFT's own generate cannot put one prompt before another, each in a PEFT model of its own: "
    "give one model both adapters (model.add_adapter)": ("test_nested.py", "one prompt before another"),
    "a mode of PyTorch is on ({})": ("engine/test_graph_validity.py", "a mode of PyTorch is on"),
    "{}, whose changes cannot be seen": ("engine/test_graph_validity.py", "whose changes cannot be"),
    "the capture failed: {}": ("engine/test_cuda_graph.py", 'match="the capture failed"'),
    "softprompt: prompts of several lengths cannot share a batch of up to {} positions: the model's rotary "
    "embedding changes beyond {}, for all prompts at once": ("test_ensemble.py", "for all prompts at once"),
    "the model's rotary embedding changes beyond {} positions, and prompt, text and candidate take up "
    "to {}": (
        "engine/test_candidates.py",
        "one at a time: the model's rotary embedding changes beyond",
    ),
    'softprompt: positions="compact" with pads between prompt and text needs the packed prefill on a model '
    "that counts places in its windows or biases: leave out prefill_chunk_size, or the pads": (
        "generation/test_generate_corners.py",
        "leave out prefill_chunk_size",
    ),
    "{}; without a cache, of which PEFT cannot ask whether it has the prompt": (
        "generation/test_generate_stock.py",
        "without a cache, of which PEFT cannot ask",
    ),
    "the native ops for {} are not built ({})": ("cli/test_doctor.py", "are not built"),
    "{} does not load: {} (build it again: {})": ("cli/test_doctor.py", "does not load"),
    "{} was built from other sources (interface {}, expected {}; build it again: {})": (
        "cli/test_doctor.py",
        "was built from other sources",
    ),
}
