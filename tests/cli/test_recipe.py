"""The paper's settings by one word, and stopping when the loss of kept rows no longer falls."""

import shutil

import pytest
import torch
from safetensors.torch import load_file


def prompt_in(folder):
    return load_file(folder / "adapter_model.safetensors")["prompt_embeddings"]


@pytest.fixture
def train(run, table, model_folder, tmp_path):
    def call(*more, output="out", epochs=1):
        return run(
            *("train", "--data", table, "--model", model_folder, "--output", tmp_path / output),
            *("--epochs", epochs, "--batch-size", 4, *more),
        )

    return call


def test_the_recipe_of_the_paper_is_its_settings(train, tmp_path, read_json):
    assert train("--recipe", "paper", "--eval-share", 0)[0] == 0
    settings = ("--optimizer", "adafactor", "--learning-rate", 0.3, "--schedule", "constant")
    settings += ("--num-virtual-tokens", 100, "--weight-decay", 1e-5)
    assert train(*settings, "--eval-share", 0, output="spelled")[0] == 0
    prompt = prompt_in(tmp_path / "out")
    assert prompt.shape == (100, 32)
    assert torch.equal(prompt, prompt_in(tmp_path / "spelled"))
    rates = [e["learning_rate"] for e in read_json(tmp_path / "out" / "metrics.json")["history"][:-1]]
    assert set(rates) == {0.3}


@pytest.mark.parametrize("before", [True, False])
def test_what_is_given_beside_the_recipe_counts_more(train, tmp_path, read_json, before):
    own = ("--num-virtual-tokens=3", "--learning-rate", 0.1)
    recipe = ("--recipe", "paper")
    assert train(*(own + recipe if before else recipe + own), "--eval-share", 0)[0] == 0
    training = read_json(tmp_path / "out" / "softprompt.json")["training"]
    assert (training["num_virtual_tokens"], training["learning_rate"]) == (3, 0.1)
    assert (training["optimizer"], training["schedule"], training["weight_decay"]) == (
        "adafactor",
        "constant",
        1e-5,
    )


# The learning rate is so high that the loss of the kept rows soon rises.
STOPPING = ("--validation-share", 0.25, "--patience", 2, "--learning-rate", 1, "--schedule", "constant")


def validation_losses(metrics):
    return {e["step"]: e["eval_validation_loss"] for e in metrics["history"] if "eval_validation_loss" in e}


def test_training_stops_and_keeps_the_prompt_with_the_lowest_loss(train, tmp_path, read_json):
    code, out, err = train(*STOPPING, epochs=40)
    assert code == 0
    assert " on 4 validation rows" in err
    metrics = read_json(tmp_path / "out" / "metrics.json")
    losses = validation_losses(metrics)
    best = min(losses, key=losses.get)
    steps = list(losses)
    assert metrics["steps"] == steps[-1] < 40 * 3
    assert steps.index(best) == len(steps) - 1 - 2
    assert metrics["best_step"] == best
    assert metrics["validation_loss"] == losses[best]
    assert f"the prompt of step {best} was kept" in " ".join(out.split())
    checkpoint, last = (tmp_path / "out" / f"checkpoint-{step}" for step in (best, steps[-1]))
    assert torch.equal(prompt_in(tmp_path / "out"), prompt_in(checkpoint))
    assert not torch.equal(prompt_in(tmp_path / "out"), prompt_in(last))
    assert metrics["eval_loss"] == metrics["history"][-1]["eval_loss"]
    assert (metrics["train_rows"], metrics["eval_rows"]) == (12, 4)


@pytest.mark.slow
def test_a_resumed_run_stops_where_an_uninterrupted_one_does(train, tmp_path, read_json):
    assert train(*STOPPING, epochs=40)[0] == 0
    whole = read_json(tmp_path / "out" / "metrics.json")
    expected = prompt_in(tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / f"checkpoint-{whole['steps']}")
    assert train(*STOPPING, "--resume", epochs=40)[0] == 0
    again = read_json(tmp_path / "out" / "metrics.json")
    assert (again["steps"], again["best_step"]) == (whole["steps"], whole["best_step"])
    assert torch.equal(prompt_in(tmp_path / "out"), expected)


def test_a_run_without_evaluation_rows_stops_too(train, tmp_path, read_json):
    code, _, err = train(*STOPPING, "--eval-share", 0, epochs=40)
    assert code == 0
    assert "evaluation rows" not in err
    metrics = read_json(tmp_path / "out" / "metrics.json")
    assert metrics["steps"] < 40 * 4
    assert metrics["eval_loss"] is None


def test_an_ensemble_stops_by_the_mean_of_its_prompts(train, tmp_path, read_json):
    assert train(*STOPPING, "--ensemble", 2, "--init", "vocab", epochs=40)[0] == 0
    metrics = read_json(tmp_path / "out" / "metrics.json")
    losses = validation_losses(metrics)
    best = min(losses, key=losses.get)
    assert metrics["best_step"] == best < metrics["steps"] < 40 * 3
    for number in (1, 2):
        kept = tmp_path / "out" / f"checkpoint-{best}" / f"prompt-{number}"
        assert torch.equal(prompt_in(tmp_path / "out" / f"prompt-{number}"), prompt_in(kept))


def test_patience_without_rows_to_watch_is_one_line(train, tmp_path):
    code, _, err = train("--patience", 2)
    assert code == 2
    assert err == "softprompt: --patience needs rows to watch: give --validation-share\n"
    assert not (tmp_path / "out").exists()


def test_too_few_rows_to_keep_some_out_are_one_line(train, tmp_path):
    code, _, err = train("--validation-share", 0.01)
    assert code == 2
    assert "--validation-share 0.01: " in err
    assert "has too few rows (16 for training) to keep any of them out" in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()
