"""Scores of prompts and of the frozen model alone, against likelihoods computed row by row."""

import math

import pytest
import torch
from peft import PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from softprompt.tasks.classification import Encoder, TextTask
from softprompt.tasks.evaluation import Evaluation, majority
from softprompt.tasks.table import Table, sample_rows
from softprompt.tiny import model_path

TEXTS = ["the app crashed again", "lovely weather", "where is my parcel", "thanks", "it broke"]
EXPECTED = ["complaint", "no complaint", "complaint", "no complaint", "complaint"]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float64)
    made = get_peft_model(base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    made.prompt_encoder.double()
    return made


@pytest.fixture(scope="module")
def encoder():
    labels = ("complaint", "no complaint")
    task = TextTask("Tweet text", "Label", labels, positions="compact", label_prefix=" ")
    return Encoder(task, AutoTokenizer.from_pretrained(model_path()))


@pytest.fixture
def table():
    return Table("made", "Tweet text", "Label", TEXTS, EXPECTED, frame=None)


@torch.no_grad()
def log_likelihoods(model, encoder):
    """[N, C], one row and one label at a time; transformers computes losses in fp32."""
    found = []
    for text in TEXTS:
        for label in encoder.task.labels:
            example = {name: torch.tensor([ids]) for name, ids in encoder.example(text, label).items()}
            found.append(-float(model(**example).loss) * len(encoder.targets[label]))
    return torch.tensor(found, dtype=torch.float64).view(len(TEXTS), -1)


def expected_scores(logs, encoder):
    known = encoder.task.labels
    right = [known.index(label) for label in EXPECTED]
    tokens = sum(len(encoder.targets[label]) for label in EXPECTED)
    loss = -float(sum(logs[row, label] for row, label in enumerate(right))) / tokens
    predicted = [known[i] for i in logs.argmax(1).tolist()]
    return loss, predicted


def test_a_prompt_is_measured_by_the_likeliest_label(model, encoder, table):
    done = []
    scores = Evaluation(model, encoder, batch_size=2).measure(table, ["default"], done.append)
    loss, predicted = expected_scores(log_likelihoods(model.eval(), encoder), encoder)
    assert scores["loss"] == pytest.approx(loss, rel=1e-6)
    assert scores["perplexity"] == pytest.approx(math.exp(loss))
    assert scores["exact_match"] == sum(p == e for p, e in zip(predicted, EXPECTED, strict=True)) / 5
    assert scores["predicted"] == {label: predicted.count(label) for label in dict.fromkeys(predicted)}
    assert done == [2, 2, 1]


def test_the_frozen_model_is_measured_without_a_prompt(model, encoder, table):
    scores = Evaluation(model, encoder, batch_size=3).zero_shot(table)
    loss, predicted = expected_scores(log_likelihoods(model.get_base_model().eval(), encoder), encoder)
    assert scores["loss"] == pytest.approx(loss, rel=1e-6)
    assert sum(scores["predicted"].values()) == 5
    assert scores["exact_match"] == sum(p == e for p, e in zip(predicted, EXPECTED, strict=True)) / 5


def test_a_prompt_that_diverged_has_no_loss_and_says_so(model, encoder, table):
    weight = model.prompt_encoder["default"].embedding.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(torch.nan)
    scores = Evaluation(model, encoder, batch_size=8).measure(table, ["default"])
    with torch.no_grad():
        weight.copy_(kept)
    assert math.isnan(scores["loss"])


def test_the_majority_is_that_of_the_training_rows():
    found = majority(["a", "b", "b"], ["a", "a", "a", "b"])
    assert (found["label"], found["exact_match"]) == ("b", 0.25)
    assert found["macro_f1"] == pytest.approx((0 + 2 * 0.25 / 1.25) / 2)


def test_a_sample_is_seeded_and_in_the_order_of_the_table():
    import pandas as pd

    frame = pd.DataFrame({"t": list("abcdefgh")})
    table = Table("made", "t", None, list("abcdefgh"), None, frame=frame)
    some = sample_rows(table, 3, seed=1)
    assert len(some) == 3
    assert some.texts == sorted(some.texts) == sample_rows(table, 3, seed=1).texts
    assert sample_rows(table, 8, seed=1) is table
