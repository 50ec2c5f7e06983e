"""The shipped tiny model, its tables, its generator and its pretraining script."""

from __future__ import annotations

import csv
import os
from itertools import islice
from pathlib import Path
from random import Random

import pytest
import torch
from peft import PromptTuningConfig, PromptTuningInit, TaskType, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, BloomForCausalLM, set_seed

from benchmarks.tiny_model import generate, pretrain, recipe
from softprompt import tiny

SMALL = pretrain.Recipe(
    vocab_size=400, hidden_size=32, n_layer=1, n_head=2, batch_size=16, text_rows=16, learning_rate=1e-2
)
MEGABYTE = 1_000_000


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(tiny.model_path())


@pytest.fixture(scope="module")
def small_tokenizer():
    return pretrain.build_tokenizer(SMALL.vocab_size, SMALL.seed, num_documents=300)


@pytest.fixture
def model():
    return AutoModelForCausalLM.from_pretrained(tiny.model_path(), dtype=torch.float32).eval()


def instructed_complaints(count: int) -> list[generate.Document]:
    stream = generate.documents(99, excluded=pretrain.held_out(), instructed_share=1.0, bare_share=0.0)
    return list(islice((document for document in stream if document.attribute == "complaint"), count))


def test_the_folder_holds_a_bloom_in_bfloat16_of_at_most_6_megabytes(model):
    assert isinstance(model, BloomForCausalLM)
    assert Path(tiny.model_path(), "model.safetensors").stat().st_size <= 6 * MEGABYTE
    assert sum(file.stat().st_size for file in Path(tiny.model_path()).parent.rglob("*.*")) <= 8 * MEGABYTE
    assert all((weight == weight.bfloat16().float()).all() for weight in model.state_dict().values())
    assert model.lm_head.weight is model.transformer.word_embeddings.weight


def test_the_tokenizer_has_blooms_special_tokens_adds_none_and_loses_no_byte(tokenizer, model):
    text = "Tweet text : @NörthwayHelp naïve 🙂  two spaces , 1/2 off Label : "
    input_ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(input_ids) == text
    assert not set(input_ids) & set(tokenizer.all_special_ids)
    assert tokenizer.convert_tokens_to_ids(["<unk>", "<s>", "</s>", "<pad>"]) == [0, 1, 2, 3]
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<s>", "</s>", "<pad>")
    config = model.config
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id, config.vocab_size) == (
        1,
        2,
        3,
        len(tokenizer),
    )


def test_the_shipped_tokenizer_is_the_one_that_seed_0_builds(tokenizer):
    rebuilt = pretrain.build_tokenizer(pretrain.Recipe().vocab_size, 0)
    assert rebuilt.get_vocab() == tokenizer.get_vocab()
    texts = [document.prompt for document in islice(generate.documents(5), 200)]
    assert rebuilt(texts)["input_ids"] == tokenizer(texts)["input_ids"]


@pytest.mark.parametrize(
    ("path", "rows"),
    [(tiny.train_table(), generate.train_rows()), (tiny.eval_table(), generate.eval_rows())],
    ids=["train", "eval"],
)
def test_a_table_is_what_the_generator_makes_and_its_classes_are_balanced(path, rows, tmp_path):
    generate.write_table(tmp_path / "table.csv", rows)
    assert path.read_bytes() == (tmp_path / "table.csv").read_bytes()
    with path.open(encoding="utf-8", newline="") as file:
        labels = [row["Label"] for row in csv.DictReader(file)]
    assert len(labels) == 200
    assert labels.count("complaint") == labels.count("no complaint") == 100


def test_training_and_evaluation_share_no_tweet_and_pretraining_holds_both_out():
    train, evaluation = ({text for text, _ in rows} for rows in (generate.train_rows(), generate.eval_rows()))
    assert len(train) == len(evaluation) == 200
    assert not train & evaluation
    assert pretrain.held_out() == train | evaluation


def test_an_excluded_tweet_never_becomes_a_document():
    only_tweets = {"instructed_share": 0.0, "bare_share": 1.0, "unrelated_share": 0.0}
    first = next(generate.documents(4, **only_tweets)).prompt
    text = first.removeprefix("Tweet text : ").removesuffix(" Label : ")
    assert generate.template(text) == first
    filtered = generate.documents(4, excluded={text}, **only_tweets)
    assert first not in {document.prompt for document in islice(filtered, 50)}


def test_documents_depend_on_the_seed_and_on_nothing_else():
    first, again, other = (list(islice(generate.documents(seed), 300)) for seed in (8, 8, 9))
    assert first == again
    assert not {document.prompt for document in first} & {document.prompt for document in other}


def test_attributes_are_drawn_independently_of_the_complaint():
    rng = Random(0)
    tweets = [generate.make_tweet(rng).labels for _ in range(4000)]
    for attribute in generate.instructions.ATTRIBUTES[1:]:
        for value in {labels[attribute] for labels in tweets}:
            complaints = [
                labels["complaint"] == "complaint" for labels in tweets if labels[attribute] == value
            ]
            assert sum(complaints) / len(complaints) == pytest.approx(
                0.5, abs=4 * 0.5 / len(complaints) ** 0.5
            )


