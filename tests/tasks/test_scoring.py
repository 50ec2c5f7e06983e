import math

import pytest
import torch
from peft import PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from softprompt.tasks.classification import Encoder, TextTask
from softprompt.tasks.errors import TaskError
from softprompt.tasks.metrics import accuracy_and_f1, confusion_counts
from softprompt.tasks.scoring import (
    content_free_log_likelihoods,
    label_candidates,
    label_log_likelihoods,
    label_probabilities,
)
from softprompt.tiny import model_path

LABELS = ("complaint", "no", "no complaint")
TEXTS = ["the app crashed again", "lovely weather", "where is my parcel", "thanks", "it broke"]


@pytest.fixture(scope="module")
def model():
    base = AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float64)
    torch.manual_seed(0)
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    made = get_peft_model(base, config).eval()
    made.add_adapter("second", PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    made.prompt_encoder.double()
    return made


@pytest.fixture(scope="module")
def encoder_for():
    tokenizer = AutoTokenizer.from_pretrained(model_path())

    def make(**options):
        task = TextTask("Tweet text", "Label", LABELS, end_token="eos", **options)
        return Encoder(task, tokenizer)

    return make


@torch.no_grad()
def peft_loss(model, encoder, text, label):
    """Minus the log-likelihood of a label from PEFT's own loss over one row."""
    row = encoder.example(text, label)
    loss = model(**{name: torch.tensor([value]) for name, value in row.items()}).loss
    return -float(loss) * len(encoder.targets[label])


@pytest.mark.parametrize("positions", ["padded", "compact"])
@pytest.mark.parametrize("batch_size", [2, 5])
def test_log_likelihoods_are_those_of_the_loss_of_each_row(model, encoder_for, positions, batch_size):
    encoder, done = encoder_for(padding="longest", positions=positions), []
    got = label_log_likelihoods(model, encoder, TEXTS, batch_size=batch_size, progress=done.append)
    assert sum(done) == len(TEXTS)
    expected = [[peft_loss(model, encoder, text, label) for label in LABELS] for text in TEXTS]
    torch.testing.assert_close(got[0], torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-4)


def test_every_adapter_scores_every_text_in_one_forward(model, encoder_for):
    encoder, names = encoder_for(), ["default", "second"]
    together = label_log_likelihoods(model, encoder, TEXTS, adapters=names, batch_size=3)
    alone = [label_log_likelihoods(model, encoder, TEXTS, adapters=[name], batch_size=1) for name in names]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-4)


def test_scoring_leaves_the_mode_of_the_model(model, encoder_for):
    model.train()
    label_log_likelihoods(model, encoder_for(), TEXTS[:1], batch_size=1)
    assert model.training
    model.eval()


def test_a_label_is_told_from_one_that_it_begins_by_its_end_token(encoder_for):
    encoder = encoder_for()
    candidates = label_candidates(encoder)
    no, longer = candidates[1], candidates[2]
    assert longer[: len(no) - 1] == no[:-1]
    assert longer[: len(no)] != no


def test_a_label_with_the_end_token_in_it_is_refused(encoder_for):
    encoder = encoder_for()
    end = encoder.end_token_id
    encoder.targets = {"a": [5, end], "a a": [5, end, 5, end]}
    with pytest.raises(TaskError, match="the label 'a' with its end token begins the label 'a a'"):
        label_candidates(encoder)


def test_probabilities_are_a_softmax_of_the_sums():
    got = label_probabilities(torch.tensor([[[0.1, 0.3]]], dtype=torch.float64).log())
    torch.testing.assert_close(got, torch.tensor([[[0.25, 0.75]]], dtype=torch.float64))


def test_length_normalisation_takes_the_mean_per_token():
    logs = torch.tensor([[math.log(0.5), 3 * math.log(0.5)]], dtype=torch.float64)
    got = label_probabilities(logs, lengths=[1, 3])
    torch.testing.assert_close(got, torch.full((1, 2), 0.5, dtype=torch.float64))


def test_calibration_gives_a_text_that_says_nothing_even_chances(model, encoder_for):
    encoder = encoder_for()
    content_free = content_free_log_likelihoods(model, encoder)
    mean = content_free.softmax(-1).mean(1, keepdim=True).log()
    calibrated = label_probabilities(mean, content_free=content_free)
    torch.testing.assert_close(calibrated, torch.full((1, 1, 3), 1 / 3, dtype=torch.float64))


def test_calibration_divides_by_what_the_model_prefers():
    content_free = torch.tensor([[0.9, 0.1], [0.7, 0.3]], dtype=torch.float64).log()
    got = label_probabilities(
        torch.tensor([[0.6, 0.4]], dtype=torch.float64).log(), content_free=content_free
    )
    ratio = (0.6 / 0.8) / (0.4 / 0.2)
    torch.testing.assert_close(got[0, 0] / got[0, 1], torch.tensor(ratio, dtype=torch.float64))


def test_calibration_stands_labels_that_nothing_prefers():
    content_free = torch.tensor([[0.0, -2000.0], [0.0, -2000.0]], dtype=torch.float64)
    logs = torch.tensor([[0.0, -2000.0 + math.log(3)]], dtype=torch.float64)
    got = label_probabilities(logs, content_free=content_free)
    torch.testing.assert_close(got, torch.tensor([[0.25, 0.75]], dtype=torch.float64))


def test_macro_f1_is_the_mean_of_the_labels_that_occur():
    labels = ["a", "b", "c", "never"]
    expected = ["a", "a", "b", "c", "b", "a"]
    predicted = ["a", "b", "b", "a", "b", "a"]
    counts = confusion_counts(predicted, expected, labels)
    assert counts == [[2, 1, 0, 0], [0, 2, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    of_a, of_b, of_c = 2 * (2 / 3) ** 2 / (4 / 3), 2 * (2 / 3) * 1 / (2 / 3 + 1), 0
    accuracy, f1 = accuracy_and_f1(predicted, expected)
    assert accuracy == 4 / 6
    assert f1 == pytest.approx((of_a + of_b + of_c) / 3)


def test_a_foreign_label_has_no_place_among_the_counts():
    with pytest.raises(ValueError, match="expected only the labels a, b, got c"):
        confusion_counts(["c"], ["a"], ["a", "b"])
