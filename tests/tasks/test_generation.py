"""Generation tasks: their targets, their loss, and what is written, beside plain PEFT and the libraries."""

import json
from dataclasses import replace

import pandas as pd
import pytest
import sacrebleu
import torch
from peft import PromptTuningConfig, get_peft_model
from rouge_score.rouge_scorer import RougeScorer
from tiny_models import build
from transformers import AutoModelForCausalLM, AutoTokenizer

import softprompt
from softprompt.tasks.classification import Encoder, TextTask, load_task
from softprompt.tasks.collate import LeftPadCollator
from softprompt.tasks.errors import TaskError
from softprompt.tasks.evaluation import Evaluation
from softprompt.tasks.inference import label_texts
from softprompt.tasks.labels import are_targets
from softprompt.tasks.metrics import text_scores
from softprompt.tasks.scoring import target_loss
from softprompt.tasks.table import Table, split_table
from softprompt.tiny import model_path

TASK = TextTask("text", "summary", (), template="{text} :", max_length=12, end_token="eos", max_new_tokens=3)
TEXTS = ["the app crashed again", "lovely weather", "where is my parcel", "thanks", "it broke today"]
TARGETS = ["it crashed", "a lovely day at the lake", "no parcel", "thanks", "it broke and nobody helps"]


@pytest.fixture
def table():
    frame = pd.DataFrame({"text": TEXTS, "summary": TARGETS})
    return Table("made", "text", "summary", TEXTS, TARGETS, frame=frame)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float64)
    made = get_peft_model(base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    made.prompt_encoder.double()
    return made


@pytest.fixture(scope="module")
def encoder():
    task = replace(TASK, max_length=40, max_new_tokens=6, positions="compact", label_prefix=" ")
    return Encoder(task, AutoTokenizer.from_pretrained(model_path()))


def test_a_target_that_is_too_long_loses_its_end_and_its_end_token(tokenizer, ids):
    encoder = Encoder(TASK, tokenizer)
    assert encoder.target("a b") == ids("a b </s>")
    assert encoder.target("a b c") == ids("a b c")
    assert encoder.target("a b c d") == ids("a b c")
    assert encoder.target_lengths(["a b", "a b c", "a b c d"]) == [3, 4, 5]


def test_an_example_keeps_room_for_the_longest_target(tokenizer, ids):
    encoder = Encoder(TASK, tokenizer)
    example = encoder.example("a b c d e f g h i j", "a")
    assert example["input_ids"] == ids("a b c d e f g h : a </s>")
    assert example["labels"] == [-100] * 9 + ids("a </s>")
    with pytest.raises(TaskError, match="takes 1 tokens and the longest target 3 with its end token"):
        Encoder(replace(TASK, max_length=4), tokenizer)


def test_a_generation_task_is_read_back(tmp_path):
    TASK.save(tmp_path, model="some/model", training={"seed": 1})
    assert load_task(tmp_path) == (TASK, "some/model", {"seed": 1})
    assert TASK.generates


def test_a_task_from_before_generation_classifies(tmp_path):
    old = TextTask("text", "label", ("no", "yes"), label_prefix=" ")
    old.save(tmp_path, model="some/model", training={})
    assert "max_new_tokens" not in json.loads((tmp_path / "softprompt.json").read_text())
    assert load_task(tmp_path)[0] == old
    assert not old.generates


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be a whole number of at least 1, got 0"),
        ({"max_new_tokens": "8"}, "max_new_tokens must be a whole number of at least 1, got '8'"),
        ({"labels": ("a",)}, r"a generation task has no labels, got \('a',\)"),
        ({"max_new_tokens": None}, "a classification task needs at least one label"),
    ],
)
def test_a_task_that_cannot_be_is_refused(changed, message):
    with pytest.raises(TaskError, match=message):
        replace(TASK, **changed)


def test_labels_are_targets_where_there_are_many_and_no_two_are_alike():
    many = [f"text {number}" for number in range(20)]
    assert are_targets(many)
    assert not are_targets(many[:19])
    assert not are_targets([*many, "text 3"])


def test_rows_with_targets_of_their_own_are_split_at_random(table):
    rest, taken = split_table(table, 0.4, seed=1, by_label=False)
    assert (len(rest), len(taken)) == (3, 2)
    assert sorted(rest.texts + taken.texts) == sorted(TEXTS)
    assert taken.texts == split_table(table, 0.4, seed=1, by_label=False)[1].texts
    with pytest.raises(TaskError, match="too few rows"):
        split_table(table.take([0]), 0.4, seed=1, by_label=False)


