"""`softprompt train --task generate`, and `softprompt predict` with what it leaves."""

import csv
import os
import signal

import numpy as np
import pytest
import torch
from peft import PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from softprompt.tasks.classification import Encoder, load_task
from softprompt.tasks.metrics import text_scores
from softprompt.tasks.plot import draw_training

ANSWERS = ("thanks for the help", "my order never came", "see you", "the app crashes again")
ROWS = [(f"tell me what is new {number}", f"{ANSWERS[number % 4]} {number}") for number in range(24)]
NOTE = (
    "softprompt: 24 rows with 24 different targets in column 'answer': trained as a generation task "
    "(--task generate); give --task classify if they are labels\n"
)


@pytest.fixture
def train(run, make_table, model_folder, tmp_path):
    def call(*more, output="out", rows=ROWS, **options):
        data = make_table(rows, "answers.csv", ("question", "answer"))
        options = {
            "--data": data,
            "--text-column": "question",
            "--label-column": "answer",
            "--model": model_folder,
            "--output": tmp_path / output,
            "--num-virtual-tokens": 4,
            "--steps": 4,
        } | options
        return run("train", *(item for option in options.items() for item in option), *more)

    return call


@pytest.fixture(scope="module")
def trained(model_folder, tmp_path_factory):
    """The folder of a run whose targets are cut, and the table that it was trained on."""
    from softprompt.cli import main

    folder = tmp_path_factory.mktemp("trained")
    with (folder / "answers.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("question", "answer"), *ROWS])
    names = {"--text-column": "question", "--label-column": "answer", "--max-new-tokens": 5, "--steps": 2}
    files = {"--data": folder / "answers.csv", "--model": model_folder, "--output": folder / "out"}
    arguments = [item for option in {**names, **files}.items() for item in option]
    assert main(["train", *map(str, arguments)]) == 0
    return folder


@pytest.fixture
def predict(run, trained, tmp_path):
    def call(*more, adapter=trained / "out", data=trained / "answers.csv"):
        return run(
            "predict", "--adapter", adapter, "--data", data, "--output", tmp_path / "written.csv", *more
        )

    return call


def written_in(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_table_of_targets_that_are_all_different_is_a_generation_task(train, tmp_path, read_json):
    code, out, err = train()
    assert code == 0
    assert NOTE in err
    assert "softprompt: 24 rows with targets: 19 for training, 5 for evaluation\n" in err
    assert "the prompt starts at tokens of the training texts (--init counted)" in err
    task = load_task(tmp_path / "out")[0]
    assert task.generates
    assert task.template == "{text_column}: {text}\nanswer:"
    assert read_json(tmp_path / "out" / "softprompt.json")["training"]["init"] == "counted"
    assert "ROUGE-L" in out
    assert "accuracy" not in out + err
    metrics = read_json(tmp_path / "out" / "metrics.json")
    assert (metrics["train_rows"], metrics["eval_rows"], metrics["eval_written_rows"]) == (19, 5, 5)
    assert not {"majority", "eval_macro_f1", "eval_predicted"} & set(metrics)
    assert 0 <= metrics["eval_rouge_l"] <= 1
    assert metrics["zero_shot"]["rows"] == 5
    assert len(metrics["eval_samples"]) == 5
    for sample in metrics["eval_samples"]:
        assert (sample["text"], sample["target"]) in ROWS
    shown = metrics["eval_samples"][0]
    assert f"    text: {shown['text']}\n  target: {shown['target']}\n written: " in out
    assert "step 4: loss " in err


@pytest.mark.parametrize(
    "rows, more",
    [(ROWS[:19], ()), ([*ROWS, ROWS[0]], ()), (ROWS, ("--task", "classify"))],
    ids=["few rows", "a target twice", "--task classify"],
)
def test_other_tables_are_labels(train, tmp_path, rows, more):
    code, _, err = train("--eval-share", 0, *more, rows=rows)
    assert code == 0
    assert "generation" not in err
    assert ("different labels in column 'answer': give --task generate if" in err) is (more == ())
    assert not load_task(tmp_path / "out")[0].generates


def test_a_generation_task_can_be_asked_for(train, tmp_path):
    code, _, err = train("--task", "generate", "--eval-share", 0, rows=[*ROWS[:8], ROWS[0]])
    assert code == 0
    assert "generation task" not in err
    assert load_task(tmp_path / "out")[0].generates


def test_the_room_for_a_target_is_that_of_the_longest_training_target(train, tmp_path, model_folder):
    longer = [*ROWS[:-1], ("tell me what is new", "no answer from support " * 4)]
    code, _, err = train("--eval-share", 0, rows=longer)
    assert code == 0
    task, tokenizer = load_task(tmp_path / "out")[0], AutoTokenizer.from_pretrained(model_folder)
    encoder = Encoder(task, tokenizer)
    lengths = encoder.target_lengths([target.strip() for _, target in longer])
    assert task.max_new_tokens == max(lengths)
    texts = encoder.lengths([text for text, _ in longer])
    assert task.max_length == max(texts) + max(lengths)
    assert f"and {max(lengths)} at most, the end token included; the prompt is trained to write up to" in err
    assert "lose their end" not in err


def test_targets_that_are_cut_are_counted(train, tmp_path, model_folder):
    _, _, err = train("--eval-share", 0, **{"--max-new-tokens": 8})
    task = load_task(tmp_path / "out")[0]
    encoder = Encoder(task, AutoTokenizer.from_pretrained(model_folder))
    lengths = encoder.target_lengths([target for _, target in ROWS])
    cut = sum(length > 8 for length in lengths)
    assert 0 < cut < 24, lengths
    assert f"{cut} of 24 targets are longer than the 8 tokens of --max-new-tokens and lose their end" in err
    assert all(len(encoder.target(target)) <= 8 for _, target in ROWS)


def test_the_loss_of_the_first_step_is_that_of_pefts_forward(train, tmp_path, model_folder, read_json):
    train("--eval-share", 0, **{"--batch-size": 24, "--steps": 1, "--max-new-tokens": 6})
    encoder = Encoder(load_task(tmp_path / "out")[0], AutoTokenizer.from_pretrained(model_folder))
    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    model = get_peft_model(base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    start = torch.from_numpy(np.load(tmp_path / "out" / "initial_prompt.npy"))
    with torch.no_grad():
        model.prompt_encoder["default"].embedding.weight.copy_(start)
        total = count = 0
        for text, target in ROWS:
            example = {name: torch.tensor([ids]) for name, ids in encoder.example(text, target).items()}
            tokens = int((example["labels"] != -100).sum())
            total, count = total + model(**example).loss.item() * tokens, count + tokens
    history = read_json(tmp_path / "out" / "metrics.json")["history"]
    assert history[0]["loss"] == pytest.approx(total / count, rel=1e-5)


def test_the_shipped_model_takes_targets_that_are_longer_than_its_own_rows(run, make_table, tmp_path):
    rows = [(text, f"{target} {'and again ' * 40}") for text, target in ROWS]
    data = make_table(rows, "long.csv", ("question", "answer"))
    names = ("--text-column", "question", "--label-column", "answer")
    code, _, err = run(
        "train", "--data", data, *names, "--epochs", 1, "--eval-share", 0, "--output", tmp_path
    )
    assert code == 0, err
    assert load_task(tmp_path)[0].max_length > 64


@pytest.mark.parametrize("more", [(), ("--no-patch",), ("--positions", "padded")])
def test_a_model_that_cannot_be_packed_is_trained_and_measured(
    train, tmp_path, read_json, unpacked_folder, more
):
    code, _, err = train(*more, **{"--model": unpacked_folder})
    assert code == 0, err
    metrics = read_json(tmp_path / "out" / "metrics.json")
    assert metrics["eval_loss"] < metrics["zero_shot"]["loss"]


@pytest.mark.parametrize(
    "more, message",
    [
        (("--init", "label-words"), "--init label-words starts at the labels, and --task generate has none"),
        (("--init", "labels"), "--init labels starts at the labels, and --task generate has none"),
        (("--task", "classify", "--max-new-tokens", 4), "--max-new-tokens is for --task generate"),
        (("--task", "generate", "--label-map", "see you 2=a"), "--label-map is for --task classify"),
        (("--max-new-tokens", 0), "must be at least 1, got 0"),
        (("--max-length", 6, "--max-new-tokens", 5), "the longest target 5 with its end token"),
    ],
)
def test_options_that_do_not_go_with_the_task_are_one_line(train, more, message):
    code, _, err = train(*more)
    assert code == 2
    assert message in err.splitlines()[-1]


def test_a_sweep_of_generation_tasks_is_refused(run, make_table, model_folder, tmp_path):
    data = make_table(ROWS, "answers.csv", ("question", "answer"))
    names = ("--text-column", "question", "--label-column", "answer", "--model", model_folder)
    over = ("--over", "num-virtual-tokens", 1, 2, "--output", tmp_path / "sweep")
    code, _, err = run("sweep", "--data", data, *names, *over)
    assert code == 2
    assert "a sweep compares accuracies, and generated texts have none: use softprompt train" in err


def test_a_resumed_run_ends_as_an_uninterrupted_one(train, tmp_path, monkeypatch):
    from softprompt.tasks.trainer import PromptTrainer

    assert train(output="whole", **{"--steps": 10})[0] == 0
    training_step = PromptTrainer.training_step

    def with_signal(self, *args, **kwargs):
        if self.state.global_step == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return training_step(self, *args, **kwargs)

    monkeypatch.setattr(PromptTrainer, "training_step", with_signal)
    assert train(output="parts", **{"--steps": 10})[0] == 130
    monkeypatch.undo()
    code, _, err = train(
        "--resume", "--task", "classify", "--eval-share", 0, output="parts", **{"--steps": 10}
    )
    assert code == 2
    assert "--task is 'classify', but the checkpoint was trained with 'generate'" in err
    assert train("--resume", output="parts", **{"--steps": 10})[0] == 0
    whole, parts = (
        load_file(tmp_path / name / "adapter_model.safetensors")["prompt_embeddings"]
        for name in ("whole", "parts")
    )
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-6)


def test_what_is_written_stands_beside_its_row(predict, trained, tmp_path, model_folder):
    code, out, err = predict("--batch-size", 5)
    assert (code, err) == (0, "")
    assert "24 texts written in " in out
    rows = written_in(tmp_path / "written.csv")
    assert [(row["question"], row["answer"]) for row in rows] == ROWS
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    encoder = Encoder(load_task(trained / "out")[0], tokenizer)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_folder), trained / "out")
    for (text, _), row in zip(ROWS, rows, strict=True):
        ids = torch.tensor([encoder.prompt(text)])
        generated = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=5,
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )[0, ids.shape[1] :]
        assert row["prediction"] == tokenizer.decode(generated, skip_special_tokens=True).strip()


