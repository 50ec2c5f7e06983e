import copy
import math

import pytest
import torch
from peft import PromptTuningConfig, get_peft_model
from tiny_models import prompt_config

from softprompt import init
from softprompt.prompts import vocabulary
from softprompt.tiny import model_path

SCALES = ("llama", "gemma", "granite", "bloom")
WORDS = "Classify if the tweet is a complaint or not:"


def peft_prompt(base, seed, num_virtual_tokens=6, **settings):
    """The prompt that PEFT starts from."""
    config = prompt_config(base, num_virtual_tokens)
    for name, value in settings.items():
        setattr(config, name, value)
    torch.manual_seed(seed)
    return get_peft_model(copy.deepcopy(base), config).prompt_encoder["default"].embedding.weight.detach()


@pytest.mark.parametrize("name", SCALES)
@pytest.mark.parametrize("num_virtual_tokens", [1, 6])
@pytest.mark.parametrize(
    "initialiser, theirs", [(init.random, "RANDOM"), (init.sample_vocabulary, "SAMPLE_VOCAB")]
)
def test_the_random_starts_of_peft_are_bit_equal(models, name, num_virtual_tokens, initialiser, theirs):
    expected = peft_prompt(models[name], 5, num_virtual_tokens, prompt_tuning_init=theirs)
    assert torch.equal(initialiser(models[name], num_virtual_tokens, seed=5), expected)
    torch.manual_seed(5)
    assert torch.equal(initialiser(models[name], num_virtual_tokens), expected)


@pytest.mark.parametrize("num_virtual_tokens", [1, 3, 25])
def test_the_text_start_of_peft_is_bit_equal(tiny, tokenizer, num_virtual_tokens):
    expected = peft_prompt(
        tiny,
        0,
        num_virtual_tokens,
        prompt_tuning_init="TEXT",
        prompt_tuning_init_text=WORDS,
        tokenizer_name_or_path=str(model_path()),
    )
    assert torch.equal(init.text(tiny, num_virtual_tokens, tokenizer, WORDS), expected)


def test_special_tokens_are_tiled_with_the_text_as_in_peft(tiny):
    class Closing:
        def __call__(self, words, add_special_tokens=True):
            return {"input_ids": [1, 9, 8, 2] if add_special_tokens else [9, 8]}

    tiled = init.text(tiny, 6, Closing(), "a b")
    assert torch.equal(tiled, vocabulary.embed(tiny, [1, 9, 8, 2, 1, 9]))
    rest = torch.arange(6.0)[:, None].expand(6, 128)
    once = init.text(tiny, 6, Closing(), "a b", tile=False, rest=rest)
    assert torch.equal(once, torch.cat([vocabulary.embed(tiny, [9, 8]), rest[2:]]))


def test_a_seed_leaves_the_global_generator_alone(tiny):
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    init.random(tiny, 4, seed=0)
    init.uniform(tiny, 4, seed=0)
    init.common_tokens(tiny, 4, seed=0)
    assert torch.equal(torch.rand(4), expected)


