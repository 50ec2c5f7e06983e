"""On real weights: the losses, tokens and files of PEFT, in less memory, and the commands from end to end."""

import csv
import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM

import softprompt
from softprompt.cli import main
from softprompt.generation.stock import right_options
from softprompt.tasks.compare import profiled_peak_bytes

COMPLAINTS = Path("../shared/data/raft/twitter_complaints/train.csv")
STEPS = 40
# Of the standard deviation of the embeddings. At ten times as much, the losses of PEFT itself move by 1e-3
# within 20 steps when its prompt starts 1e-7 elsewhere.
LEARNING_RATE = 0.0075
ROWS = [
    ("my order never came and nobody answers", " complaint"),
    ("thanks, all good now", " no complaint"),
    ("the app crashes again", " complaint"),
    ("lovely day at the lake with the kids", " no complaint"),
    ("why is this flight late every single time", " complaint"),
    ("new phone is here!", " no complaint"),
]


def batch_of(tokenizer, rows, *, length=None):
    """Rows padded on the left, to the longest one or to a length; only label and end token are learnt."""
    coded = []
    for text, label in rows:
        target = [*tokenizer(label, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        ids = tokenizer(f"Tweet text : {text} Label :")["input_ids"]
        coded.append((ids[: length - len(target)] if length else ids, target))
    width = length or max(len(ids) + len(target) for ids, target in coded)
    batch = {"input_ids": [], "attention_mask": [], "labels": []}
    for ids, target in coded:
        pads = width - len(ids) - len(target)
        batch["input_ids"].append([tokenizer.pad_token_id] * pads + ids + target)
        batch["attention_mask"].append([0] * pads + [1] * (len(ids) + len(target)))
        batch["labels"].append([-100] * (pads + len(ids)) + target)
    return {name: torch.tensor(values) for name, values in batch.items()}


def own_loss(model, batch):
    return model(**batch).loss


def exact_loss(model, batch):
    """The loss of PEFT's logits in float64.

    Over the 262,144 tokens of Gemma, torch's log-softmax in float32 is off by 1e-4, the same at every step.
    That is a hundred times as much as all else of PEFT's forward.
    """
    logits = model(**batch).logits
    prompt = logits.shape[1] - batch["labels"].shape[1]
    labels = functional.pad(batch["labels"], (prompt, 0), value=-100)
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1).double(), labels[:, 1:].flatten())


def train(model, batches, loss_of=own_loss):
    scale = float(model.get_input_embeddings().weight.detach().float().std())
    optimizer = torch.optim.AdamW(model.prompt_encoder.parameters(), lr=LEARNING_RATE * scale)
    losses = []
    model.train()
    for batch in batches:
        loss = loss_of(model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.slow(seconds=145)
def test_the_losses_of_forty_steps_are_those_of_peft(real_base, real_folder, real_tokenizer, prompted, dtype):
    base = real_base
    if dtype != torch.float32:
        base = AutoModelForCausalLM.from_pretrained(real_folder, dtype=dtype)
    batches = [batch_of(real_tokenizer, [ROWS[step % 6], ROWS[(step + 1) % 6]]) for step in range(STEPS)]
    expected = train(prompted(base), batches, exact_loss)
    fast = softprompt.patch(prompted(base), on_unsupported="error")
    got = train(fast, batches)
    assert softprompt.explain(fast).route == "packed"
    softprompt.unpatch(fast)
    assert expected[36] < 0.9 * expected[0], "nothing was learnt"  # from the same rows
    tolerance = 1e-4 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(torch.tensor(got), torch.tensor(expected), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    "how",
    [{"do_sample": False}, {"num_beams": 3}, {"do_sample": True, "temperature": 0.8, "top_k": 40}],
    ids=["greedy", "beam", "sampling"],
)
def test_the_tokens_that_are_written_are_those_of_peft(prompted, real_tokenizer, how):
    texts = [f"Tweet text : {text} Label :" for text, _ in ROWS[:3]]
    inputs = dict(real_tokenizer(texts, padding=True, return_tensors="pt"))
    inputs.pop("token_type_ids", None)

    def write(model, **more):
        torch.manual_seed(7)
        with torch.no_grad():
            return model.eval().generate(**inputs, max_new_tokens=8, **how, **more)

    plain = prompted()
    expected = write(plain, **right_options(plain))
    fast = softprompt.patch(prompted(), on_unsupported="error")
    got = write(fast)
    softprompt.unpatch(fast)
    assert got.tolist() == expected.tolist()


def test_a_step_on_the_articles_batch_takes_at_most_two_fifths_of_the_memory(prompted, real_tokenizer):
    if not COMPLAINTS.is_file():
        pytest.skip(f"{COMPLAINTS} is not there")
    with COMPLAINTS.open(encoding="utf-8", newline="") as file:
        rows = [(row["Tweet text"], f" {row['Label']}") for row in csv.DictReader(file)][:8]
    batch = batch_of(real_tokenizer, rows, length=64)

    def peak(model):
        def step():
            model(**batch).loss.backward()
            model.zero_grad(set_to_none=True)

        model.train()
        step()
        return profiled_peak_bytes(step)

    expected = peak(prompted())
    fast = softprompt.patch(prompted(), on_unsupported="error")
    got = peak(fast)
    softprompt.unpatch(fast)
    assert got <= 0.4 * expected, f"{got / 2**20:.0f} MiB, PEFT {expected / 2**20:.0f} MiB"


def test_the_commands_train_predict_and_score(real_file, real_folder, tmp_path, capsys):
    table = tmp_path / "rows.csv"
    with table.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *((text, label.strip()) for text, label in ROWS * 2)])
    adapter, labelled = tmp_path / "adapter", tmp_path / "labelled.csv"
    columns = ["--text-column", "text", "--label-column", "label"]
    places = ["--data", str(table), "--eval-data", str(table), "--output", str(adapter)]
    assert main(["train", "--model", str(real_file), *places, *columns, "--steps", "4"]) == 0
    metrics = json.loads((adapter / "metrics.json").read_text())
    assert metrics["steps"] == 4
    assert metrics["eval_exact_match"] >= 0.5
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == real_folder

    new = ["--adapter", str(adapter), "--data", str(table)]
    assert main(["predict", *new, "--output", str(labelled), "--score"]) == 0
    with labelled.open(encoding="utf-8", newline="") as file:
        written = list(csv.DictReader(file))
    right = sum(row["prediction"] == row["label"] for row in written)
    assert len(written) == 12
    assert right / 12 == pytest.approx(metrics["eval_exact_match"])
    assert "Traceback" not in capsys.readouterr().err
