"""Reasons for steps that are not recorded or not compiled."""

import functools
import warnings

import torch
from tiny_models import prompted

import softprompt
from reasons.models import weight_of_a_class
from reasons.rows import BATCH, DYNAMIC, Row
from softprompt.engine import cuda_graph


def steps(change=lambda model: None, batch=BATCH, name="llama", **overrides):
    """Training steps where steps can be recorded."""

    def act(kit):
        kit.record()
        model = softprompt.patch(prompted(name, **overrides))
        change(model)
        for _ in range(3):
            model(**batch).loss.backward()
        return model

    return act


def embeddings_for_ids():
    embeds = torch.randn(3, 8, 48, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return {name: value for name, value in BATCH.items() if name != "input_ids"} | {"inputs_embeds": embeds}


def in_training_mode(model):
    model.train()


def checkpointed(model):
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    model.get_base_model().disable_input_require_grads()
    model.train()


def on_two_devices(model):
    model.get_base_model().register_buffer("far", torch.empty(1, device="meta"))


def trainable_norm(model):
    model.get_base_model().model.norm.requires_grad_(True)


def in_half(kit):
    kit.record()
    model = softprompt.patch(prompted("llama", torch.float16))
    model(**BATCH).loss.backward()
    return model


def under_anomaly_detection(kit):
    kit.record()
    model = softprompt.patch(kit.llama())
    with torch.autograd.detect_anomaly(check_nan=False):
        model(**BATCH)
    return model


def refused_recording(kit):
    kit.record(RuntimeError("out of memory"))
    model = softprompt.patch(kit.llama())
    for _ in range(2):
        model(**BATCH).loss.backward()
    return model


def broken_compiler(kit):
    def broken(graph, inputs):
        raise RuntimeError("no compiler here")

    torch._dynamo.reset()
    kit.monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=broken))
    model = softprompt.patch(kit.llama(), compile=True)
    model(**BATCH)
    return model


def waiting_step(kit):
    def run():
        warnings.warn("called a synchronizing CUDA operation", stacklevel=2)

    for name in ("get_sync_debug_mode", "set_sync_debug_mode"):
        kit.monkeypatch.setattr(torch.cuda, name, lambda *args: 0)
    cuda_graph._without_waits(run)


def rows():
    def trained_on_the_cpu(kit):
        model = softprompt.patch(kit.llama())
        model(**BATCH)
        return model

    def hooked_layer(model):
        model.get_base_model().model.layers[0].register_forward_hook(lambda *args: None)

    def unusual_weight(model):
        weight_of_a_class("model.layers.0.mlp.up_proj")(model.get_base_model())

    yield Row("CUDA graphs need a CUDA device, the batch is on {}", trained_on_the_cpu, "explain")
    yield Row("the batch comes as inputs_embeds", steps(batch=embeddings_for_ids()))
    yield Row("modules of the language model have hooks or a replaced forward", steps(hooked_layer))
    yield Row("anomaly detection is on", under_anomaly_detection)
    yield Row(
        "the language model has trainable weights, whose gradients a recorded step does not make",
        steps(trainable_norm),
    )
    yield Row(
        "its rotary embedding depends on the longest position, which the host has to read", steps(**DYNAMIC)
    )
    yield Row("dropout is on in the language model ({})", steps(in_training_mode, name="gpt2-dropout"))
    yield Row("gradient checkpointing is on", steps(checkpointed))
    yield Row(
        "fp16 gradients have to be scaled before the backward, and a recorded step scales them after", in_half
    )
    yield Row("weights are of type {}", steps(unusual_weight))
    yield Row("weights lie on several devices ({})", steps(on_two_devices))
    yield Row("recording failed: {}", refused_recording)
    yield Row("torch.compile of the decoder failed, it runs as it is: {}", broken_compiler)

    yield Row("its forward or backward makes the host wait for the device ({})", waiting_step, "error")