@pytest.mark.parametrize("name", SCALES)
def test_token_starts_are_what_the_model_sees_of_the_tokens(models, name):
    """A prompt made of tokens gives the logits of those tokens, wherever the model scales them."""
    model = models[name]
    text = torch.tensor([[5, 17, 80]])
    start = init.common_tokens(model, 3, population=40, seed=1)
    ids = [int((model.get_input_embeddings()(torch.arange(97)) - row).abs().sum(1).argmin()) for row in start]
    embeds = torch.cat([start[None], model.get_input_embeddings()(text)], dim=1)
    expected = model(input_ids=torch.cat([torch.tensor([ids]), text], dim=1)).logits
    torch.testing.assert_close(model(inputs_embeds=embeds).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", SCALES)
def test_matched_numbers_have_mean_and_deviation_of_the_tokens(models, table_of, name):
    table = table_of(models[name])
    prompt = init.matched(models[name], 4000, seed=0)
    tolerance = 5 * table.std(0, correction=0) / math.sqrt(4000)
    assert ((prompt.mean(0) - table.mean(0)).abs() < tolerance).all()
    torch.testing.assert_close(prompt.std(0), table.std(0, correction=0), rtol=0.06, atol=0)


def test_statistics_do_not_depend_on_the_size_of_the_blocks(models, table_of, monkeypatch):
    table = table_of(models["gemma"]).double()
    monkeypatch.setattr(vocabulary, "_BLOCK_BYTES", 7 * 8 * table.shape[1])
    mean, std = vocabulary.mean_and_std(models["gemma"])
    torch.testing.assert_close(mean, table.mean(0))
    torch.testing.assert_close(std, table.std(0, correction=0))


def test_uniform_numbers_fill_the_papers_interval(tiny):
    prompt = init.uniform(tiny, 500, seed=0)
    assert -0.5 <= prompt.min() < -0.499
    assert 0.499 < prompt.max() < 0.5
    assert abs(float(prompt.mean())) < 0.005


@pytest.mark.parametrize("name", SCALES)
def test_uniform_numbers_without_a_bound_vary_as_the_tokens_do(models, table_of, name):
    prompt = init.uniform(models[name], 4000, bound=None, seed=0)
    expected = table_of(models[name]).var(0, correction=0).mean().sqrt()
    torch.testing.assert_close(prompt.std(), expected, rtol=0.01, atol=0)


def ids_of(prompt, table):
    return [int((table - row).abs().sum(1).argmin()) for row in prompt]


def test_common_tokens_are_distinct_and_have_small_ids(tiny, table_of):
    ids = ids_of(init.common_tokens(tiny, 60, population=64, seed=0), table_of(tiny))
    assert len(set(ids)) == 60
    assert max(ids) < 64
    assert ids != sorted(ids)


def test_common_tokens_repeat_only_where_there_are_too_few(tiny, table_of):
    ids = ids_of(init.common_tokens(tiny, 60, population=10, seed=0), table_of(tiny))
    assert set(ids) == set(range(10))


def test_counted_tokens_are_the_most_frequent_of_the_texts(models, table_of):
    model, table = models["llama"], table_of(models["llama"])
    counts = init.count_tokens(model, LONG, ["a bbbb bbbb", "cc bbbb a"])
    assert {i: int(counts[i]) for i in counts.nonzero().flatten().tolist()} == {1: 2, 2: 1, 4: 3}
    assert len(counts) == 97
    prompt = init.common_tokens(model, 2, population=2, counts=counts, seed=0)
    assert set(ids_of(prompt, table)) == {1, 4}
    few = init.common_tokens(model, 30, counts=counts, seed=0)
    assert set(ids_of(few, table)) == {1, 2, 4}


@pytest.mark.parametrize("with_rest", [True, False])
def test_class_labels_are_the_means_of_their_tokens(tiny, tokenizer, table_of, with_rest):
    labels = ["complaint", "no complaint"]
    rest = torch.randn(5, 128) if with_rest else None
    prompt = init.class_labels(tiny, 5, tokenizer, labels, rest=rest, seed=4)
    table = table_of(tiny)
    for row, label in zip(prompt, labels, strict=False):
        ids = tokenizer(label, add_special_tokens=False)["input_ids"]
        torch.testing.assert_close(row, sum(table[i] for i in ids) / len(ids))
    assert len(tokenizer(labels[1], add_special_tokens=False)["input_ids"]) > 1
    assert torch.equal(prompt[2:], (rest if with_rest else init.common_tokens(tiny, 5, seed=4))[2:])


def test_a_prompt_is_set_in_place(tiny):
    model = get_peft_model(
        copy.deepcopy(tiny), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    )
    parameter = init.prompt_parameter(model)
    version, prompt = parameter._version, init.matched(tiny, 4, seed=0)
    assert init.set_prompt(model, prompt.double()) is model
    assert init.prompt_parameter(model) is parameter
    assert parameter.requires_grad
    assert parameter._version > version
    assert torch.equal(parameter, prompt)


def test_a_prompt_is_set_in_the_adapter_of_the_name(tiny):
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model = get_peft_model(copy.deepcopy(tiny), config)
    model.add_adapter("other", config)
    before = init.prompt_parameter(model).clone()
    init.set_prompt(model, torch.ones(4, 128), "other")
    assert torch.equal(init.prompt_parameter(model, "other"), torch.ones(4, 128))
    assert torch.equal(init.prompt_parameter(model), before)


def test_a_tensor_is_copied(tiny):
    given = torch.randn(3, 128, dtype=torch.bfloat16)
    prompt = init.from_tensor(tiny, given)
    assert torch.equal(prompt, given.float())
    same = torch.randn(3, 128)
    init.from_tensor(tiny, same).zero_()
    assert same.abs().sum() > 0


class Words:
    """One token a word: its length. No special tokens."""

    def __call__(self, words, add_special_tokens=True):
        return {"input_ids": [len(word) for word in words.split()]}


LONG = Words()
WRONG = {
    "no virtual tokens": (lambda m: init.random(m, 0), "num_virtual_tokens must be at least 1, got 0"),
    "empty text": (lambda m: init.text(m, 4, LONG, " "), "the text ' ' has no tokens: give other words"),
    "empty label": (
        lambda m: init.class_labels(m, 4, LONG, ["yes", " "]),
        "the label ' ' has no tokens: rename it, or start the prompt elsewhere",
    ),
    "no labels": (lambda m: init.class_labels(m, 4, LONG, []), "a sequence of one label or more, got []"),
    "a label alone": (lambda m: init.class_labels(m, 4, LONG, "yes"), "one label or more, got 'yes'"),
    "too many labels": (
        lambda m: init.class_labels(m, 1, LONG, ["yes", "no"]),
        "2 labels do not fit into 1 virtual tokens: expected a prompt of 2 virtual tokens or more",
    ),
    "rest of another length": (
        lambda m: init.class_labels(m, 4, LONG, ["a"], rest=torch.zeros(3, 48)),
        "rest has 3 virtual tokens, expected 4",
    ),
    "another tokenizer": (
        lambda m: init.text(m, 4, LONG, "x" * 97),
        "token id 97 is outside of the model's vocabulary of 97: the tokenizer is not that of the model",
    ),
    "another tokenizer, counted": (
        lambda m: init.count_tokens(m, LONG, ["x" * 120]),
        "token id 120 is outside of the model's vocabulary of 97",
    ),
    "no population": (lambda m: init.common_tokens(m, 4, population=0), "at least 1, got 0"),
    "counts of another vocabulary": (
        lambda m: init.common_tokens(m, 4, counts=torch.ones(5)),
        "counts must be [97] numbers of at least 0, some of them above, got shape [5]",
    ),
    "no counts": (lambda m: init.common_tokens(m, 4, counts=torch.zeros(97)), "with the sum 0"),
    "no interval": (lambda m: init.uniform(m, 4, bound=0.0), "bound must be a number above 0, got 0.0"),
    "another width": (
        lambda m: init.from_tensor(m, torch.zeros(4, 32)),
        "the prompt is 32 numbers wide, the model's tokens 48: it belongs to another model",
    ),
    "another length": (
        lambda m: init.from_tensor(m, torch.zeros(4, 48), num_virtual_tokens=5),
        "the prompt has 4 virtual tokens, expected 5",
    ),
    "one dimension": (
        lambda m: init.from_tensor(m, torch.zeros(48)),
        "must be floating-point numbers of shape [P, 48], got torch.float32 of shape [48]",
    ),
    "whole numbers": (
        lambda m: init.from_tensor(m, torch.zeros(4, 48, dtype=torch.int64)),
        "must be floating-point numbers of shape [P, 48], got torch.int64 of shape [4, 48]",
    ),
    "not finite": (
        lambda m: init.from_tensor(m, torch.full((4, 48), math.nan)),
        "the prompt has values that are not finite",
    ),
    "no tensor": (lambda m: init.from_tensor(m, [[1.0]]), "the prompt must be a tensor, got list"),
}


@pytest.mark.parametrize("call, message", WRONG.values(), ids=WRONG)
def test_wrong_arguments_are_said_in_one_sentence(models, call, message):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the message is compared below)
        call(models["llama"])
    assert message in str(caught.value)


def test_setting_names_what_does_not_fit(tiny):
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model = get_peft_model(copy.deepcopy(tiny), config)
    with pytest.raises(ValueError, match="the prompt has 3 virtual tokens, expected 4"):
        init.set_prompt(model, torch.zeros(3, 128))
    with pytest.raises(ValueError, match="no adapter 'other'; it has default"):
        init.set_prompt(model, torch.zeros(4, 128), "other")
    with pytest.raises(TypeError, match=r"expected a PEFT model .* got BloomForCausalLM"):
        init.set_prompt(tiny, torch.zeros(4, 128))


def test_an_adapter_of_another_type_is_refused(tiny):
    from peft import PrefixTuningConfig

    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model = get_peft_model(copy.deepcopy(tiny), config)
    with pytest.raises(
        ValueError, match="adapter 'default' is of type PREFIX_TUNING, expected PROMPT_TUNING"
    ):
        init.prompt_parameter(model)
