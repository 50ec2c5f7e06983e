import base64
import copy
import io
import json
import math

import pytest
import torch
from peft import PeftModel, PromptTuningConfig, get_peft_model

from softprompt import export, init
from softprompt.prompts import vocabulary


def received(encoded):
    """What a vLLM server makes of the field: only plain tensors are read."""
    return torch.load(io.BytesIO(base64.b64decode(encoded, validate=True)), weights_only=True)


@pytest.mark.parametrize("name", ["llama", "gemma", "granite", "bloom"])
def test_the_embeddings_give_the_logits_of_the_prompted_text(models, name):
    model = get_peft_model(
        copy.deepcopy(models[name]),
        PromptTuningConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=4, token_dim=48 if name != "bloom" else 32
        ),
    )
    init.set_prompt(model, init.matched(model, 4, seed=0))
    ids = [5, 17, 80]
    expected = model(input_ids=torch.tensor([ids])).logits
    embeds = received(export.encode(export.prompt_embeds(model, ids)))
    assert embeds.shape == (7, model.get_base_model().get_input_embeddings().embedding_dim)
    torch.testing.assert_close(model.get_base_model()(inputs_embeds=embeds[None]).logits, expected)


def test_the_embeddings_have_the_dtype_of_the_model_or_the_one_asked_for(tiny):
    model = copy.deepcopy(tiny).to(torch.bfloat16)
    prompt = torch.randn(2, 128)
    embeds = export.prompt_embeds(model, [5], prompt)
    assert embeds.dtype == torch.bfloat16
    assert torch.equal(embeds[:2], prompt.bfloat16())
    assert torch.equal(embeds[2], model.get_input_embeddings().weight[5])
    assert torch.equal(export.prompt_embeds(model, [5], prompt, dtype=torch.float32)[:2], prompt)


def test_only_the_tensor_itself_is_sent(tiny):
    part = torch.zeros(100_000, 4)[:3]
    assert len(export.encode(part)) < 5000
    assert torch.equal(received(export.encode(part)), part)


def test_a_text_without_tokens_leaves_the_prompt(tiny):
    prompt = torch.randn(2, 128)
    assert torch.equal(export.prompt_embeds(tiny, [], prompt), prompt)


def test_a_request_is_json_with_the_embeddings(tiny):
    embeds = export.prompt_embeds(tiny, [5, 6], torch.randn(2, 128))
    body = export.completion_request("base", embeds, max_tokens=4, stop_token_ids=[2])
    body = json.loads(json.dumps(body))
    assert torch.equal(received(body.pop("prompt_embeds")), embeds)
    assert body == {"model": "base", "max_tokens": 4, "temperature": 0.0, "stop_token_ids": [2]}
    assert "stop_token_ids" not in export.completion_request("base", embeds, max_tokens=4)


def test_a_saved_tensor_is_plain(tmp_path):
    embeds = torch.randn(3, 8)
    export.save_tensor(embeds, tmp_path / "embeds.pt")
    assert torch.equal(torch.load(tmp_path / "embeds.pt", weights_only=True), embeds)


def test_peft_loads_the_folder_bit_equal_and_computes_the_same(tiny, tmp_path):
    prompt = torch.randn(3, 128)
    export.save_peft(tiny, prompt, tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(copy.deepcopy(tiny), tmp_path / "adapter")
    assert torch.equal(init.prompt_parameter(loaded), prompt)
    embeds = export.prompt_embeds(tiny, [7, 8], prompt)
    expected = tiny(inputs_embeds=embeds[None]).logits
    torch.testing.assert_close(loaded(input_ids=torch.tensor([[7, 8]])).logits, expected)


def test_the_configuration_is_the_one_that_peft_writes(tiny, tmp_path):
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = get_peft_model(copy.deepcopy(tiny), config)
    model.save_pretrained(tmp_path / "theirs")
    export.save_peft(model, init.prompt_parameter(model), tmp_path / "ours")
    ours, theirs = (
        json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("ours", "theirs")
    )
    assert ours == theirs


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda m: export.prompt_embeds(m, [1], torch.zeros(2, 3)), "3 numbers wide, the model's tokens 128"),
        (
            lambda m: export.prompt_embeds(m, [1], torch.full((2, 128), math.nan)),
            "the prompt has values that are not finite",
        ),
        (
            lambda m: export.prompt_embeds(m, [[1]], torch.zeros(2, 128)),
            "input_ids must be those of one text, [L], got shape [1, 1]",
        ),
        (
            lambda m: export.prompt_embeds(m, [9999], torch.zeros(2, 128)),
            "token id 9999 is outside of the model's vocabulary of 4096",
        ),
        (
            lambda m: export.encode(torch.zeros(1, 2, 128)),
            "expected [P+L, H] of float32, bfloat16 or float16, got torch.float32 of [1, 2, 128]",
        ),
        (lambda m: export.encode(torch.zeros(2, 128).double()), "got torch.float64 of [2, 128]"),
        (lambda m: export.save_npy(torch.zeros(2, 128), "prompt.txt"), "prompt.txt must end in .npy"),
        (lambda m: export.save_npy(torch.zeros(128), "prompt.npy"), "got torch.float32 of shape [128]"),
        (lambda m: export.save_peft(m, torch.zeros(2, 3), "nowhere"), "3 numbers wide"),
    ],
)
def test_wrong_arguments_are_said_in_one_sentence(tiny, call, message):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the message is compared below)
        call(tiny)
    assert message in str(caught.value)


def test_the_vectors_of_tokens_come_from_the_call_of_the_module(models):
    embedding = models["gemma"].get_input_embeddings()
    vectors = vocabulary.embed(models["gemma"], [3, 4])
    assert torch.equal(vectors, embedding(torch.tensor([3, 4])))
    assert not torch.allclose(vectors, embedding.weight[[3, 4]])
