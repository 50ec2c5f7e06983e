"""Statements 1 to 3, 22 and 25 of the contract: what an adapter is, and what is done with adapters."""

import functools

import pytest
import torch
from parity import assert_close, assert_same_step, make_batch, outcome, prompt_of, step
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from tiny_models import build, pair, prompt_config, prompted
from transformers import AutoModelForCausalLM

import softprompt
from softprompt.tiny import model_path

BATCH = make_batch(side="left", labels="everywhere")
P, D = 4, 48


@functools.cache
def built():
    return prompted("llama")


def models(**options):
    stock, fast = pair(built())
    return stock, softprompt.patch(fast, **({"on_unsupported": "error"} | options))


def test_01_the_prompt_alone_is_trainable_and_the_base_is_the_same_object():
    base = build("llama")
    stock = get_peft_model(build("llama"), prompt_config(base))
    fast = softprompt.patch(get_peft_model(base, prompt_config(base)))
    step(fast.double(), BATCH)
    assert fast.get_base_model() is base
    for model in (stock, fast):
        trainable = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
        assert trainable == {"prompt_encoder.default.embedding.weight": P * D}
        assert not any(p.requires_grad for p in model.get_base_model().parameters())
    assert list(fast.state_dict()) == list(stock.state_dict())
    assert [name for name, _ in fast.named_modules()] == [name for name, _ in stock.named_modules()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_02_the_prompt_is_fp32_and_cast_to_the_dtype_of_the_base(dtype, tmp_path):
    base = build("llama", dtype)
    torch.manual_seed(0)
    stock, fast = pair(get_peft_model(base, prompt_config(base)))
    softprompt.patch(fast, on_unsupported="error")
    bound = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    assert_same_step(fast, stock, BATCH, bound)
    assert prompt_of(fast).dtype == prompt_of(fast).grad.dtype == torch.float32
    assert fast(**BATCH).logits.dtype == stock(**BATCH).logits.dtype == dtype
    for saved in (torch.float32, torch.bfloat16):
        if saved == torch.bfloat16:
            fast.to(saved)
        fast.save_pretrained(tmp_path)
        tensor = load_file(tmp_path / "adapter_model.safetensors")["prompt_embeddings"]
        assert tensor.dtype == saved
        assert torch.equal(tensor, prompt_of(fast))


INITIALISATIONS = {
    "RANDOM": {},
    "SAMPLE_VOCAB": {"prompt_tuning_init": "SAMPLE_VOCAB"},
    "TEXT, tiled": {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "the app"},
    "TEXT, cut": {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "the app crashed again and again"},
}


def new_adapter(model, settings):
    """Adds an adapter at a fixed seed: its prompt, and what the random generator gives afterwards."""
    if settings:
        settings = settings | {"tokenizer_name_or_path": str(model_path())}
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=6, **settings)
    torch.manual_seed(7)
    model.add_adapter("new", config)
    return prompt_of(model, "new").detach().clone(), torch.rand(3)


@pytest.mark.parametrize("settings", INITIALISATIONS.values(), ids=INITIALISATIONS)
def test_03_prompts_begin_as_in_peft_at_the_same_seed(settings):
    shipped = get_peft_model(
        AutoModelForCausalLM.from_pretrained(model_path()),
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    )
    stock, fast = pair(shipped)
    softprompt.patch(fast)
    (expected, expected_draw), (got, draw) = (new_adapter(model, settings) for model in (stock, fast))
    assert got.dtype == torch.float32
    assert torch.equal(got, expected)
    assert torch.equal(draw, expected_draw)


def test_03_rows_of_a_scaled_embedding_are_scaled():
    stock, fast = pair(prompted("gemma"))
    softprompt.patch(fast)
    config = {"prompt_tuning_init": "SAMPLE_VOCAB"}
    (expected, _), (got, _) = (new_adapter(model, config) for model in (stock, fast))
    assert torch.equal(got, expected)
    table = fast.get_input_embeddings().weight.float()
    assert torch.cdist(got, table * D**0.5).min(1).values.max() < 0.1


def test_03_patching_draws_nothing():
    _, fast = pair(built())
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    softprompt.patch(fast)
    assert torch.equal(torch.rand(3), expected)


WRONG_SETTINGS = {
    "no tokenizer": {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "a"},
    "no text": {"prompt_tuning_init": "TEXT", "tokenizer_name_or_path": "a"},
    "no use for them": {"tokenizer_kwargs": {"a": 1}},
    "no such task": {"task_type": "NONE"},
}


@pytest.mark.parametrize("settings", WRONG_SETTINGS.values(), ids=WRONG_SETTINGS)
def test_03_wrong_settings_are_the_same_error(settings):
    def add(model):
        settings_of_all = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 2} | settings
        model.add_adapter("new", PromptTuningConfig(**settings_of_all))

    expected, got = (outcome(add, model) for model in models())
    assert got.error == expected.error
    assert got.error[0] is ValueError


