"""embed_prompt, pack_layout and prepend_prompt: memory- and launch-bound."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels.problem import (
    KernelVariant,
    Outputs,
    Problem,
    backend_variants,
    compiled,
    dtype_of,
)
from benchmarks.texts import EvenLengths, TextLengths
from softprompt.layout import build_layout
from softprompt.ops.embed_prompt import embed_prompt
from softprompt.ops.embed_prompt import reference as embed_reference
from softprompt.ops.pack_layout import Batch, Packing, pack_layout
from softprompt.ops.pack_layout import reference as pack_reference
from softprompt.ops.prepend_prompt import Rows, prepend_prompt
from softprompt.ops.prepend_prompt import reference as prepend_reference

_IGNORE_INDEX = -100


@dataclass(frozen=True)
class RowSizes:
    """A left-padded batch of texts behind one prompt."""

    texts: TextLengths | EvenLengths
    rows: int  # B
    pad_to: int  # L
    num_virtual_tokens: int  # P
    hidden_size: int = 0  # H
    vocab_size: int = 0  # V


@dataclass(frozen=True)
class _Rows:
    input_ids: Tensor  # [B, L]
    attention_mask: Tensor  # [B, L]
    labels: Tensor  # [B, L]


def _rows(sizes: RowSizes, device: str) -> _Rows:
    rows = sizes.texts.sample(sizes.rows)
    lengths = torch.tensor([min(sum(row), sizes.pad_to) for row in rows])[:, None]
    labels = torch.tensor([row[1] for row in rows])[:, None]
    left = sizes.pad_to - torch.arange(sizes.pad_to)  # columns to the end
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, sizes.vocab_size, (sizes.rows, sizes.pad_to), generator=generator)
    return _Rows(
        ids.to(device),
        (left <= lengths).long().to(device),
        ids.masked_fill(left > labels, _IGNORE_INDEX).to(device),
    )


def _weights(sizes: RowSizes, device: str) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    table = torch.randn(sizes.vocab_size, sizes.hidden_size, device=device, dtype=dtype_of(device))
    return table, torch.randn(sizes.num_virtual_tokens, sizes.hidden_size, device=device)


def _backends(call: Callable[[str], Outputs]) -> tuple[KernelVariant, ...]:
    """The op's own back ends."""
    return backend_variants(call, ("triton", "native", "reference"), optional=("reference",))


