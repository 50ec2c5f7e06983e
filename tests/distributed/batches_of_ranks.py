"""One batch for both ranks, its halves, and the training of the straightforward way beside the ranks' own."""

import copy

import torch
from parity import assert_close, make_batch, prompt_of
from tiny_models import prompted
from torch.nn.parallel import DistributedDataParallel

import softprompt

WORLD_SIZE = 2
LENGTHS = (7, 3, 5, 6)
STEPS = 3


def joined_batch(labels="answer", seed=0):
    """Four rows; with "answer" both halves have as many labels."""
    return make_batch(LENGTHS, "left", labels, seed=seed)


def half(batch, rank):
    """The rows of a rank: two of four, one after the other."""
    return {name: value[2 * rank : 2 * rank + 2] for name, value in batch.items()}


def batches(labels="answer"):
    return [joined_batch(labels, seed) for seed in range(STEPS)]


def three(name="llama", dtype=torch.float64):
    """PEFT's model for one process, PEFT's and a patched one for the ranks: the same weights."""
    alone = prompted(name, dtype)
    stock, fast = copy.deepcopy(alone), copy.deepcopy(alone)
    return alone, stock, softprompt.patch(fast, on_unsupported="error")


def wrapped(model, **options):
    """The model as data parallel."""
    return DistributedDataParallel(model, **options)


def optimizer_of(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)


def train(model, steps, loss_of):
    """The losses of some steps of AdamW."""
    optimizer = optimizer_of(model)
    losses = []
    for batch in steps:
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def mean_loss(model, batch):
    return model(**batch).loss


def mean_over_ranks(value):
    """The mean of a tensor over the ranks."""
    value = value.clone()
    torch.distributed.all_reduce(value)
    return value / WORLD_SIZE


def assert_same_training(parallel, model, alone, rank, *, steps, loss_of=mean_loss, bound=5e-6):
    """The ranks on their halves end where one process ends on the joined batches.

    Args:
        parallel: what is called.
        model: the PEFT model in it.
        alone: PEFT's model with the same start.
        rank: of this process.
        steps: the joined batches.
        loss_of: of a model and a batch; with equally many labels in both halves, their mean.
        bound: relative; softmax and rotary tables are fp32 inside fp64 models.
    """
    expected = train(alone, steps, mean_loss)
    got = train(parallel, [half(batch, rank) for batch in steps], loss_of)
    assert_close(mean_over_ranks(got), expected, bound, "losses")
    assert_close(prompt_of(model), prompt_of(alone), bound, "prompt")
