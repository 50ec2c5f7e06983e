import math
import re
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

PAGE = Path(__file__).parents[2] / "docs" / "train.md"
RAFT = Path("../shared/data/raft/twitter_complaints/train.csv")


@pytest.fixture
def train(run, table, model_folder, tmp_path):
    """Train on the small table; options given replace those here."""

    def call(*more, **options):
        options = {
            "--data": table,
            "--model": model_folder,
            "--output": tmp_path / "out",
            "--epochs": 1,
            "--batch-size": 8,
        } | options
        pairs = [item for option in options.items() for item in option]
        return run("train", "--no-patch", *pairs, *more)

    return call


@pytest.fixture(scope="module")
def usual_prompt(model_folder, make_tweets, tmp_path_factory):
    """The prompt after one epoch in batches of 8 with every other option at its default."""
    from softprompt.cli import main

    folder = tmp_path_factory.mktemp("usual")
    arguments = ["train", "--no-patch", "--model", model_folder, "--data", make_tweets(folder), "--epochs", 1]
    arguments += ["--batch-size", 8]
    assert main([str(item) for item in [*arguments, "--output", folder / "out", "--eval-share", 0]]) == 0
    return prompt_in(folder / "out")


def train_with(train, option, value):
    return train(**{option: value})


def prompt_in(folder):
    return load_file(folder / "adapter_model.safetensors")["prompt_embeddings"]


@pytest.mark.usefixtures("rendered")
def test_a_run_saves_an_adapter_that_peft_loads_bit_equal(train, model_folder, tmp_path, read_json):
    code, out, err = train(**{"--epochs": 3})
    folder = tmp_path / "out"
    assert code == 0
    assert "Soft prompt trained" in out
    assert "step 6: accuracy" in err
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    loaded = PeftModel.from_pretrained(base, folder)
    assert torch.equal(loaded.prompt_encoder["default"].embedding.weight, prompt_in(folder))
    assert sorted(path.name for path in folder.iterdir()) == [
        ".lock",
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "checkpoint-4",
        "checkpoint-6",
        "initial_prompt.npy",
        "metrics.json",
        "softprompt.json",
        "training.png",
    ]
    assert (folder / "training.png").read_bytes().startswith(b"\x89PNG")
    assert torch.equal(prompt_in(folder / "checkpoint-6"), prompt_in(folder))
    metrics = read_json(folder / "metrics.json")
    assert (metrics["train_rows"], metrics["eval_rows"], metrics["steps"]) == (16, 4, 6)
    evaluations = [entry for entry in metrics["history"] if "eval_loss" in entry]
    assert [entry["step"] for entry in evaluations] == [0, 2, 4, 6]
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(metrics["eval_loss"]))
    assert evaluations[-1]["eval_loss"] < evaluations[0]["eval_loss"]


def test_the_evaluation_loss_is_that_of_the_loaded_adapter(
    train, model_folder, make_table, tmp_path, read_json
):
    rows = [("where is it", "complaint"), ("a fine day", "no complaint"), ("it broke", "complaint")]
    train(**{"--eval-data": make_table(rows, "eval.csv"), "--batch-size": 2})
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_folder), tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    total, count = 0.0, 0
    for text, label in rows:
        prompt = tokenizer(f"Tweet text : {text} Label :")["input_ids"]
        target = [*tokenizer(f" {label}")["input_ids"], tokenizer.eos_token_id]
        labels = torch.tensor([[-100] * len(prompt) + target])
        total += model(input_ids=torch.tensor([prompt + target]), labels=labels).loss.item() * len(target)
        count += len(target)
    metrics = read_json(tmp_path / "out" / "metrics.json")
    assert metrics["eval_rows"] == 3
    assert metrics["train_rows"] == 20
    assert metrics["eval_loss"] == pytest.approx(total / count, rel=1e-5)


def test_the_prompt_starts_at_the_embeddings_of_the_init_text(train, model_folder, tmp_path):
    train(
        **{
            "--learning-rate": 1e-30,
            "--weight-decay": 0,
            "--num-virtual-tokens": 3,
            "--init-text": "no order",
        }
    )
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    ids = (tokenizer("no order")["input_ids"] * 3)[:3]
    embeddings = AutoModelForCausalLM.from_pretrained(model_folder).get_input_embeddings().weight
    torch.testing.assert_close(prompt_in(tmp_path / "out"), embeddings[ids].detach(), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "option, value",
    [
        ("--optimizer", "adafactor"),
        ("--seed", 7),
        ("--init", "vocab"),
        ("--init", "random"),
        ("--padding", "longest"),
        ("--template", "{text} => "),
        ("--weight-decay", 0.5),
    ],
)
def test_every_training_option_changes_the_prompt(train, tmp_path, usual_prompt, option, value):
    assert train(**{option: value, "--eval-share": 0})[0] == 0
    prompt = prompt_in(tmp_path / "out")
    if option == "--padding":  # BLOOM counts no pads, so the prompt is the same up to rounding
        torch.testing.assert_close(prompt, usual_prompt, rtol=1e-4, atol=1e-5)
    else:
        assert not torch.allclose(prompt, usual_prompt)


