import copy

import numpy as np
import pytest
from peft import PeftConfig, PromptTuningConfig, get_peft_model

from softprompt import export, init, inspect_prompt


@pytest.fixture(scope="module")
def trained(model_folder, make_tweets, tmp_path_factory):
    """What `softprompt train` leaves; tests that change it copy it."""
    from softprompt.cli import main

    folder = tmp_path_factory.mktemp("trained")
    arguments = ["train", "--model", model_folder, "--data", make_tweets(folder), "--epochs", 2]
    more = ["--output", folder / "out", "--init", "labels", "--num-virtual-tokens", 5]
    assert main([str(item) for item in [*arguments, *more]]) == 0
    return folder / "out"


@pytest.fixture
def inspect(run, tmp_path, read_json):
    """Run the command; returns its standard output and inspection.json."""

    def call(adapter, *more):
        code, out, err = run("inspect", "--adapter", adapter, "--output", tmp_path / "seen", *more)
        assert (code, err) == (0, "")
        return out, read_json(tmp_path / "seen" / "inspection.json")

    return call


@pytest.mark.usefixtures("rendered")
def test_a_trained_prompt_is_compared_with_the_vocabulary_and_its_start(
    inspect, trained, model, tokenizer, tmp_path
):
    out, content = inspect(trained)
    prompt = init.from_adapter(model, trained)
    start = init.class_labels(model, 5, tokenizer, ["complaint", "no complaint"], seed=42)
    found = inspect_prompt(model, prompt, initial=start).to_dict(tokenizer)
    assert {name: content[name] for name in found} == found
    assert content["initial_prompt"] == str(trained / "initial_prompt.npy")
    for entry in content["virtual_tokens"]:
        assert f"{entry['nearest_by_cosine'][0]['cosine']:.2f}" in out
        assert f"{entry['movement']['distance']:.3g}" in out
    assert (tmp_path / "seen" / "inspection.png").read_bytes().startswith(b"\x89PNG")


def test_labels_among_the_nearest_tokens_are_named(inspect, trained, tokenizer):
    out, content = inspect(trained, "--neighbours", 10)
    ids = set(tokenizer("complaint")["input_ids"]) | set(tokenizer(" complaint")["input_ids"])
    expected = [
        entry["virtual_token"]
        for entry in content["virtual_tokens"]
        if ids & {near["token_id"] for near in entry["nearest_by_cosine"]}
    ]
    assert content["labels_among_nearest"]["complaint"] == expected != []
    where = ", ".join(map(str, expected))
    assert f"label 'complaint' among the nearest of virtual tokens: {where}" in out


def test_words_that_plain_peft_started_from_are_looked_up_again(inspect, model, model_folder, tmp_path):
    config = PromptTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=3,
        prompt_tuning_init="TEXT",
        prompt_tuning_init_text="no order",
        tokenizer_name_or_path=str(model_folder),
    )
    peft_model = get_peft_model(copy.deepcopy(model), config)
    init.set_prompt(peft_model, init.prompt_parameter(peft_model) + 1)
    peft_model.save_pretrained(tmp_path / "adapter")
    _, content = inspect(tmp_path / "adapter")
    assert content["initial_prompt"] == "the words 'no order'"
    assert content["labels_among_nearest"] == {}
    for entry in content["virtual_tokens"]:
        assert entry["movement"]["distance"] == pytest.approx(32**0.5, rel=1e-5)


def test_where_nothing_says_the_start_nothing_is_said_of_the_way(inspect, model, tmp_path):
    export.save_peft(model, init.random(model, 3, seed=0), tmp_path / "adapter")
    out, content = inspect(tmp_path / "adapter")
    assert content["initial_prompt"] is None
    assert "movement" not in content["virtual_tokens"][0]
    assert "nothing says where the prompt started" in out


def test_a_start_that_is_given_wins(inspect, trained, tmp_path):
    prompt = export_prompt(trained)
    np.save(tmp_path / "start.npy", prompt.numpy())
    _, content = inspect(trained, "--initial", tmp_path / "start.npy")
    assert [entry["movement"]["distance"] for entry in content["virtual_tokens"]] == [0.0] * 5
    _, content = inspect(trained, "--initial", trained)
    assert [entry["movement"]["distance"] for entry in content["virtual_tokens"]] == [0.0] * 5


def export_prompt(folder):
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors")["prompt_embeddings"]


def test_an_array_is_inspected_where_the_model_is_given(inspect, trained, model_folder, tmp_path):
    np.save(tmp_path / "prompt.npy", export_prompt(trained).numpy())
    _, from_array = inspect(tmp_path / "prompt.npy", "--model", model_folder, "--neighbours", 2)
    _, from_folder = inspect(trained, "--neighbours", 2)
    assert from_array["similarity"] == from_folder["similarity"]
    assert len(from_array["virtual_tokens"][0]["nearest_by_cosine"]) == 2


def test_what_cannot_be_inspected_is_one_line(run, trained, model, tmp_path):
    np.save(tmp_path / "narrow.npy", np.zeros((2, 7)))
    np.save(tmp_path / "short.npy", np.zeros((2, 32)))
    (tmp_path / "file").write_text("")
    cases = {
        ("--adapter", tmp_path / "none"): "--adapter: " + str(tmp_path / "none") + " does not exist",
        ("--adapter", tmp_path): "holds no adapter: expected a folder with adapter_config.json",
        ("--adapter", tmp_path / "short.npy"): "does not say for which model it was trained: give --model",
        ("--adapter", tmp_path / "narrow.npy", "--model", model.name_or_path): "7 numbers wide, the model's",
        (
            "--adapter",
            trained,
            "--initial",
            tmp_path / "short.npy",
        ): "the initial prompt has 2 virtual tokens",
        ("--adapter", trained, "--neighbours", 9999): "neighbours must be from 1 to",
        ("--adapter", trained, "--output", tmp_path / "file"): "is a file: name a folder",
        ("--adapter", trained, "--output", tmp_path / "file" / "seen"): "Not a directory",
        ("--adapter", trained, "--model", "./nowhere"): "the model ./nowhere is not a folder",
    }
    for arguments, message in cases.items():
        code, out, err = run("inspect", "--output", tmp_path / "seen", *arguments)
        assert (code, out) == (2, "")
        assert message in err
        assert err.count("\n") == 1
    assert not (tmp_path / "seen").exists()


def test_the_base_that_peft_names_is_used_without_a_record(trained, inspect, tmp_path, model):
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_bytes((trained / name).read_bytes())
    assert PeftConfig.from_pretrained(str(tmp_path)).base_model_name_or_path == model.name_or_path
    _, content = inspect(tmp_path)
    assert content["model"] == model.name_or_path
