"""The loop that PEFT's users write, with one line added: the same losses at every step, the same prompt."""

import csv
import functools
import hashlib
from pathlib import Path

import pytest
import torch
from marks import slow_unless
from parity import assert_close, make_batch, prompt_of, real_columns, relative_error
from tiny_models import pair, prompted
from transformers import get_linear_schedule_with_warmup

import softprompt

COMPLAINTS = Path("../shared/data/raft/twitter_complaints/train.csv")


def train(model, batches, learning_rate=3e-2):
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    schedule = get_linear_schedule_with_warmup(optimizer, num_warmup_steps=0, num_training_steps=len(batches))
    losses = []
    model.train()
    for batch in batches:
        outputs = model(**batch)
        loss = outputs.loss
        losses.append(float(loss.detach().float()))
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return losses


def predict(model, batch):
    model.eval()
    with torch.no_grad():
        outputs = model(**batch)
    return torch.argmax(outputs.logits, -1).detach().cpu().numpy()


def assert_same_training(stock, fast, batches, unseen):
    start = prompt_of(stock).detach().clone()
    softprompt.patch(fast, on_unsupported="error")
    expected, got = train(stock, batches), train(fast, batches)
    assert relative_error(prompt_of(stock).detach(), start) > 0.03, "PEFT's prompt did not move"
    for number, (loss, true_loss) in enumerate(zip(got, expected, strict=True)):
        assert loss == pytest.approx(true_loss, rel=1e-4), f"step {number}"
    assert_close(prompt_of(fast), prompt_of(stock), 1e-3, "the trained prompt")
    real = real_columns(unseen, prompt_of(stock).shape[0]).numpy()
    assert (predict(fast, unseen)[real] == predict(stock, unseen)[real]).all()
    return expected


@functools.lru_cache(maxsize=1)
def model_for(name):
    return prompted(name, torch.float32, num_virtual_tokens=8)


@pytest.mark.parametrize(
    "name",
    slow_unless(
        ["bloom", "gemma2", "mamba"],
        ["bloom", "llama", "gpt2", "opt", "qwen2", "gemma2", "mistral-window", "mamba", "lfm2"],
    ),
)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("labels", ["everywhere", "answer"])
def test_the_loop_gives_the_losses_of_peft(name, side, labels):
    lengths = [(7, 3, 5, 6), (4, 7, 3, 3), (6, 6, 5, 7)]
    batches = [make_batch(lengths[i % 3], side, labels, seed=i % 3) for i in range(6)]
    unseen = make_batch((5, 7, 3, 4), side, labels, seed=9)
    assert_same_training(*pair(model_for(name)), batches, unseen)


def token_ids(text, vocabulary):
    words = text.lower().split()
    return [3 + int(hashlib.sha1(word.encode()).hexdigest(), 16) % (vocabulary - 3) for word in words]


def complaints(vocabulary, length=64, batch_size=8):
    """The rows of the task as left-padded batches with labels on the answers."""
    with COMPLAINTS.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    samples = []
    for row in rows:
        text = token_ids(f"Tweet text : {row['Tweet text']} Label : ", vocabulary)
        answer = [*token_ids(row["Label"], vocabulary), 2]
        ids = (text + answer)[-length:]
        pads = length - len(ids)
        samples.append(
            {
                "input_ids": torch.tensor([0] * pads + ids),
                "attention_mask": torch.tensor([0] * pads + [1] * len(ids)),
                "labels": torch.tensor([-100] * (length - len(answer)) + answer),
            }
        )
    groups = [samples[first : first + batch_size] for first in range(0, len(samples), batch_size)]
    return [{name: torch.stack([sample[name] for sample in group]) for name in group[0]} for group in groups]


@pytest.mark.slow
@pytest.mark.skipif(not COMPLAINTS.exists(), reason=f"{COMPLAINTS} is not here")
def test_thirty_steps_on_twitter_complaints_equal_peft():
    vocabulary = 1024
    base = {"vocab_size": vocabulary, "hidden_size": 128, "n_layer": 4, "n_head": 8}
    stock, fast = pair(prompted("bloom", torch.float32, num_virtual_tokens=8, **base))
    batches = complaints(vocabulary)
    assert batches[0]["input_ids"].shape == (8, 64)
    steps = [batches[number % len(batches)] for number in range(30)]
    losses = assert_same_training(stock, fast, steps, batches[0])
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


@pytest.mark.skipif(not COMPLAINTS.exists(), reason=f"{COMPLAINTS} is not here")
def test_the_same_loop_on_recorded_steps_equals_peft(tape):
    stock, fast = pair(prompted("bloom", torch.float32, num_virtual_tokens=8))
    batches = complaints(97)
    steps = [batches[number % len(batches)] for number in range(20)]
    assert_same_training(stock, fast, steps, batches[0])
    assert fast._softprompt.runner.graphs.statistics.replayed > 10
