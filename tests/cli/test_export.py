import base64
import io
import json
import shutil

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from softprompt import init
from softprompt.tasks.classification import Encoder, load_task


@pytest.fixture(scope="module")
def trained(model_folder, make_tweets, tmp_path_factory):
    from softprompt.cli import main

    folder = tmp_path_factory.mktemp("trained")
    arguments = ["train", "--model", model_folder, "--data", make_tweets(folder), "--epochs", 2]
    assert main([str(item) for item in [*arguments, "--output", folder / "out"]]) == 0
    return folder / "out"


@pytest.fixture(scope="module")
def prompt(trained):
    return load_file(trained / "adapter_model.safetensors")["prompt_embeddings"]


def received(body):
    data = base64.b64decode(body["prompt_embeds"], validate=True)
    return torch.load(io.BytesIO(data), weights_only=True)


def test_an_array_is_the_prompt(run, trained, prompt, tmp_path):
    code, out, _ = run("export", "--adapter", trained, "--format", "npy", "--output", tmp_path / "p.npy")
    assert code == 0
    assert f"50 virtual tokens of 32 numbers: {tmp_path / 'p.npy'}" in out
    assert np.array_equal(np.load(tmp_path / "p.npy"), prompt.numpy())


def test_a_request_makes_the_model_write_what_the_adapter_makes_it_write(
    run, trained, model_folder, tmp_path, read_json
):
    text = "my order never came"
    code, out, _ = run(
        "export", "--adapter", trained, "--format", "vllm", "--text", text, "--output", tmp_path / "r.json"
    )
    assert code == 0
    assert "curl URL/v1/completions" in out
    body = read_json(tmp_path / "r.json")
    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    encoder = Encoder(load_task(trained)[0], tokenizer)
    assert body["model"] == str(model_folder)
    assert body["max_tokens"] == encoder.max_target
    assert body["stop_token_ids"] == encoder.stop_token_ids
    assert body["temperature"] == 0
    greedy = {
        "max_new_tokens": body["max_tokens"],
        "do_sample": False,
        "eos_token_id": body["stop_token_ids"],
    }
    served = base.generate(inputs_embeds=received(body)[None], **greedy)[0]
    ids = torch.tensor([encoder.prompt(text)])
    adapted = PeftModel.from_pretrained(base, trained)
    expected = adapted.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **greedy)[
        0, ids.shape[1] :
    ]
    assert served.tolist() == expected.tolist()
    assert received(body).shape == (50 + ids.shape[1], 32)


def test_a_prompt_without_a_task_stands_before_the_plain_text(
    run, trained, prompt, model_folder, tmp_path, read_json
):
    np.save(tmp_path / "p.npy", prompt.numpy())
    more = ("--served-model", "base", "--max-tokens", 3, "--output", tmp_path / "r.json")
    arguments = (
        "--adapter",
        tmp_path / "p.npy",
        "--model",
        model_folder,
        "--format",
        "vllm",
        "--text",
        "no order",
    )
    assert run("export", *arguments, *more)[0] == 0
    body = read_json(tmp_path / "r.json")
    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(model_folder)("no order")["input_ids"]
    assert torch.equal(received(body), torch.cat([prompt, base.get_input_embeddings().weight[ids]]).detach())
    assert (body["model"], body["max_tokens"]) == ("base", 3)
    assert "stop_token_ids" not in body


def test_the_tensor_alone_is_that_of_the_request(run, trained, tmp_path, read_json):
    usual = ("--adapter", trained, "--format", "vllm", "--text", "no order", "--output")
    for name in ("r.json", "r.pt"):
        assert run("export", *usual, tmp_path / name)[0] == 0
    tensor = torch.load(tmp_path / "r.pt", weights_only=True)
    assert torch.equal(tensor, received(read_json(tmp_path / "r.json")))


