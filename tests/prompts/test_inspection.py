import copy
import json
import math

import pytest
import torch
from peft import PromptTuningConfig, get_peft_model

from softprompt import init, inspect_prompt
from softprompt.prompts import vocabulary

SCALES = ("llama", "gemma", "granite", "bloom")


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(vocabulary, "_BLOCK_BYTES", 10 * 8 * 48)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("name", SCALES)
def test_the_nearest_tokens_are_those_of_brute_force(models, table_of, name):
    table = table_of(models[name]).double()
    prompt = init.uniform(models[name], 7, bound=None, seed=0)
    found = inspect_prompt(models[name], prompt, neighbours=13)
    for row, vector in enumerate(prompt.double()):
        cosines = torch.stack([torch.cosine_similarity(vector, token, dim=0) for token in table])
        distances = torch.stack([(vector - token).norm() for token in table])
        best, closest = cosines.argsort(descending=True)[:13], distances.argsort()[:13]
        assert found.by_cosine.token_ids[row].tolist() == best.tolist()
        assert found.by_distance.token_ids[row].tolist() == closest.tolist()
        torch.testing.assert_close(found.by_cosine.values[row], cosines[best])
        torch.testing.assert_close(found.by_distance.values[row], distances[closest])
    torch.testing.assert_close(found.vocabulary_norms, table.norm(dim=1))
    torch.testing.assert_close(found.norms, prompt.double().norm(dim=1))


@pytest.mark.usefixtures("small_blocks")
def test_only_a_block_of_the_vocabulary_is_looked_at_at_once(models):
    sizes = []
    embedding = models["llama"].get_input_embeddings()
    handle = embedding.register_forward_hook(lambda module, args, output: sizes.append(len(output)))
    inspect_prompt(models["llama"], torch.ones(3, 48))
    handle.remove()
    assert sizes == [*[10] * 9, 7]


@pytest.mark.parametrize("name", SCALES)
def test_a_prompt_made_of_tokens_is_nearest_to_them(models, name):
    ids = [3, 50, 96]
    found = inspect_prompt(models[name], vocabulary.embed(models[name], ids), neighbours=1)
    assert found.by_cosine.token_ids[:, 0].tolist() == ids
    assert found.by_distance.token_ids[:, 0].tolist() == ids
    torch.testing.assert_close(found.by_cosine.values, torch.ones(3, 1, dtype=torch.float64))
    assert float(found.by_distance.values.max()) < 1e-5 * float(found.norms.min())


def test_ids_behind_the_tokenizer_are_left_out(models):
    prompt = vocabulary.embed(models["llama"], [3, 96])
    found = inspect_prompt(models["llama"], prompt, vocab_size=90)
    assert found.by_cosine.token_ids[0, 0] == 3
    assert int(found.by_cosine.token_ids.max()) < 90
    assert len(found.vocabulary_norms) == 90


def test_the_similarity_is_the_cosine_of_every_pair(models):
    prompt = init.matched(models["llama"], 4, seed=0)
    found = inspect_prompt(models["llama"], prompt)
    for i in range(4):
        for j in range(4):
            expected = float(torch.cosine_similarity(prompt[i].double(), prompt[j].double(), dim=0))
            assert float(found.similarity[i, j]) == pytest.approx(expected)


@pytest.mark.usefixtures("small_blocks")
def test_the_movement_is_measured_from_the_initial_prompt(models):
    model = models["llama"]
    start = vocabulary.embed(model, [5, 60])
    now = start + torch.tensor([[0.0], [3.0]])
    moved = inspect_prompt(model, now, initial=start).movement
    torch.testing.assert_close(moved.distance, torch.tensor([0.0, 3 * math.sqrt(48)]).double())
    expected = torch.cosine_similarity(now.double(), start.double())
    torch.testing.assert_close(moved.cosine, expected)
    torch.testing.assert_close(moved.initial_norms, start.double().norm(dim=1))
    assert moved.initial_token_ids.tolist() == [5, 60]


def test_without_an_initial_prompt_there_is_no_movement(models):
    assert inspect_prompt(models["llama"], torch.ones(2, 48)).movement is None


def test_vectors_of_zeros_are_no_problem(models):
    found = inspect_prompt(models["llama"], torch.zeros(2, 48), initial=torch.zeros(2, 48))
    for values in (found.by_cosine.values, found.by_distance.values, found.similarity, found.movement.cosine):
        assert torch.isfinite(values).all()
    assert float(found.similarity.abs().max()) == 0


def test_the_prompt_of_a_peft_model_is_its_active_adapter(tiny):
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = get_peft_model(copy.deepcopy(tiny), config)
    expected = inspect_prompt(tiny, init.prompt_parameter(model))
    assert torch.equal(inspect_prompt(model).by_cosine.values, expected.by_cosine.values)


def test_everything_is_in_the_plain_values(tiny, tokenizer):
    start = init.text(tiny, 3, tokenizer, "my order")
    found = inspect_prompt(tiny, start + 0.01, initial=start, neighbours=2)
    content = json.loads(json.dumps(found.to_dict(tokenizer)))
    assert content["num_virtual_tokens"] == 3
    first = content["virtual_tokens"][0]
    token_id = tokenizer("my order")["input_ids"][0]
    assert first["nearest_by_cosine"][0]["token_id"] == token_id
    assert first["nearest_by_cosine"][0]["token"] == tokenizer.decode([token_id])
    assert first["movement"]["initial_token_id"] == token_id
    assert first["movement"]["distance"] == pytest.approx(0.01 * math.sqrt(128), rel=1e-4)
    assert content["similarity"][0][0] == pytest.approx(1)
    norms = content["vocabulary_norms"]
    assert norms["p05"] < norms["median"] < norms["p95"]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"prompt": torch.zeros(2, 32)}, "the prompt is 32 numbers wide, the model's tokens 48"),
        ({"prompt": torch.full((2, 48), math.inf)}, "the prompt has values that are not finite"),
        ({"initial": torch.zeros(3, 48)}, "the initial prompt has 3 virtual tokens, expected 2"),
        ({"neighbours": 0}, "neighbours must be from 1 to 97, got 0"),
        ({"neighbours": 98}, "neighbours must be from 1 to 97, got 98"),
        ({"vocab_size": 98}, "vocab_size must be from 1 to 97, got 98"),
    ],
)
def test_wrong_arguments_are_said_in_one_sentence(models, options, message):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the message is compared below)
        inspect_prompt(models["llama"], **({"prompt": torch.ones(2, 48)} | options))
    assert message in str(caught.value)


def test_a_plain_model_needs_a_prompt(tiny):
    with pytest.raises(TypeError, match="expected a PEFT model with a prompt-tuning adapter"):
        inspect_prompt(tiny)
