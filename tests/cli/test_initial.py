import csv
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from softprompt import init

SEED, LENGTH = 42, 6


@pytest.fixture
def train(run, table, model_folder, tmp_path):
    def call(*more):
        usual = ("--data", table, "--model", model_folder, "--output", tmp_path / "out", "--epochs", 1)
        return run("train", *usual, "--num-virtual-tokens", LENGTH, "--eval-share", 0, *more)

    return call


def start_of(folder):
    return torch.from_numpy(np.load(folder / "initial_prompt.npy"))


def prompt_in(folder):
    return load_file(folder / "adapter_model.safetensors")["prompt_embeddings"]


def texts_of(table):
    with table.open(newline="", encoding="utf-8") as file:
        return [row["Tweet text"] for row in csv.DictReader(file)]


STARTS = {
    "text": lambda m, t, table: init.text(m, LENGTH, t, "no order"),
    "text-once": lambda m, t, table: init.text(m, LENGTH, t, "no order", tile=False, seed=SEED),
    "labels": lambda m, t, table: init.class_labels(m, LENGTH, t, ["complaint", "no complaint"], seed=SEED),
    "common": lambda m, t, table: init.common_tokens(m, LENGTH, seed=SEED),
    "counted": lambda m, t, table: init.common_tokens(
        m, LENGTH, counts=init.count_tokens(m, t, texts_of(table)), seed=SEED
    ),
    "vocab": lambda m, t, table: init.sample_vocabulary(m, LENGTH, seed=SEED),
    "matched": lambda m, t, table: init.matched(m, LENGTH, seed=SEED),
    "uniform": lambda m, t, table: init.uniform(m, LENGTH, seed=SEED),
    "random": lambda m, t, table: init.random(m, LENGTH, seed=SEED),
}