def test_what_is_written_is_measured_where_there_are_targets(predict, tmp_path, read_json, make_table):
    _, out, _ = predict()
    rows = written_in(tmp_path / "written.csv")
    scores = text_scores([row["prediction"] for row in rows], [row["answer"] for row in rows])
    assert read_json(tmp_path / "written.metrics.json") == {"rows": 24, **scores}
    assert f"ROUGE-L {scores['rouge_l']:.3f}, BLEU {scores['bleu']:.1f}" in out
    assert not (tmp_path / "written.confusion.png").exists()
    no_targets = make_table([(text,) for text, _ in ROWS], "new.csv", ("question",))
    _, out, _ = predict("--overwrite", data=no_targets)
    assert "ROUGE-L" not in out
    assert not (tmp_path / "written.metrics.json").exists()


def test_a_longer_text_may_be_written_than_in_training(predict, tmp_path):
    predict()
    short = [row["prediction"] for row in written_in(tmp_path / "written.csv")]
    predict("--overwrite", "--max-new-tokens", 9)
    longer = [row["prediction"] for row in written_in(tmp_path / "written.csv")]
    assert all(b.startswith(a) for a, b in zip(short, longer, strict=True))
    assert longer != short


@pytest.mark.parametrize(
    "option, message",
    [
        (("--score",), "--score is for labels, and"),
        (("--calibrate",), "--calibrate is for labels, and"),
        (("--length-normalise",), "--length-normalise is for labels, and"),
        (("--combine", "mean"), "--combine says how the prompts of an ensemble decide"),
    ],
)
def test_options_for_labels_are_refused_in_one_line(predict, option, message):
    code, _, err = predict(*option)
    assert code == 2
    assert message in err
    assert err.count("\n") == 1


