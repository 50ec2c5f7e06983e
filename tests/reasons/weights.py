"""Reasons of quantised weights, and of weights that lie elsewhere."""

import torch
from accelerate import cpu_offload
from generating import speaker
from quantised_modules import FakeQuantizedLinear, Linear8bitLt, replace_linears
from sharded_models import cut_into_stages, flattened, partitioned, replica
from tiny_models import prompted

import softprompt
from reasons.models import renormalised
from reasons.rows import BATCH, Row, explained, patched
from softprompt.engine import sharding


def quantised(make, **which):
    return lambda base: replace_linears(base, make, **which) and None


def with_outliers(linear):
    return Linear8bitLt(linear, 2.0)


def marked(mark):
    return lambda kit: softprompt.patch(mark(prompted("llama")))


def copied_to_each_device(kit):
    model = softprompt.patch(kit.llama())
    replica(model)(**BATCH)
    return model


def brought(kit):
    model = speaker("llama")
    cpu_offload(model.get_base_model(), execution_device=torch.device("cpu"))
    softprompt.patch(model).generate(input_ids=BATCH["input_ids"][:1], max_new_tokens=1)
    return model


def rows():
    yield Row(
        "its {} layers look for outliers among all tokens of the batch, pads included "
        "(llm_int8_threshold={}; with 0.0 each token is on its own)",
        explained(quantised(with_outliers)),
        "explain",
    )
    yield Row(
        "its {} layers round all tokens of the batch, pads included, with one scale",
        explained(quantised(FakeQuantizedLinear)),
        "explain",
    )
    yield Row(
        "label rows cannot go through the head without the others: {}",
        patched(quantised(with_outliers, head=True, body=False)),
    )
    yield Row(
        "the embedding renormalises the rows of its table that it reads (max_norm), and the head shares the "
        "table, so pads change the logits",
        patched(renormalised, settings={"tie_word_embeddings": True}),
    )
    yield Row("the model is cut into pipeline stages, each with layers of its own", marked(cut_into_stages))
    yield Row(
        "FSDP1 (FullyShardedDataParallel) flattens the weights: "
        "FSDP2 (fully_shard, fsdp_version 2) is served",
        marked(flattened),
    )
    yield Row(
        "DeepSpeed ZeRO-3 partitions the weights and gathers them for the model's own forward only: "
        "FSDP2 is served, and ZeRO-1 and ZeRO-2 leave the weights whole",
        marked(partitioned),
    )
    yield Row(
        "nn.DataParallel copies the model in every step, and a copy is not checked again: "
        "use DistributedDataParallel (torchrun, accelerate launch)",
        copied_to_each_device,
    )
    yield Row(sharding.BROUGHT, brought)