def test_03_inference_mode_needs_no_tokenizer(tmp_path):
    def add(model):
        config = PromptTuningConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=2,
            prompt_tuning_init="TEXT",
            prompt_tuning_init_text="a",
            tokenizer_name_or_path=str(tmp_path),  # nothing is there
            inference_mode=True,
        )
        torch.manual_seed(7)
        model.add_adapter("new", config)
        return prompt_of(model, "new")

    expected, got = (outcome(add, model) for model in models())
    assert got.error is None
    assert torch.equal(got.value, expected.value)


def test_22_adapters_of_other_lengths_are_added_switched_loaded_and_deleted(tmp_path):
    stock, fast = models()
    steps = []
    for model in (stock, fast):
        torch.manual_seed(5)
        model.add_adapter("long", prompt_config(model.get_base_model(), 7))
        assert model.active_adapter == "default"  # adding does not activate
        before = step(model.double(), BATCH)
        model.set_adapter("long")
        after = step(model, BATCH)
        folder = tmp_path / str(model is fast)
        model.save_pretrained(folder)
        assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == ["long"]
        model.load_adapter(folder / "long", "again")
        model.double().set_adapter("again")
        loaded = step(model, BATCH)
        model.delete_adapter("again")
        model.set_adapter("default")
        steps.append((before, after, loaded, step(model, BATCH)))
        assert list(model.peft_config) == ["default", "long"]
    for expected, got in zip(*steps, strict=True):
        assert_close(got.loss, expected.loss, 2e-6, "loss")
        assert got.grads.keys() == expected.grads.keys()
        for name, grad in expected.grads.items():
            assert_close(got.grads[name], grad, 2e-5, name)
    assert steps[1][0].loss != steps[1][1].loss


def test_22_prompts_of_inactive_adapters_stay_trainable():
    for model in models():
        model.add_adapter("other", prompt_config(model.get_base_model()))
        assert all(prompt_of(model, name).requires_grad for name in ("default", "other"))


WRONG_CALLS = {
    "an unknown adapter": lambda model: model.set_adapter("unknown"),
    "deleting an unknown adapter": lambda model: model.delete_adapter("unknown"),
    "a name that is taken": lambda model: model.add_adapter("default", prompt_config(model)),
    "LoRA": lambda model: model.add_adapter("other", LoraConfig(task_type="CAUSAL_LM")),
    "prefix tuning": lambda model: model.add_adapter(
        "other", PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    ),
}


@pytest.mark.parametrize("call", WRONG_CALLS.values(), ids=WRONG_CALLS)
def test_22_wrong_adapters_are_the_same_error(call):
    expected, got = (outcome(call, model) for model in models())
    assert expected.error is not None
    assert got.error == expected.error


MERGES = {
    "merge_and_unload": lambda model: model.merge_and_unload(),
    "unload": lambda model: model.unload(),
    "merge_adapter": lambda model: model.merge_adapter(),
    "add_weighted_adapter": lambda model: model.add_weighted_adapter(["default"], [1.0], "sum"),
    "set_requires_grad": lambda model: model.set_requires_grad("default"),
    "get_layer_status": lambda model: model.get_layer_status(),
    "get_model_status": lambda model: model.get_model_status(),
    "a mixed model": lambda model: get_peft_model(
        model.get_base_model(), prompt_config(model.get_base_model()), mixed=True
    ),
}


@pytest.mark.parametrize("call", MERGES.values(), ids=MERGES)
def test_25_merging_unloading_and_mixing_fail_as_in_peft(call):
    expected, got = (outcome(call, model) for model in models())
    assert expected.error is not None
    assert got.error == expected.error


def test_25_adapter_names_give_each_row_its_adapter_where_peft_ignores_them():
    stock, fast = models()
    for model in (stock, fast):
        torch.manual_seed(5)
        model.add_adapter("long", prompt_config(model.get_base_model(), 7))
        model.double()
    names = ["long", "default", "long"]
    ignored = outcome(stock, **BATCH, adapter_names=names)
    if ignored.error is None:
        assert torch.equal(ignored.value.loss, stock(**BATCH).loss)
    total = torch.zeros((), dtype=torch.float64)
    stock.zero_grad()
    for row, name in enumerate(names):
        stock.set_adapter(name)
        one = {key: value[row : row + 1] for key, value in BATCH.items()}
        loss = stock(**one, num_items_in_batch=5).loss
        loss.backward()
        total += loss.detach()
    got = step(fast, BATCH, adapter_names=names, num_items_in_batch=5)
    assert_close(got.loss, total, 2e-6, "loss")
    for name in ("default", "long"):
        assert_close(prompt_of(fast, name).grad, prompt_of(stock, name).grad, 2e-5, name)