def embedding(sizes: RowSizes, device: str) -> Problem:
    """`embed_prompt`, its reference through `torch.compile`, and what PEFT does instead."""
    batch = _rows(sizes, device)
    table, prompts = _weights(sizes, device)
    layout = build_layout(batch.attention_mask, [sizes.num_virtual_tokens], backend="reference")
    index, count = layout.token_index, sizes.num_virtual_tokens

    def truth() -> Outputs:
        ids = batch.input_ids.flatten()[index[count:].long()]
        return (torch.cat([prompts.to(table.dtype), table[ids]])[None],)

    def compile_reference() -> Callable[[], Outputs]:
        run = compiled(embed_reference)
        return lambda: (run(table, batch.input_ids, index, prompts),)

    def copy_of_the_result() -> Callable[[], Outputs]:
        (result,) = truth()
        return lambda: (result.clone(),)

    width = count + sizes.pad_to

    def packed(outputs: Outputs) -> Outputs:
        """PEFT's rows in the order of the packed row."""
        embeds = outputs[0]
        rows = index[count:].long()
        texts = embeds.flatten(0, 1)[rows // sizes.pad_to * width + count + rows % sizes.pad_to]
        return (torch.cat([embeds[0, :count], texts])[None],)

    variants = (
        *_backends(lambda backend: (embed_prompt(table, batch.input_ids, index, prompts, backend=backend),)),
        KernelVariant("reference+compile", compile_reference, optional=True, compiles=True),
        KernelVariant("peft", lambda: _peft(batch, table, prompts), comparable=packed),
        KernelVariant("copy of the result", copy_of_the_result),
    )
    moved = (2 * (index.shape[0] - count) + count) * sizes.hidden_size * table.element_size()
    return Problem(variants, truth, (0.0,), 0, moved + prompts.numel() * prompts.element_size())


def _peft(batch: _Rows, table: Tensor, prompts: Tensor) -> Callable[[], Outputs]:
    """The operations of PEFT's forward before the model is called, with its copies from the CPU."""
    tokens = torch.arange(prompts.shape[0])  # PEFT keeps them on the CPU

    def run() -> Outputs:
        rows, device = batch.input_ids.shape[0], batch.input_ids.device
        mask = torch.ones(rows, prompts.shape[0]).to(device)
        mask = torch.cat((mask, batch.attention_mask), dim=1)
        embeds = torch.nn.functional.embedding(batch.input_ids, table)
        labels = torch.full((rows, prompts.shape[0]), _IGNORE_INDEX).to(device)
        labels = torch.cat((labels, batch.labels), dim=1)
        prompt_tokens = tokens[None].expand(rows, -1).to(device)[:1]
        prompt = torch.nn.functional.embedding(prompt_tokens[0], prompts).repeat(rows, 1, 1)
        return torch.cat((prompt.to(embeds.dtype), embeds), dim=1), mask, labels

    return run


def layout(sizes: RowSizes, device: str) -> Problem:
    """`pack_layout` with labels and ids, and its reference through `torch.compile`."""
    batch = _rows(sizes, device)
    arguments: dict[str, Any] = {
        "labels": batch.labels,
        "input_ids": batch.input_ids,
        "vocab_size": sizes.vocab_size,
    }
    lengths = [sizes.num_virtual_tokens]

    def truth() -> Outputs:
        on_cpu = {
            name: value.cpu() if isinstance(value, Tensor) else value for name, value in arguments.items()
        }
        found = pack_layout(batch.attention_mask.cpu(), lengths, backend="reference", **on_cpu)
        return tuple(tensor.to(device) for tensor in found)

    def call(backend: str) -> Outputs:
        return tuple(pack_layout(batch.attention_mask, lengths, backend=backend, **arguments))

    def compile_reference() -> Callable[[], Outputs]:
        run = compiled(pack_reference)
        columns = batch.input_ids.numel()
        inputs = Batch(batch.attention_mask, batch.labels, batch.input_ids, None)
        packing = Packing(sizes.vocab_size, "slots", sum(lengths) + columns, columns)
        return lambda: run(inputs, lengths, packing)

    columns = batch.input_ids.numel()
    return Problem(
        (
            *_backends(call),
            KernelVariant("reference+compile", compile_reference, optional=True, compiles=True),
        ),
        truth,
        (0.0,) * 10,
        0,
        3 * 8 * columns + 6 * 4 * (columns + sum(lengths)) + 2 * 4 * columns,
    )


def padded_rows(sizes: RowSizes, device: str) -> Problem:
    """`prepend_prompt`, its reference through `torch.compile`, and what PEFT does instead."""
    batch = _rows(sizes, device)
    table, prompts = _weights(sizes, device)
    lengths = [sizes.num_virtual_tokens]

    def call(backend: str) -> Outputs:
        return tuple(
            prepend_prompt(
                table,
                batch.input_ids,
                prompts,
                lengths,
                attention_mask=batch.attention_mask,
                labels=batch.labels,
                backend=backend,
            )[:3]
        )

    def truth() -> Outputs:
        text = table[batch.input_ids]
        prompt = prompts.to(table.dtype).expand(sizes.rows, -1, -1)
        ones = torch.ones(sizes.rows, sizes.num_virtual_tokens, device=device)
        return (
            torch.cat([prompt, text], 1),
            torch.cat([ones, batch.attention_mask.float()], 1),
            torch.cat([torch.full_like(ones, _IGNORE_INDEX).long(), batch.labels], 1),
        )

    def compile_reference() -> Callable[[], Outputs]:
        run = compiled(prepend_reference)
        rows = Rows(batch.attention_mask, batch.labels, None)
        return lambda: run(table, batch.input_ids, prompts, rows, lengths[0])[:3]

    columns = sizes.rows * (sizes.num_virtual_tokens + sizes.pad_to)
    moved = 2 * columns * sizes.hidden_size * table.element_size() + columns * (4 + 8 + 8 + 3 * 8)
    return Problem(
        (
            *_backends(call),
            KernelVariant("reference+compile", compile_reference, optional=True, compiles=True),
            KernelVariant("peft", lambda: _peft(batch, table, prompts)),
        ),
        truth,
        (0.0, 0.0, 0.0),
        0,
        moved,
    )