def test_an_adapter_that_labels_takes_no_length(run, table, model_folder, tmp_path):
    run("train", "--data", table, "--model", model_folder, "--steps", 1, "--output", tmp_path / "labels")
    written = ("--output", tmp_path / "w.csv", "--max-new-tokens", 4)
    code, _, err = run("predict", "--adapter", tmp_path / "labels", "--data", table, *written)
    assert code == 2
    assert "--max-new-tokens is for prompts of --task generate" in err


def test_an_ensemble_is_trained_and_each_of_its_prompts_writes(train, predict, tmp_path, read_json):
    assert train("--ensemble", 2, output="both")[0] == 0
    metrics = read_json(tmp_path / "both" / "metrics.json")
    assert metrics["eval_rouge_l"] == pytest.approx(sum(metrics["eval_prompt_rouge_l"]) / 2)
    code, _, err = predict(adapter=tmp_path / "both")
    assert code == 2
    assert "holds 2 prompts that write texts, which cannot be combined: name one of them" in err
    assert predict(adapter=tmp_path / "both" / "prompt-2")[0] == 0


@pytest.mark.usefixtures("rendered")
def test_the_figure_shows_what_is_written(tmp_path):
    history = [{"step": 1, "loss": 2.0}, {"step": 1, "eval_loss": 2.0}]
    scores = {"exact_match": 0.1, "rouge_l": 0.3, "bleu": 4.0, "rows": 3}
    metrics = {f"eval_{name}": value for name, value in scores.items()} | {"eval_written_rows": 3}
    for zero_shot in (scores, None):
        draw_training({**metrics, "history": history, "zero_shot": zero_shot}, tmp_path / "training.png")
        assert (tmp_path / "training.png").stat().st_size > 10_000


def test_the_prompt_with_the_lowest_validation_loss_is_kept_and_measured_on_another_table(
    train, make_table, tmp_path, read_json
):
    others = make_table([("what is new", "nothing"), ("and now", "nothing")], "e.csv", ("question", "answer"))
    watched = {"--validation-share": 0.25, "--learning-rate": 100, "--steps": 10}
    code, _, err = train(**{"--eval-data": others}, **watched)
    assert code == 0, err
    assert "26 rows with targets: 18 for training, 2 for evaluation, 6 for validation" in err
    assert "on 6 validation rows" in err
    metrics = read_json(tmp_path / "out" / "metrics.json")
    assert metrics["eval_written_rows"] == metrics["zero_shot"]["rows"] == 2
    losses = {e["step"]: e["eval_validation_loss"] for e in metrics["history"] if "eval_validation_loss" in e}
    assert metrics["best_step"] == min(losses, key=losses.get)
