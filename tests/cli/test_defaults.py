"""What a run starts from where options are left out, and what it says of itself."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from softprompt import init
from softprompt.cli import models
from softprompt.cli.inputs import DAY_OF_CHATS, template_of
from softprompt.cli.notes import loss_note, result_notes
from softprompt.cli.training_config import TrainingConfig
from softprompt.prompts.vocabulary import scale_of
from softprompt.tasks.classification import Encoder, load_task

MODEL = "some/model"


@pytest.fixture
def train(run, model_folder, table, tmp_path):
    def call(*more):
        common = ("--data", table, "--model", model_folder, "--output", tmp_path / "out", "--steps", 4)
        return run("train", *common, *more)

    return call


def test_what_is_left_open_goes_by_the_model_and_the_table():
    small = TrainingConfig(model=MODEL).with_recipe().resolved(rows=499, scale=0.136, dtype="float32")
    assert (small.learning_rate, small.steps, small.validation_share) == (0.034, 100, 0.0)
    assert small.compute.batch_size == 16
    assert (small.start, small.num_virtual_tokens) == ("answers", 50)
    large = TrainingConfig(model=MODEL, epochs=2).resolved(rows=3200, scale=1.03, dtype="float32")
    assert (large.learning_rate, large.steps, large.validation_share) == (0.26, None, 0.04)
    tiny = [TrainingConfig(model=MODEL).resolved(rows=rows, scale=1.0, dtype="float32") for rows in (5, 41)]
    assert [config.steps for config in tiny] == [40, 41]
    given = TrainingConfig(model=MODEL, learning_rate=0.5, validation_share=0.0, steps=7)
    given = given.resolved(rows=3200, scale=1.0, dtype="float32")
    assert (given.learning_rate, given.steps, given.validation_share) == (0.5, 7, 0.0)


def test_the_article_and_the_shipped_model_keep_their_settings():
    article = TrainingConfig(model=MODEL, recipe="article").with_recipe()
    article = article.resolved(rows=5000, scale=9.0, dtype="float32")
    assert (article.template, article.end_token) == ("{text_column} : {text} Label : ", "pad")
    assert (article.learning_rate, article.epochs, article.steps) == (0.03, 50, None)
    assert article.compute.batch_size == 8
    assert (article.start, article.num_virtual_tokens, article.max_length) == ("text", 8, 64)
    assert template_of(article, None) == ("{text_column} : {text} Label : ", None)
    shipped = TrainingConfig().with_recipe()
    assert (shipped.end_token, shipped.epochs, shipped.num_virtual_tokens) == ("eos", 10, 8)
    typed = TrainingConfig(num_virtual_tokens=3, argv=["train", "--num-virtual-tokens", "3"]).with_recipe()
    assert typed.num_virtual_tokens == 3


@pytest.mark.parametrize(
    "template, prefix, expected",
    [
        ("{text} Label : ", None, ("{text} Label :", " ")),
        ("{text}\nLabel:\n", None, ("{text}\nLabel:\n", "")),
        ("{text} Label : ", "", ("{text} Label : ", None)),
        ("{text} Label :", "\n", ("{text} Label :", "\n")),
    ],
)
def test_the_space_before_a_label_belongs_to_it(template, prefix, expected):
    config = TrainingConfig(model=MODEL, template=template, label_prefix=prefix)
    assert template_of(config, None) == expected


def test_the_prompt_starts_at_the_answers(train, model_folder, tokenizer, tmp_path):
    code, _, err = train("--num-virtual-tokens", 16)
    assert code == 0
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    import numpy as np

    start = torch.from_numpy(np.load(tmp_path / "out" / "initial_prompt.npy"))
    answers = [" Label : complaint", " Label : no complaint"]
    ids = [i for answer in answers for i in [*tokenizer(answer)["input_ids"], tokenizer.eos_token_id]]
    embeddings = base.get_input_embeddings().weight.detach()
    assert torch.equal(start, embeddings[(ids * 16)[-16:]])
    written = tokenizer.decode(ids)
    assert f"the prompt starts at the answers, {written!r}, repeated to 16 tokens" in err
    training = json.loads((tmp_path / "out" / "softprompt.json").read_text())["training"]
    assert training["learning_rate"] == float(f"{0.25 * scale_of(base):.2g}")
    assert training["init"] == "answers"


def test_the_words_of_the_labels_are_another_start(train, tmp_path, tokenizer):
    code, _, err = train("--num-virtual-tokens", 7, "--init", "label-words")
    assert code == 0
    words = tokenizer.decode(tokenizer(" complaint no complaint")["input_ids"])
    assert f"the prompt starts at the words of the labels, {words!r}, repeated to 7 tokens" in err


def test_answers_are_cut_at_their_front_or_shuffled(model):
    table = model.get_input_embeddings().weight.detach()
    ids = [[5, 6, 7], [8, 9]]
    assert torch.equal(init.answers(model, 2, ids), table[[8, 9]])
    assert torch.equal(init.answers(model, 4, ids), table[[6, 7, 8, 9]])
    assert torch.equal(init.answers(model, 8, ids), table[[7, 8, 9, 5, 6, 7, 8, 9]])
    many = [[number, number + 100] for number in range(20)]
    drawn = [init.answers(model, 40, many, order=order) for order in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    rows = [tuple(row) for row in drawn[2].reshape(20, -1).tolist()]
    assert sorted(rows) == sorted(tuple(row) for row in table[torch.tensor(many)].reshape(20, -1).tolist())
    for none in ([], [[], []]):
        with pytest.raises(ValueError, match="expected the token ids of one answer or more, got none"):
            init.answers(model, 2, none)


def test_label_words_are_cut_or_drawn(model, tokenizer):
    ids = tokenizer(" complaint")["input_ids"] + tokenizer(" no complaint")["input_ids"]
    table = model.get_input_embeddings().weight.detach()
    labels = ["complaint", "no complaint"]
    cut = init.label_words(model, 2, tokenizer, labels)
    assert torch.equal(cut, table[ids[:2]])
    drawn = [init.label_words(model, 12, tokenizer, labels, order=order) for order in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    rows = {tuple(row) for row in table[ids].tolist()}
    assert all(tuple(row) in rows for row in drawn[0].tolist())
    with pytest.raises(ValueError, match="expected a sequence of one label or more"):
        init.label_words(model, 2, tokenizer, "complaint")


def test_the_scale_is_the_root_mean_square_of_the_embeddings(model):
    table = model.get_input_embeddings().weight.detach().double()
    assert scale_of(model) == pytest.approx(float(table.square().mean().sqrt()), rel=1e-6)


def test_a_run_says_what_the_model_sees_and_what_it_is_compared_with(train, tmp_path, read_json):
    code, out, err = train()
    assert code == 0
    assert "the first row as the model sees it: 50 virtual tokens, 'Tweet text : my order never came" in err
    assert "and to be learned ' complaint</s>'" in err
    assert "4 steps are few for a soft prompt" in err
    assert "4 steps of 16 rows: 4 passes over 16 rows" in err
    metrics = read_json(tmp_path / "out" / "metrics.json")
    assert metrics["majority"] == {
        "label": "complaint",
        "exact_match": 0.5,
        "macro_f1": pytest.approx(1 / 3),
    }
    assert metrics["zero_shot"]["rows"] == 4
    assert 0 <= metrics["train_exact_match"] <= 1
    assert [e["step"] for e in metrics["history"] if "eval_loss" in e] == [0, 1, 2, 3, 4]
    assert "accuracy in training" in out


def test_a_first_loss_above_guessing_is_said():
    assert loss_note(6.9, 1000) is None
    assert "the first loss, 7.0 nats per token, is above that of guessing among all 1,000" in loss_note(
        7.0, 1000
    )


def metrics_of(**changed):
    scores = {
        "eval_exact_match": 0.8,
        "eval_rows": 1000,
        "eval_predicted": {"a": 500, "b": 500},
        "train_exact_match": 0.85,
        "majority": {"label": "a", "exact_match": 0.5},
    }
    return {**scores, **changed}


@pytest.mark.parametrize(
    "changed, said",
    [
        ({}, None),
        ({"eval_exact_match": None}, None),
        ({"eval_exact_match": 0.5, "eval_predicted": {"a": 1000}, "train_exact_match": 0.5}, "all 1,000 "),
        (
            {"eval_exact_match": 0.49, "train_exact_match": 0.5},
            "not clearly above that of always answering 'a'",
        ),
        ({"eval_exact_match": 0.6, "eval_rows": 10, "train_exact_match": 0.6}, "not clearly above"),
        ({"train_exact_match": 1.0}, "the prompt has learned its rows by heart"),
        ({"train_exact_match": 0.95, "eval_rows": 20}, None),
    ],
)
def test_a_result_that_is_none_is_said(changed, said):
    notes = result_notes(metrics_of(**changed))
    assert len(notes) == (said is not None)
    assert said is None or said in notes[0]


@pytest.mark.parametrize(
    "fast, asked, tiny, expected",
    [
        (True, "auto", False, torch.bfloat16),
        (True, "auto", True, torch.float32),
        (True, "float32", False, torch.float32),
        (False, "auto", False, torch.float32),
        (False, "bfloat16", False, torch.bfloat16),
    ],
)
def test_auto_is_bfloat16_where_the_machine_multiplies_it(monkeypatch, fast, asked, tiny, expected):
    monkeypatch.setattr(models, "has_fast_bf16", lambda device: fast)
    assert models.choose_dtype(asked, "cpu", tiny=tiny) == expected


def test_the_processor_says_whether_it_multiplies_bfloat16(monkeypatch):
    monkeypatch.undo()
    for name, expected in (("amx_bf16", True), ("avx512_bf16", True), ("avx2", False)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda name=name: {name: True, "amx_tile": False})
        assert models.has_fast_bf16("cpu") is expected


def test_a_resumed_run_goes_on_in_its_dtype(train, monkeypatch, tmp_path):
    monkeypatch.setattr(models, "has_fast_bf16", lambda device: True)
    assert train()[0] == 0
    assert load_task(tmp_path / "out")[2]["dtype"] == "bfloat16"
    monkeypatch.setattr(models, "has_fast_bf16", lambda device: False)
    assert train("--resume")[0] == 0
    code, _, err = train("--resume", "--dtype", "float32")
    assert code == 2
    assert "--dtype is 'float32', but the checkpoint was trained with 'bfloat16'" in err


def test_flags_of_old_adapters_are_read_as_a_dtype(train, tmp_path, read_json):
    assert train()[0] == 0
    path = tmp_path / "out" / "softprompt.json"
    content = read_json(path)
    assert content["training"].pop("dtype") == "float32"
    content["training"] |= {"bf16": True, "fp16": False}
    path.write_text(json.dumps(content))
    assert load_task(tmp_path / "out")[2]["dtype"] == "bfloat16"


def test_predict_takes_the_dtype_of_the_training(train, run, table, tmp_path, monkeypatch):
    assert train("--bf16")[0] == 0
    loaded = []
    load = models.load_model
    monkeypatch.setattr(models, "load_model", lambda name, dtype: loaded.append(dtype) or load(name, dtype))
    output = tmp_path / "labelled.csv"
    assert run("predict", "--adapter", tmp_path / "out", "--data", table, "--output", output)[0] == 0
    assert loaded == [torch.bfloat16]


def test_what_is_generated_is_free(train, run, table, tmp_path):
    assert train()[0] == 0
    arguments = ("--adapter", tmp_path / "out", "--data", table, "--output", tmp_path / "labelled.csv")
    code, out, _ = run("predict", "--generate", *arguments)
    assert code == 0
    assert "20 rows labelled in" in out
    code, _, err = run("predict", "--generate", "--score", "--overwrite", *arguments)
    assert code == 2
    assert "leave --generate out" in err


CHAT = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|> {{ m.content | trim }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


@pytest.fixture
def chat_folder(model_folder, tmp_path):
    """The model with a tokenizer that has a chat template."""
    folder = tmp_path / "chat"
    shutil.copytree(model_folder, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    return folder


def test_a_chat_is_the_format_of_the_model(train, run, table, chat_folder, tmp_path):
    code, _, err = train("--chat-template", "--model", chat_folder, "--template", "{text}, {{label}}? ")
    assert code == 0
    task = load_task(tmp_path / "out")[0]
    # The tokenizer puts no BOS before a text, so the one of the chat stays.
    assert task.template == "<s><|user|> {text}, {{label}}?\n<|assistant|>\n"
    tokenizer = AutoTokenizer.from_pretrained(chat_folder)
    message = [{"role": "user", "content": "my order never came, {label}?"}]
    ids = tokenizer.apply_chat_template(message, add_generation_prompt=True)["input_ids"]
    encoder = Encoder(task, tokenizer)
    assert encoder.prompt("my order never came") == ids
    assert encoder.targets["complaint"] == [*tokenizer("complaint")["input_ids"], tokenizer.eos_token_id]
    assert "<|assistant|>\\n', and to be learned 'complaint</s>'" in err.replace("\\\\n", "\\n")
    output = tmp_path / "labelled.csv"
    assert run("predict", "--adapter", tmp_path / "out", "--data", table, "--output", output)[0] == 0


def test_a_chat_has_one_bos(chat_folder):
    class AddsBos:
        def __init__(self, tokenizer):
            self.tokenizer = tokenizer

        def __getattr__(self, name):
            return getattr(self.tokenizer, name)

        def __call__(self, text):
            return {"input_ids": [self.bos_token_id, *self.tokenizer(text)["input_ids"]]}

    config = TrainingConfig(model=MODEL, chat_template=True, template="{text}")
    tokenizer = AutoTokenizer.from_pretrained(chat_folder)
    assert template_of(config, AddsBos(tokenizer)) == ("<|user|> {text}\n<|assistant|>\n", "")
    assert template_of(config, tokenizer) == ("<s><|user|> {text}\n<|assistant|>\n", "")


def test_a_chat_with_the_date_is_the_same_on_every_day(chat_folder):
    tokenizer = AutoTokenizer.from_pretrained(chat_folder)
    config = TrainingConfig(model=MODEL, chat_template=True, template="{text}")
    for form in ("%d %b %Y", "%Y-%m-%d", "%A, %B %e"):
        tokenizer.chat_template = (
            f"\n{{% if strftime_now is defined %}}{{{{ strftime_now('{form}') }}}}{{% endif %}}: {CHAT}"
        )
        assert template_of(config, tokenizer)[0] == (
            f"\n{DAY_OF_CHATS.strftime(form)}: <s><|user|> {{text}}\n<|assistant|>\n"
        )


@pytest.mark.parametrize(
    "chat, said",
    [
        (None, "has no chat template"),
        ("{{ raise_exception('system first') }}", "takes no message of a user alone (system first)"),
        ("{{ bos_token }}", "does not put a message into the chat once"),
    ],
)
def test_a_chat_that_cannot_be_made_is_one_line(train, chat_folder, chat, said):
    tokenizer = AutoTokenizer.from_pretrained(chat_folder)
    tokenizer.chat_template = chat
    if chat is None:
        (chat_folder / "chat_template.jinja").unlink()
    tokenizer.save_pretrained(chat_folder)
    code, _, err = train("--chat-template", "--model", chat_folder)
    assert code == 2
    assert "softprompt: --chat-template: the model's" in err
    assert said in err.splitlines()[-1]


def test_rarer_labels_are_drawn_as_often(train, tmp_path, monkeypatch, read_json):
    from softprompt.tasks.trainer import PromptTrainer

    drawn = []
    step = PromptTrainer.training_step

    def keeping(self, model, inputs, *more):
        drawn.extend(inputs["labels"].tolist())
        return step(self, model, inputs, *more)

    monkeypatch.setattr(PromptTrainer, "training_step", keeping)
    code, _, err = train("--balance-labels", "--batch-size", 10, "--steps", 2)
    assert code == 0
    assert "rows of rarer labels are drawn again: a pass has 20 rows, made of 16" in err
    lengths = [sum(label != -100 for label in labels) for labels in drawn]
    assert len(drawn) == 20
    assert sorted(map(lengths.count, set(lengths))) == [10, 10]
    metrics = read_json(tmp_path / "out" / "metrics.json")
    assert (metrics["train_rows"], metrics["majority"]["label"]) == (16, "complaint")
    code, _, err = train("--resume", "--batch-size", 10, "--steps", 2)
    assert code == 2
    assert "the training rows are not those of the checkpoint" in err


def test_targets_are_not_balanced(train):
    code, _, err = train("--balance-labels", "--task", "generate")
    assert code == 2
    assert "--balance-labels is for --task classify" in err
