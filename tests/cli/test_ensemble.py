"""`softprompt train --ensemble`, and the predictions of what it writes."""

import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def prompt_in(folder):
    return load_file(folder / "adapter_model.safetensors")["prompt_embeddings"]


@pytest.fixture
def train(run, table, model_folder, tmp_path):
    def call(*more, output="out", init="vocab", epochs=3, eval_share=0):
        return run(
            "train",
            *("--data", table, "--model", model_folder, "--output", tmp_path / output, "--init", init),
            *("--batch-size", 8, "--epochs", epochs, "--eval-share", eval_share, *more),
        )

    return call


@pytest.fixture(scope="module")
def ensemble(model_folder, make_tweets, tmp_path_factory):
    """An ensemble of three, trained so little that its members disagree."""
    from softprompt.cli import main

    folder = tmp_path_factory.mktemp("ensemble")
    arguments = ["train", "--data", make_tweets(folder), "--model", model_folder, "--output", folder / "out"]
    arguments += ["--ensemble", 3, "--init", "random", "--epochs", 1, "--learning-rate", 0.2]
    assert main([str(argument) for argument in arguments]) == 0
    return folder / "out"


@pytest.fixture
def predict(run, ensemble, tmp_path):
    def call(*more, adapter=ensemble, output="labelled.csv"):
        data = ensemble.parent / "tweets.csv"
        code, out, err = run(
            "predict", "--adapter", adapter, "--data", data, "--output", tmp_path / output, *more
        )
        assert code == 0, err
        return pd.read_csv(tmp_path / output), out

    return call


def test_every_prompt_is_an_adapter_of_its_own(ensemble, model_folder):
    assert not (ensemble / "adapter_config.json").exists()
    for number in (1, 2, 3):
        folder = ensemble / f"prompt-{number}"
        base = AutoModelForCausalLM.from_pretrained(model_folder)
        loaded = PeftModel.from_pretrained(base, folder)
        assert torch.equal(loaded.prompt_encoder["default"].embedding.weight, prompt_in(folder))
    prompts = [prompt_in(ensemble / f"prompt-{number}") for number in (1, 2, 3)]
    assert not torch.allclose(prompts[0], prompts[1])
    assert not torch.allclose(prompts[1], prompts[2])


def test_the_first_prompt_is_that_of_a_run_of_its_own(train, tmp_path, read_json):
    assert train("--ensemble", 2)[0] == 0
    assert train(output="alone")[0] == 0
    torch.testing.assert_close(
        prompt_in(tmp_path / "out" / "prompt-1"), prompt_in(tmp_path / "alone"), rtol=1e-4, atol=1e-4
    )
    together, alone = (read_json(tmp_path / name / "metrics.json")["history"] for name in ("out", "alone"))
    losses = [entry["prompt_losses"] for entry in together if "prompt_losses" in entry]
    assert [first for first, _ in losses] == pytest.approx(
        [entry["loss"] for entry in alone if "loss" in entry], abs=1e-4
    )
    means = [entry["loss"] for entry in together if "loss" in entry]
    assert means == pytest.approx([sum(pair) / 2 for pair in losses], abs=1e-4)


def test_a_resumed_ensemble_ends_as_one_that_was_not_interrupted(train, tmp_path):
    assert train("--ensemble", 2)[0] == 0
    expected = [prompt_in(tmp_path / "out" / f"prompt-{number}") for number in (1, 2)]
    shutil.rmtree(tmp_path / "out" / "checkpoint-9")
    assert train("--ensemble", 2, "--resume")[0] == 0
    for number, prompt in enumerate(expected, start=1):
        torch.testing.assert_close(
            prompt_in(tmp_path / "out" / f"prompt-{number}"), prompt, rtol=0, atol=1e-6
        )


def test_the_evaluation_is_that_of_the_majority(ensemble, predict, read_json):
    metrics = read_json(ensemble / "metrics.json")
    evaluation = [entry for entry in metrics["history"] if "eval_loss" in entry][-1]
    assert metrics["prompts"] == 3
    assert metrics["eval_loss"] == pytest.approx(sum(evaluation["eval_prompt_losses"]) / 3)
    assert metrics["eval_prompt_exact_match"] == evaluation["eval_prompt_exact_match"]
    assert len(metrics["eval_prompt_exact_match"]) == 3


def test_an_ensemble_predicts_what_most_of_its_prompts_predict(ensemble, predict):
    together, out = predict()
    assert out.startswith("20 rows labelled in ")
    alone = [
        predict("--score", adapter=ensemble / f"prompt-{number}", output=f"{number}.csv")[0]
        for number in (1, 2, 3)
    ]
    votes = pd.concat([frame["prediction"] for frame in alone], axis=1)
    assert together["prediction"].tolist() == votes.mode(axis=1)[0].tolist()
    product, other = 1.0, 1.0
    for frame in alone:
        product, other = product * frame["p(complaint)"], other * frame["p(no complaint)"]
    mean = product ** (1 / 3) / (product ** (1 / 3) + other ** (1 / 3))
    assert together["p(complaint)"].tolist() == pytest.approx(mean.tolist(), abs=1e-6)
    averaged, _ = predict("--combine", "mean", output="mean.csv")
    assert (averaged["prediction"] == "complaint").tolist() == (mean > 0.5).tolist()