@pytest.mark.parametrize("name", STARTS)
def test_training_starts_where_the_function_of_the_name_says(train, table, model, tokenizer, tmp_path, name):
    code, *_ = train("--init", name, "--init-text", "no order", "--learning-rate", 1e-30, "--weight-decay", 0)
    assert code == 0
    expected = STARTS[name](model, tokenizer, table)
    assert torch.equal(start_of(tmp_path / "out"), expected)
    torch.testing.assert_close(prompt_in(tmp_path / "out"), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", [name for name in STARTS if name != "text"])
def test_every_prompt_of_an_ensemble_starts_at_a_seed_of_its_own(
    train, table, model, tokenizer, tmp_path, name, monkeypatch
):
    more = ("--init", name, "--init-text", "no order", "--ensemble", 3)
    assert train(*more)[0] == 0
    for number in range(3):
        monkeypatch.setitem(globals(), "SEED", 42 + number)
        expected = STARTS[name](model, tokenizer, table)
        assert torch.equal(start_of(tmp_path / "out" / f"prompt-{number + 1}"), expected)


def test_every_prompt_of_an_ensemble_goes_on_from_its_own(train, tmp_path):
    assert train("--init", "matched", "--ensemble", 2)[0] == 0
    saved = ("--init", "saved", "--init-from", tmp_path / "out", "--output", tmp_path / "next")
    assert train(*saved, "--ensemble", 2)[0] == 0
    for name in ("prompt-1", "prompt-2"):
        assert torch.equal(start_of(tmp_path / "next" / name), prompt_in(tmp_path / "out" / name))
    check_refused(train(*saved, "--overwrite"), "holds an ensemble of 2 prompts", "give --ensemble 2, or")
    one = ("--init", "saved", "--init-from", tmp_path / "out" / "prompt-1", "--output", tmp_path / "copies")
    check_refused(train(*one, "--ensemble", 2), "prompt-1 and prompt-2 of the ensemble start at the same")


def test_a_resumed_ensemble_keeps_the_starts_of_its_prompts(train, tmp_path):
    assert train("--init", "matched", "--ensemble", 2)[0] == 0
    starts = [start_of(tmp_path / "out" / name) for name in ("prompt-1", "prompt-2")]
    assert train("--init", "matched", "--ensemble", 2, "--resume")[0] == 0
    for name, start in zip(("prompt-1", "prompt-2"), starts, strict=True):
        assert torch.equal(start_of(tmp_path / "out" / name), start)


def test_the_initial_prompt_is_kept_beside_the_trained_one(train, model, tmp_path):
    assert train("--init", "matched")[0] == 0
    expected = init.matched(model, LENGTH, seed=SEED)
    assert torch.equal(start_of(tmp_path / "out"), expected)
    assert not torch.equal(prompt_in(tmp_path / "out"), expected)
    (checkpoint,) = (tmp_path / "out").glob("checkpoint-*")
    assert torch.equal(start_of(checkpoint), expected)


def test_training_goes_on_from_another_adapter_or_a_file(train, tmp_path):
    assert train("--init", "matched")[0] == 0
    first = prompt_in(tmp_path / "out")
    np.save(tmp_path / "prompt.npy", first.numpy())
    for source, output in ((tmp_path / "out", "second"), (tmp_path / "prompt.npy", "third")):
        result = train("--init", "saved", "--init-from", source, "--output", tmp_path / output)
        assert result[0] == 0
        assert torch.equal(start_of(tmp_path / output), first)


def test_resuming_needs_no_more_than_the_checkpoint(train, tmp_path, monkeypatch):
    from softprompt.tasks.trainer import PromptTrainer

    np.save(tmp_path / "prompt.npy", np.full((LENGTH, 32), 0.1))
    saved = ("--init", "saved", "--init-from", tmp_path / "prompt.npy", "--epochs", 2)
    saved += ("--batch-size", 8)
    assert train(*saved, "--output", tmp_path / "whole")[0] == 0
    step = PromptTrainer.training_step

    def fails_late(self, *args, **kwargs):
        if self.state.global_step == 4:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(PromptTrainer, "training_step", fails_late)
        assert train(*saved)[0] == 130
    (tmp_path / "prompt.npy").unlink()
    assert train(*saved, "--resume")[0] == 0
    assert torch.equal(start_of(tmp_path / "out"), torch.full((LENGTH, 32), 0.1))
    torch.testing.assert_close(prompt_in(tmp_path / "out"), prompt_in(tmp_path / "whole"), rtol=0, atol=1e-6)


def test_a_broken_initial_prompt_of_a_checkpoint_is_one_line(train, tmp_path):
    assert train()[0] == 0
    (checkpoint,) = (tmp_path / "out").glob("checkpoint-*")
    (checkpoint / "initial_prompt.npy").write_bytes(b"no array")
    check_refused(train("--resume"), "--resume: ", "initial_prompt.npy is not a readable .npy file")


def test_an_adapter_of_another_base_needs_the_option(train, tmp_path):
    assert train()[0] == 0
    path = tmp_path / "out" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "some/other"}))
    other = ("--init", "saved", "--init-from", tmp_path / "out", "--output", tmp_path / "next")
    check_refused(train(*other), "--init saved: the adapter in", "trained for the model some/other, not for")
    assert train(*other, "--init-other-base")[0] == 0
    assert torch.equal(start_of(tmp_path / "next"), prompt_in(tmp_path / "out"))


@pytest.mark.parametrize(
    "more, message",
    [
        (("--init", "saved"), "--init saved needs a prompt to start from: give --init-from"),
        (("--init-from", "x.npy"), "--init-from belongs to --init saved, but --init is answers"),
        (("--init-other-base",), "--init-other-base belongs to --init saved, but --init is answers"),
        (("--init", "text-once", "--init-text", " "), "--init text-once needs words to start from"),
        (
            ("--init", "labels", "--num-virtual-tokens", 1),
            "--init labels: 2 labels do not fit into 1 virtual tokens",
        ),
        (("--init", "saved", "--init-from", "none.npy"), "--init saved: none.npy does not exist"),
        (("--init", "other"), "argument --init: invalid choice: 'other'"),
    ],
)
def test_a_start_that_cannot_be_made_is_one_line(train, tmp_path, more, message):
    check_refused(train(*more), message)
    assert not (tmp_path / "out").exists()


def test_a_file_of_another_width_or_length_is_one_line(train, tmp_path):
    for shape, message in (((LENGTH, 7), "7 numbers wide"), ((5, 32), "has 5 virtual tokens, expected 6")):
        np.save(tmp_path / "prompt.npy", np.zeros(shape))
        check_refused(train("--init", "saved", "--init-from", tmp_path / "prompt.npy"), message)


def check_refused(result, *messages):
    code, out, err = result
    assert code == 2
    assert out == ""
    assert err.startswith("softprompt: ")
    for message in messages:
        assert message in err
    assert err.count("\n") == 1