@torch.no_grad()
def plain_loss(model, encoder):
    """The mean over the tokens of all targets, row by row in the model's own forward."""
    total, count = 0.0, 0
    for text, target in zip(TEXTS, TARGETS, strict=True):
        example = encoder.example(text, target)
        tokens = sum(label != -100 for label in example["labels"])
        total += float(model(**{name: torch.tensor([ids]) for name, ids in example.items()}).loss) * tokens
        count += tokens
    return total / count


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_the_loss_is_that_of_pefts_forward_on_the_same_examples(model, encoder, table, batch_size):
    done = []
    loss = target_loss(model, encoder, table, adapter="default", batch_size=batch_size, progress=done.append)
    assert loss == pytest.approx(plain_loss(model.eval(), encoder), rel=1e-6)
    assert sum(done) == len(TEXTS)


def test_the_loss_without_a_prompt_is_that_of_the_frozen_model(model, encoder, table):
    loss = target_loss(model, encoder, table, adapter=None, batch_size=2)
    assert loss == pytest.approx(plain_loss(model.get_base_model().eval(), encoder), rel=1e-6)


def test_a_patched_training_step_has_pefts_loss(encoder):
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32)
    made = get_peft_model(base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    batch = LeftPadCollator.of(encoder)(encoder.examples(TEXTS, TARGETS))
    plain = made(**batch).loss
    (wanted,) = torch.autograd.grad(plain, made.prompt_encoder["default"].embedding.weight)
    patched = softprompt.patch(made, positions="padded")
    loss = patched(**batch).loss
    (got,) = torch.autograd.grad(loss, made.prompt_encoder["default"].embedding.weight)
    torch.testing.assert_close(loss, plain, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_what_is_written_does_not_depend_on_the_padding(family, encoder):
    """GPT-2 learns positions, so that a pad that counted would show."""
    torch.manual_seed(0)
    base = build(family).eval()
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.mul_(4)  # else every text is answered alike
    size = base.get_input_embeddings().num_embeddings
    made = get_peft_model(base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    made = softprompt.patch(made, positions="compact")

    class Small(Encoder):
        def prompt(self, row):
            return [token % size for token in super().prompt(row)]

    small = Small(replace(encoder.task, padding="longest"), encoder.tokenizer)
    small.stop_token_ids, small.pad_token_id = [size - 1], size - 1
    for writer in (made, made.get_base_model()):
        alone, together = (label_texts(writer, small, TEXTS, batch_size=of) for of in (1, len(TEXTS)))
        assert alone == together
        assert len(set(alone)) > 1


def test_scores_of_texts_are_those_of_the_libraries():
    written = ["the cat sat on the mat", "a dog", "", "The end-of-line."]
    targets = ["the cat lay on a mat", "a dog", "something", "the end of line"]
    scores = text_scores(written, targets)
    scorer = RougeScorer(["rougeL"])
    rouge = [scorer.score(t, w)["rougeL"].fmeasure for w, t in zip(written, targets, strict=True)]
    assert scores["exact_match"] == 0.25
    assert scores["rouge_l"] == pytest.approx(sum(rouge) / 4)
    assert scores["bleu"] == pytest.approx(sacrebleu.corpus_bleu(written, [targets]).score)


def test_short_texts_that_are_right_have_the_best_score():
    assert text_scores(["a dog", "Paris, Sam"], ["a dog", "Paris, Sam"])["bleu"] == pytest.approx(100)


def test_words_of_other_scripts_count_for_rouge():
    assert text_scores(["добрый день"], ["добрый вечер"])["rouge_l"] == pytest.approx(0.5)


def test_what_is_written_is_measured_beside_its_targets(model, encoder, table):
    evaluation = Evaluation(model, encoder, batch_size=2)
    scores = evaluation.measure(table, ["default"])
    assert set(scores) == {"loss", "perplexity"}
    written = evaluation.written(table, ["default"])
    texts = label_texts(model, encoder, TEXTS, batch_size=2)
    samples = written.pop("samples")
    assert written == text_scores(texts, TARGETS)
    assert [sample["written"] for sample in samples] == texts
    assert [(sample["text"], sample["target"]) for sample in samples] == list(
        zip(TEXTS, TARGETS, strict=True)
    )
    before = evaluation.zero_shot(table)
    alone = label_texts(model.get_base_model(), encoder, TEXTS, batch_size=2)
    assert before["loss"] == pytest.approx(plain_loss(model.get_base_model().eval(), encoder), rel=1e-6)
    assert before["rouge_l"] == text_scores(alone, TARGETS)["rouge_l"]