def test_one_prompt_of_an_ensemble_can_be_used_alone(ensemble, predict):
    frame, out = predict(adapter=ensemble / "prompt-2")
    assert out.startswith("20 rows labelled in ")
    assert len(frame) == 20


def test_one_prompt_of_an_ensemble_can_be_inspected_and_exported(run, ensemble, tmp_path, read_json):
    prompt = prompt_in(ensemble / "prompt-2")
    start = torch.from_numpy(np.load(ensemble / "prompt-2" / "initial_prompt.npy"))
    code, _, err = run("inspect", "--adapter", ensemble / "prompt-2", "--output", tmp_path / "seen")
    assert code == 0, err
    entries = read_json(tmp_path / "seen" / "inspection.json")["virtual_tokens"]
    assert [entry["movement"]["distance"] for entry in entries] == pytest.approx(
        (prompt - start).norm(dim=1).tolist()
    )
    array = ("--format", "npy", "--output", tmp_path / "prompt.npy")
    assert run("export", "--adapter", ensemble / "prompt-2", *array)[0] == 0
    assert np.array_equal(np.load(tmp_path / "prompt.npy"), prompt.numpy())


def test_inspect_and_export_ask_for_one_prompt_of_an_ensemble(run, ensemble, tmp_path):
    for command in (
        ("inspect", "--output", tmp_path / "seen"),
        ("export", "--format", "npy", "--output", tmp_path / "p.npy"),
    ):
        code, out, err = run(*command, "--adapter", ensemble)
        assert (code, out) == (2, "")
        assert "holds an ensemble of 3 prompts: name one of them, " in err
        assert err.count("\n") == 1


def test_prompts_start_at_the_words_given_for_them(train, model_folder, tmp_path):
    texts = ["no order", "see you"]
    more = ("--ensemble", 2, "--ensemble-texts", *texts, "--num-virtual-tokens", 2)
    assert train(*more, "--learning-rate", 1e-30, "--weight-decay", 0, init="text", epochs=1)[0] == 0
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    embeddings = AutoModelForCausalLM.from_pretrained(model_folder).get_input_embeddings().weight.detach()
    for number, text in enumerate(texts, start=1):
        ids = (tokenizer(text)["input_ids"] * 2)[:2]
        prompt = prompt_in(tmp_path / "out" / f"prompt-{number}")
        torch.testing.assert_close(prompt, embeddings[ids], rtol=0, atol=1e-12)


def test_without_words_for_each_the_prompts_differ_all_the_same(train, tmp_path):
    assert train("--ensemble", 2, "--init-text", "complaint or not", init="text", epochs=1)[0] == 0
    first, second = (prompt_in(tmp_path / "out" / f"prompt-{number}") for number in (1, 2))
    assert not torch.allclose(first, second)


@pytest.mark.slow
def test_an_adapter_in_the_place_of_an_ensemble_leaves_none_of_it_and_back(train, tmp_path):
    out = tmp_path / "out"
    assert train("--ensemble", 2, epochs=1)[0] == 0
    code, _, err = train(epochs=1)
    assert code == 2
    assert "holds an adapter already" in err
    assert train("--overwrite", epochs=1)[0] == 0
    assert (out / "adapter_config.json").is_file()
    assert not list(out.glob("prompt-*"))
    assert train("--overwrite", "--ensemble", 2, epochs=1)[0] == 0
    assert not (out / "adapter_config.json").exists()
    assert not (out / "adapter_model.safetensors").exists()
    assert len(list(out.glob("prompt-*"))) == 2


@pytest.mark.parametrize(
    "more, init, message",
    [
        (
            ("--ensemble", 1),
            "vocab",
            "--ensemble 1: an ensemble needs at least two prompts",
        ),
        (
            ("--ensemble", 2, "--no-patch"),
            "vocab",
            "--ensemble needs softprompt's path: leave --no-patch out",
        ),
        (
            ("--ensemble", 2, "--ensemble-texts", "a"),
            "text",
            "expected one text for each of the 2 prompts of --ensemble, got 1",
        ),
        (("--ensemble-texts", "a", "b"), "text", "give --ensemble, or --init-text instead"),
        (("--ensemble", 2, "--ensemble-texts", "a", "a"), "text", "the same give prompts that are the same"),
        (("--ensemble", 2, "--ensemble-texts", "a", "b"), "vocab", "needs --init text, got --init vocab"),
    ],
)
def test_a_wrong_ensemble_is_one_line_and_writes_nothing(train, tmp_path, more, init, message):
    code, _, err = train(*more, init=init)
    assert code == 2
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_model_that_cannot_be_packed_has_no_ensemble(run, table, unpacked_folder, tmp_path):
    code, _, err = run(
        *("train", "--data", table, "--model", unpacked_folder, "--output", tmp_path / "out"),
        *("--ensemble", 2, "--positions", "padded"),
    )
    assert code == 2
    assert "--ensemble needs a model whose rows can be packed: rows stay padded" in err