def test_the_same_run_gives_the_same_prompt(train, tmp_path, usual_prompt):
    assert train(**{"--eval-share": 0})[0] == 0
    assert torch.equal(prompt_in(tmp_path / "out"), usual_prompt)


def test_bf16_keeps_the_prompt_in_float32(train, tmp_path):
    assert train("--bf16")[0] == 0
    prompt = prompt_in(tmp_path / "out")
    assert prompt.dtype == torch.float32
    assert not torch.equal(prompt, prompt.bfloat16().float())


def test_without_an_evaluation_share_nothing_is_measured(train, tmp_path, read_json):
    assert train(**{"--eval-share": 0})[0] == 0
    metrics = read_json(tmp_path / "out" / "metrics.json")
    assert (metrics["train_rows"], metrics["eval_rows"], metrics["eval_exact_match"]) == (20, 0, None)


def test_the_articles_table_trains(train, tmp_path, read_json):
    if not RAFT.is_file():
        pytest.skip(f"{RAFT} is not there")
    code, *_ = train("--text-column", "Tweet text", "--label-column", "Label", **{"--data": RAFT})
    assert code == 0
    metrics = read_json(tmp_path / "out" / "metrics.json")
    assert (metrics["train_rows"], metrics["eval_rows"]) == (40, 10)
    assert read_json(tmp_path / "out" / "softprompt.json")["labels"] == ["complaint", "no complaint"]


BAD_TABLES = {
    "missing column": (
        [("a", "x")],
        ("Tweet", "Label"),
        "has no column 'Tweet text'; its columns are 'Tweet', 'Label'",
    ),
    "empty table": ([], ("Tweet text", "Label"), "has no rows: give a table with at least one"),
    "empty text": (
        [("a", "x"), ("", "y")],
        ("Tweet text", "Label"),
        "row 2 (counted from 1, without the header)",
    ),
    "empty label": ([("a", "x"), ("b", "")], ("Tweet text", "Label"), "has an empty label in column 'Label'"),
}


@pytest.mark.parametrize("rows, header, message", BAD_TABLES.values(), ids=BAD_TABLES)
def test_a_bad_table_is_one_line_and_writes_nothing(train, make_table, tmp_path, rows, header, message):
    check_refused(train_with(train, "--data", make_table(rows, header=header)), message, tmp_path / "out")


@pytest.mark.parametrize(
    "option, value, message",
    [
        ("--data", "nowhere.csv", "nowhere.csv does not exist: check the path of the table"),
        ("--eval-data", "nowhere.csv", "nowhere.csv does not exist: check the path of the table"),
        (
            "--model",
            "./nowhere",
            "the model ./nowhere is not a folder: give a model folder or the name of a model",
        ),
        ("--max-length", 9, "max_length 9 is too small: the template takes"),
        ("--template", "no place", "the template 'no place' must contain {text} exactly once"),
    ],
)
def test_a_bad_value_is_one_line_and_writes_nothing(train, tmp_path, option, value, message):
    check_refused(train_with(train, option, value), message, tmp_path / "out")


def test_a_table_of_an_unknown_type_is_one_line(train, tmp_path):
    path = tmp_path / "tweets.docx"
    path.write_bytes(b"x")
    check_refused(
        train_with(train, "--data", path), "is of the unknown type '.docx': give one of", tmp_path / "out"
    )


def test_a_label_unknown_in_training_is_one_line(train, make_table, tmp_path):
    path = make_table([("a", "complaint"), ("b", "praise")], "eval.csv")
    message = "row 2 has the label 'praise', which no training row has (known: 'complaint', 'no complaint')"
    check_refused(train_with(train, "--eval-data", path), message, tmp_path / "out")


@pytest.mark.parametrize(
    "files, message",
    [
        ((), "has no config.json: give a folder saved by save_pretrained"),
        (("config.json",), "has no weights (*.safet"),
    ],
)
def test_a_model_folder_without_its_files_is_one_line(train, tmp_path, model_folder, files, message):
    folder = tmp_path / "model"
    folder.mkdir()
    for name in files:
        (folder / name).write_bytes((model_folder / name).read_bytes())
    check_refused(train_with(train, "--model", folder), message, tmp_path / "out")


def test_a_model_name_that_cannot_be_loaded_is_one_line(train, tmp_path):
    check_refused(train_with(train, "--model", "nobody/nothing"), "cannot load", tmp_path / "out")


def test_fp16_without_a_gpu_is_one_line(train, tmp_path):
    check_refused(
        train("--fp16", "--device", "cpu"), "--dtype float16 needs a GPU; use bfloat16 or", tmp_path / "out"
    )