def test_no_instruction_names_the_label_of_the_downstream_task():
    rng = Random(0)
    texts = {
        generate.make_instruction(name, rng) for name in generate.instructions.ATTRIBUTES for _ in range(2000)
    }
    assert len(texts) > 300
    assert not [text for text in texts if "complain" in text.lower()]


def test_every_row_fits_into_the_recipes_64_tokens(tokenizer):
    for path in (tiny.train_table(), tiny.eval_table()):
        batch = recipe.training_batch(recipe.read_table(path), tokenizer)
        assert batch["input_ids"].shape == (200, 64)


def test_the_model_knows_complaints_but_only_an_instruction_brings_them_out(model, tokenizer):
    documents = instructed_complaints(150)
    bare = [
        generate.Document(generate.template(text), label, "complaint", False)
        for text, label in recipe.read_table(tiny.eval_table())
    ]
    accuracy = pretrain.label_accuracy(model, tokenizer, documents + bare)
    assert accuracy["complaint", True] >= 0.95
    assert accuracy["complaint", False] <= 0.6


def test_tuning_eight_virtual_tokens_takes_the_model_from_chance_to_the_task(model, tokenizer):
    set_seed(0)
    config = PromptTuningConfig(
        task_type=TaskType.CAUSAL_LM,
        prompt_tuning_init=PromptTuningInit.TEXT,
        prompt_tuning_init_text=recipe.INIT_TEXT,
        num_virtual_tokens=8,
        tokenizer_name_or_path=str(tiny.model_path()),
    )
    prompted = get_peft_model(model, config)
    rows = recipe.read_table(tiny.eval_table())
    assert recipe.exact_match(prompted, tokenizer, rows) <= 0.6
    recipe.tune(
        prompted,
        tokenizer,
        recipe.read_table(tiny.train_table()),
        epochs=2,
        batch_size=8,
        learning_rate=3e-2,
    )
    assert recipe.exact_match(prompted, tokenizer, rows) >= 0.95


def test_label_accuracy_is_the_share_of_greedily_decoded_labels(model, tokenizer):
    documents = instructed_complaints(20)
    rows = [(document.prompt, document.label) for document in documents]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe, "template", lambda prompt: prompt)
        patch.setattr(tokenizer, "padding_side", "left")
        decoded = recipe.exact_match(model, tokenizer, rows)
    assert pretrain.label_accuracy(model, tokenizer, documents) == {("complaint", True): decoded}


def test_a_few_pretraining_steps_lower_the_loss_and_repeat_exactly(small_tokenizer):
    runs = [
        pretrain.train(pretrain.build_model(SMALL), small_tokenizer, SMALL, 30, progress=False)
        for _ in range(2)
    ]
    assert sum(runs[0][-5:]) / 5 < 0.8 * runs[0][0]
    torch.testing.assert_close(runs[0], runs[1], rtol=1e-4, atol=0.0)


def test_pretraining_loss_scores_labels_and_text_and_ignores_padding(small_tokenizer):
    model = pretrain.build_model(SMALL).eval()
    rows = pretrain.encode(small_tokenizer, list(islice(generate.documents(1), 6)))
    label_losses, text_losses = [], []
    for row in rows:
        input_ids = torch.tensor([row.input_ids])
        log_probabilities = model(input_ids=input_ids).logits[0, :-1].log_softmax(-1)
        losses = -log_probabilities.gather(1, input_ids[0, 1:, None])[:, 0]
        text_losses += losses[: len(losses) - row.num_label_tokens].tolist()
        label_losses += losses[len(losses) - row.num_label_tokens :].tolist()
    expected = sum(label_losses) / len(label_losses) + SMALL.text_weight * sum(text_losses) / len(text_losses)
    assert pretrain.pretraining_loss(model, rows, SMALL).item() == pytest.approx(expected, rel=1e-4)


def test_saving_replaces_the_folder_and_a_failed_rename_keeps_the_old_one(
    small_tokenizer,
    tmp_path: Path,
    monkeypatch,
):
    model = pretrain.build_model(SMALL)
    output = tmp_path / "model"
    output.mkdir()
    (output / "stale.txt").write_text("old")
    rename = os.replace

    def fail(source: Path, target: Path) -> None:
        if Path(source).name == "new":
            raise OSError("no space left")
        rename(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space left"):
        pretrain.save(model, small_tokenizer, output)
    assert (output / "stale.txt").read_text() == "old"
    monkeypatch.setattr(os, "replace", rename)
    pretrain.save(model, small_tokenizer, output)
    assert not (output / "stale.txt").exists()
    loaded = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
    weight = model.transformer.word_embeddings.weight
    torch.testing.assert_close(
        loaded.transformer.word_embeddings.weight, weight.bfloat16().float(), rtol=0, atol=0
    )
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