def test_a_folder_of_peft_holds_the_adapter_and_nothing_else(run, trained, prompt, model_folder, tmp_path):
    code, *_ = run("export", "--adapter", trained, "--format", "peft", "--output", tmp_path / "peft")
    assert code == 0
    assert sorted(path.name for path in (tmp_path / "peft").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    configs = [
        json.loads((folder / "adapter_config.json").read_text()) for folder in (trained, tmp_path / "peft")
    ]
    assert configs[0] == configs[1]
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_folder), tmp_path / "peft")
    assert torch.equal(init.prompt_parameter(loaded), prompt)


def test_an_array_becomes_a_folder_of_peft(run, prompt, model_folder, tmp_path):
    np.save(tmp_path / "p.npy", prompt.numpy())
    usual = ("--adapter", tmp_path / "p.npy", "--format", "peft", "--output", tmp_path / "peft")
    assert run("export", *usual, "--model", model_folder)[0] == 0
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_folder), tmp_path / "peft")
    assert torch.equal(init.prompt_parameter(loaded), prompt)


def test_what_is_there_is_replaced_only_on_request(run, trained, prompt, tmp_path):
    target = tmp_path / "p.npy"
    target.write_text("precious")
    usual = ("--adapter", trained, "--format", "npy", "--output", target)
    code, _, err = run("export", *usual)
    assert code == 2
    assert err == (
        f"softprompt: {target} exists already: name another --output or replace it with --overwrite\n"
    )
    assert target.read_text() == "precious"
    assert run("export", *usual, "--overwrite")[0] == 0
    assert np.array_equal(np.load(target), prompt.numpy())


def test_what_cannot_be_exported_is_one_line(run, trained, model_folder, tmp_path):
    np.save(tmp_path / "p.npy", np.zeros((2, 7)))
    (tmp_path / "file").write_text("")
    vllm = ("--format", "vllm", "--output", tmp_path / "r.json")
    cases = {
        (trained, "--format", "npy", "--output", "p.txt"): "--format npy writes .npy: rename --output p.txt",
        (
            trained,
            "--format",
            "vllm",
            "--output",
            "p",
        ): "--format vllm writes .json or .pt: rename --output p",
        (
            trained,
            "--format",
            "npy",
            "--output",
            tmp_path / "n.npy",
            "--text",
            "a",
        ): "--text belongs to --format",
        (trained, *vllm): "--format vllm needs the text that stands behind the prompt: give --text",
        (trained, "--format", "peft", "--output", trained): "exists already: name another --output",
        (trained, "--format", "peft", "--output", tmp_path / "file"): "is a file: name a folder",
        (trained, "--format", "npy", "--output", tmp_path / "file" / "n.npy"): f"{tmp_path / 'file'}: ",
        (tmp_path / "p.npy", "--format", "peft", "--output", tmp_path / "x"): "trained: give --model",
        (tmp_path / "p.npy", *vllm, "--text", "a", "--model", model_folder): (
            "is 7 numbers wide, the model's tokens 32: it belongs to another model; the model is "
        ),
        (
            tmp_path / "none",
            *vllm,
            "--text",
            "a",
        ): "none does not exist: give a .npy file or an adapter folder",
    }
    for arguments, message in cases.items():
        code, out, err = run("export", "--adapter", *arguments)
        assert (code, out) == (2, "")
        assert message in err
        assert err.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "p.npy"]


def test_a_prompt_that_was_trained_with_modules_of_the_model_is_not_exported_without_them(
    run, trained, tmp_path
):
    shutil.copytree(trained, tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"modules_to_save": ["lm_head"]}))
    for form, output in (("npy", "p.npy"), ("peft", "p")):
        code, _, err = run(
            "export", "--adapter", tmp_path / "adapter", "--format", form, "--output", tmp_path / output
        )
        assert code == 2
        assert "holds trained modules of the model beside the prompt (lm_head)" in err
        assert not (tmp_path / output).exists()