@pytest.mark.parametrize("kind", ["adapter_config.json", "checkpoint-3"])
def test_an_output_folder_with_an_adapter_is_left_alone(train, tmp_path, kind):
    folder = tmp_path / "out"
    folder.mkdir()
    if kind == "checkpoint-3":
        (folder / kind).mkdir()
    else:
        (folder / kind).write_text("precious")
    before = [(path.name, path.stat().st_mtime_ns) for path in folder.iterdir()]
    code, _, err = train()
    assert code == 2
    assert f"{folder} holds an adapter already: name another --output, replace it with --overwrite" in err
    assert [(path.name, path.stat().st_mtime_ns) for path in folder.iterdir()] == before


@pytest.mark.parametrize("more", [(), ("--overwrite",), ("--resume",)], ids=str)
def test_two_runs_do_not_write_to_one_folder_and_a_killed_one_holds_nothing(
    train, tmp_path, held_by_another, more
):
    folder = tmp_path / "out"
    if "--resume" in more:
        train()
    with held_by_another(folder):
        before = sorted(path.name for path in folder.iterdir())
        code, out, error = train(*more)
        assert (code, out) == (2, "")
        assert f"another run or sweep is already writing to {folder}" in error
        assert sorted(path.name for path in folder.iterdir()) == before
    assert train(*more)[0] == 0


def test_a_run_that_another_has_overtaken_does_not_start(train, tmp_path, monkeypatch):
    from softprompt.cli import build

    original = build.build_trainer

    def meanwhile(*args, **options):
        built = original(*args, **options)
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / "checkpoint-9").mkdir()
        (tmp_path / "out" / "checkpoint-9" / "trainer_state.json").write_text("{}")
        return built

    monkeypatch.setattr(build, "build_trainer", meanwhile)
    code, _, error = train()
    assert code == 2
    assert "holds an adapter already" in error
    monkeypatch.undo()
    assert train("--overwrite")[0] == 0
    monkeypatch.setattr(build, "build_trainer", meanwhile)
    code, _, error = train("--resume")
    assert code == 2
    assert "--resume: another run has gone on from" in error


def test_overwrite_replaces_adapter_and_checkpoints_and_keeps_other_files(train, tmp_path):
    assert train(**{"--epochs": 3})[0] == 0
    (tmp_path / "out" / "notes.txt").write_text("mine")
    old = prompt_in(tmp_path / "out")
    assert train("--overwrite", **{"--seed": 5})[0] == 0
    assert not torch.equal(prompt_in(tmp_path / "out"), old)
    assert sorted(path.name for path in (tmp_path / "out").glob("checkpoint-*")) == ["checkpoint-2"]
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"


def test_an_output_that_is_a_file_is_one_line(train, tmp_path):
    (tmp_path / "out").write_text("precious")
    code, _, err = train()
    assert code == 2
    assert err == f"softprompt: --output {tmp_path / 'out'} is a file: name a folder\n"
    assert (tmp_path / "out").read_text() == "precious"


def test_a_prompt_that_diverged_is_not_saved(train, tmp_path):
    code, _, err = train(**{"--learning-rate": 1e20, "--eval-share": 0})
    assert code == 2
    assert "training diverged: the prompt is not finite after 3 steps and was not saved" in err
    assert not (tmp_path / "out" / "adapter_config.json").exists()


def check_refused(result, message, output):
    code, out, err = result
    assert code == 2
    assert out == ""
    assert err.startswith("softprompt: ")
    assert message in err
    assert err.count("\n") == 1
    assert not output.exists()


def test_softprompt_trains_the_prompt_that_plain_peft_trains(run, table, model_folder, tmp_path, read_json):
    for name, more in (("plain", ["--no-patch"]), ("patched", [])):
        output = ["--output", tmp_path / name, "--epochs", 3]
        assert run("train", "--data", table, "--model", model_folder, *output, *more)[0] == 0
    plain, patched = (read_json(tmp_path / name / "metrics.json") for name in ("plain", "patched"))
    assert patched["eval_loss"] == pytest.approx(plain["eval_loss"], rel=1e-4)
    torch.testing.assert_close(
        prompt_in(tmp_path / "patched"), prompt_in(tmp_path / "plain"), rtol=1e-3, atol=1e-4
    )


def test_without_a_table_and_a_model_the_shipped_ones_are_trained_and_load_as_documented(
    run, tmp_path, monkeypatch, read_json
):
    monkeypatch.chdir(tmp_path)
    assert run("train", "--epochs", 1)[0] == 0
    metrics = read_json(tmp_path / "softprompt-output" / "metrics.json")
    assert (metrics["train_rows"], metrics["eval_rows"], metrics["steps"]) == (200, 200, 25)
    assert metrics["eval_exact_match"] > 0.9
    names = {}
    exec(re.search(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)[1], names)
    prompt = names["model"].prompt_encoder["default"].embedding.weight
    assert torch.equal(prompt, prompt_in(tmp_path / "softprompt-output"))
