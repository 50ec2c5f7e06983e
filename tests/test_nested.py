"""A prompt over another PEFT model, whose layers lie in the language model, and a LoRA over a prompt."""

import copy

import pytest
import torch
from generating import BATCH, patched, speaker, tokens
from parity import assert_close, assert_same_step, make_batch, prompt_of, step
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoraConfig,
    PeftMixedModel,
    PeftModel,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from seq2seq_models import build as build_seq2seq
from seq2seq_models import seq2seq_batch
from tiny_models import pair

import softprompt
from softprompt.engine.runner import UnsupportedModelError
from softprompt.ensemble import losses
from softprompt.generation.stock import right_options

QUERY_VALUE = ["q_proj", "v_proj"]


def lora(**options):
    return LoraConfig(
        task_type="CAUSAL_LM",
        **({"r": 4, "init_lora_weights": False, "target_modules": QUERY_VALUE} | options),
    )


def language_model(name="llama"):
    return speaker(name).get_base_model()


def with_prompt(model, config=None, name="default", seed=7):
    torch.manual_seed(seed)
    config = config or PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, num_attention_heads=1)
    return get_peft_model(model, config, adapter_name=name).double().eval()


def over(model, config, name="default", **options):
    """Another PEFT model over a model; its random weights are the same at every call."""
    torch.manual_seed(3)
    return get_peft_model(model, config, adapter_name=name, **options)


def as_one(nested):
    """What a prompt over PEFT models stands for: their layers in the language model, and one PEFT model."""
    model = nested.base_model
    while isinstance(model, PeftModel | PeftMixedModel):
        model = model.base_model.model
    model = with_prompt(copy.deepcopy(model))
    prompt_of(model).data.copy_(prompt_of(nested))
    return model


INNER = {
    "lora": lora(),
    "rslora with a bias": lora(use_rslora=True, lora_alpha=9, target_modules=["up_proj", "o_proj"]),
    "dora": lora(use_dora=True),
    "ia3": IA3Config(
        task_type="CAUSAL_LM",
        target_modules=["k_proj", "down_proj"],
        feedforward_modules=["down_proj"],
        init_ia3_weights=False,
    ),
    "without a task": LoraConfig(r=2, init_lora_weights=False, target_modules=QUERY_VALUE),
}


@pytest.mark.parametrize("kind", INNER)
def test_a_prompt_over_a_peft_model_is_a_prompt_on_its_layers(kind):
    config = INNER[kind]
    nested = with_prompt(over(language_model(), copy.deepcopy(config)))
    expected = as_one(nested)
    stock = copy.deepcopy(nested)
    patched(nested)
    assert softprompt.explain(nested).route == "packed"
    for side in ("left", "right"):
        assert_same_step(nested, stock, make_batch(side=side))
    for options in (
        {},
        {"num_beams": 3},
        {"do_sample": True, "num_return_sequences": 2},
        {"cache_implementation": "static"},
    ):
        own = {} if "cache_implementation" in options else options
        assert torch.equal(tokens(nested, **options), tokens(expected, **own)), options
    plain = with_prompt(language_model())
    assert not torch.equal(tokens(nested), tokens(plain))


@pytest.mark.parametrize("name", ["bloom", "gpt2", "gemma2", "opt", "mamba"])
def test_other_architectures_under_a_lora(name):
    targets = {"bloom": ["query_key_value"], "gpt2": ["c_attn"], "mamba": ["in_proj"]}
    config = lora(target_modules=targets.get(name, QUERY_VALUE))
    nested = with_prompt(over(language_model(name), config))
    expected = as_one(nested)
    softprompt.patch(nested)
    assert torch.equal(tokens(nested), tokens(expected, **right_options(expected)))
    got = nested(**make_batch()).loss.detach()
    assert_close(got, expected(**make_batch()).loss.detach(), 2e-6, "loss")


def test_what_peft_serves_of_generate_has_the_prompt_too():
    """PEFT itself leaves it out there: it sets its inputs on the model in between."""
    nested = with_prompt(over(language_model(), lora()))
    expected = as_one(nested)
    softprompt.patch(nested)
    with pytest.warns(UserWarning, match="use_cache=False was asked for"):
        got = tokens(nested, use_cache=False)
    assert torch.equal(got, tokens(expected, use_cache=False))
    assert torch.equal(tokens(nested), tokens(expected))
    assert "prepare_inputs_for_generation" not in vars(nested.get_base_model().get_base_model())


def test_the_lora_below_is_switched_merged_and_exchanged_between_calls():
    nested = with_prompt(over(language_model(), lora()))
    below = nested.base_model
    torch.manual_seed(5)
    below.add_adapter("other", lora())
    below.double()
    patched(nested)
    seen = []
    with below.disable_adapter():
        assert torch.equal(tokens(nested), tokens(as_one(nested)))
        seen.append(tokens(nested))
    for change in (
        lambda: below.set_adapter("other"),
        lambda: below.set_adapter("default"),
        lambda: below.base_model.set_adapter(["default", "other"]),
        lambda: below.set_adapter("other"),
        lambda: below.merge_adapter(),
        lambda: below.unmerge_adapter(),
        lambda: below.delete_adapter("other"),
    ):
        change()
        seen.append(tokens(nested))
        assert torch.equal(seen[-1], tokens(as_one(nested)))
        assert_close(
            nested(**make_batch()).loss.detach(), as_one(nested)(**make_batch()).loss.detach(), 2e-6, "loss"
        )
    assert len({str(one.tolist()) for one in seen}) >= 4
    with nested.disable_adapter():
        assert torch.equal(tokens(nested), tokens(below))


def test_a_lora_below_that_is_trained_with_the_prompt():
    nested = with_prompt(over(language_model(), lora()))
    for name, parameter in nested.named_parameters():
        parameter.requires_grad_("lora_" in name or "prompt_encoder" in name)
    stock = copy.deepcopy(nested)
    softprompt.patch(nested)
    expected, got = step(stock, make_batch()), step(nested, make_batch())
    assert len(expected.grads) == 9
    assert got.grads.keys() == expected.grads.keys()
    for name, grad in expected.grads.items():
        assert_close(got.grads[name], grad, 2e-5, name)


def test_a_saved_and_loaded_pair_of_peft_models(tmp_path):
    nested = with_prompt(over(language_model(), lora()))
    nested.save_pretrained(tmp_path / "prompt")
    nested.base_model.save_pretrained(tmp_path / "lora")
    loaded = PeftModel.from_pretrained(language_model(), tmp_path / "lora")
    loaded = PeftModel.from_pretrained(loaded, tmp_path / "prompt").double().eval()
    assert torch.equal(tokens(patched(loaded)), tokens(as_one(nested)))


def test_models_of_more_storeys_and_patched_ones_below():
    below = over(over(language_model(), lora()), lora(target_modules=["up_proj"]), "second")
    with pytest.warns(UserWarning, match="type LORA"):
        softprompt.patch(below)(**make_batch())
    nested = with_prompt(below)
    right = as_one(nested)
    patched(nested)
    assert softprompt.explain(nested).model.startswith("LlamaForCausalLM")
    assert torch.equal(tokens(nested), tokens(right))
    assert torch.equal(tokens(nested, do_sample=True), tokens(right, do_sample=True))


def test_a_mixed_peft_model_below():
    config = LoraConfig(r=2, init_lora_weights=False, target_modules=QUERY_VALUE)
    nested = with_prompt(over(language_model(), config, mixed=True))
    right = as_one(nested)
    assert torch.equal(tokens(patched(nested)), tokens(right))


def test_p_tuning_two_adapters_and_an_ensemble_over_a_lora():
    config = PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=8)
    nested = with_prompt(over(language_model(), lora()), config)
    torch.manual_seed(9)
    nested.add_adapter("other", PromptEncoderConfig(**config.to_dict() | {"num_virtual_tokens": 5}))
    nested.double()
    patched(nested)
    batch = make_batch(side="left", labels=None)
    mixed = tokens(nested, batch, adapter_names=["default", "other", "default"])
    for name, rows in (("default", [0, 2]), ("other", [1])):
        nested.set_adapter(name)
        assert torch.equal(tokens(nested, batch)[rows], mixed[rows])
    labelled = make_batch()
    each = losses(nested, adapters=["default", "other"], **labelled)
    for name, loss in zip(("default", "other"), each.each, strict=True):
        nested.set_adapter(name)
        assert_close(loss, nested(**labelled).loss.detach(), 2e-6, name)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_encoder_decoders_under_a_lora(name):
    targets = {"t5": ["q", "v"], "bart": QUERY_VALUE}[name]
    config = LoraConfig(task_type="SEQ_2_SEQ_LM", r=4, init_lora_weights=False, target_modules=targets)
    below = over(build_seq2seq(name), config)
    nested = with_prompt(below, PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=4))
    stock = copy.deepcopy(nested)
    softprompt.patch(nested)
    assert softprompt.explain(nested).route == "padded"
    batch = seq2seq_batch()
    expected, got = step(stock, batch), step(nested, batch)
    assert_close(got.loss, expected.loss, 2e-6, "loss")
    assert_close(got.logits, expected.logits, 2e-5, "logits")
    texts = {key: batch[key] for key in ("input_ids", "attention_mask")}
    got = nested.generate(**texts, max_new_tokens=6, do_sample=False)
    assert torch.equal(got, stock.generate(**texts, max_new_tokens=6, do_sample=False))
    rows = nested.generate(**texts, max_new_tokens=6, do_sample=False, adapter_names=["default"] * 3)
    assert torch.equal(rows, got)


# ------------------------------------------------------------------------------------ what cannot be skipped
def scaled(module, args, output):
    output.loss = output.loss * 2
    return output


def hooked(below):
    below.register_forward_hook(scaled)
    return below


def hooked_tuner(below):
    below.base_model.register_forward_hook(scaled)
    return below


def own_forward(below):
    stock = below.forward
    below.forward = lambda *args, **kwargs: scaled(None, None, stock(*args, **kwargs))
    return below


def own_class(below):
    class Doubled(type(below)):
        def forward(self, *args, **kwargs):
            return scaled(None, None, super().forward(*args, **kwargs))

    below.__class__ = Doubled
    return below


ADALORA = AdaLoraConfig(
    task_type="CAUSAL_LM", target_modules=QUERY_VALUE, init_r=4, total_step=9, init_lora_weights=False
)


@pytest.mark.parametrize(
    ("config", "change", "reason"),
    [
        (lora(), hooked, "a PeftModelForCausalLM below it has hooks"),
        (lora(), hooked_tuner, "a LoraModel below it has hooks"),
        (lora(), own_forward, "a PeftModelForCausalLM below it has hooks or a replaced forward"),
        (lora(), own_class, "a Doubled below it has a forward of its own"),
        (ADALORA, lambda below: below, "a AdaLoraModel below it does more than its layers"),
        (lora(alora_invocation_tokens=[5]), lambda below: below, "an activated LoRA below it"),
    ],
)
def test_what_the_model_in_between_does_is_left_to_peft(config, change, reason):
    nested = with_prompt(change(over(language_model(), config)))
    stock = nested(**make_batch()).loss.detach()
    with pytest.warns(UserWarning, match=reason):
        got = softprompt.patch(nested)(**make_batch()).loss
    assert_close(got.detach(), stock, 1e-9, "loss")
    assert reason in softprompt.explain(nested).reason


def test_two_prompts_one_over_the_other_have_pefts_loss_and_no_generate():
    below = with_prompt(language_model(), name="below")
    nested = with_prompt(below, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), "above", 8)
    stock = nested(**make_batch()).loss.detach()
    with pytest.warns(UserWarning, match="with a prompt of its own lies below it"):
        got = softprompt.patch(nested)(**make_batch()).loss
    assert_close(got.detach(), stock, 1e-9, "loss")
    assert_close(got.detach(), patched_loss_of_joined(below, nested), 2e-6, "loss")
    with pytest.raises(UnsupportedModelError, match="one prompt before another"):
        tokens(nested)


def patched_loss_of_joined(below, nested):
    """Of one prompt that is both: the lower one comes first."""
    prompts = [below.prompt_encoder["below"], nested.prompt_encoder["above"]]
    joined = torch.cat([encoder.embedding.weight for encoder in prompts]).detach()
    return softprompt.forward(below.get_base_model(), joined, **make_batch()).loss.detach()


# ----------------------------------------------------------------------------------------- LoRA over a prompt
@pytest.mark.parametrize("name", ["default", "lora"])
@pytest.mark.parametrize("patched_before", [False, True])
def test_a_lora_over_a_prompt_gives_what_peft_gives(name, patched_before):
    """Under the prompt's own name PEFT puts LoRA's configuration in its place, and leaves the prompt out."""

    def lower_and_upper(patch):
        lower = with_prompt(language_model())
        if patch:
            softprompt.patch(lower)
        upper = over(lower, lora(), name).double()
        return lower, upper

    expected, got = lower_and_upper(False), lower_and_upper(patched_before)
    softprompt.patch(got[0])
    for stock, fast in zip(expected, got, strict=True):
        assert_close(fast(**make_batch()).loss.detach(), stock(**make_batch()).loss.detach(), 2e-6, "loss")
        assert torch.equal(tokens(fast), tokens(stock))
        assert torch.equal(tokens(fast, num_beams=2), tokens(stock, num_beams=2))
    with_one_name = name == "default"
    assert ("type LORA" in softprompt.explain(got[0]).reason) == with_one_name
    alone = lower_and_upper(False)[0]
    assert torch.equal(tokens(got[0]), tokens(alone))


def test_loras_that_transformers_itself_adds():
    stock, fast = pair(speaker("llama"))
    for model in (stock, fast):
        torch.manual_seed(3)
        model.get_base_model().add_adapter(lora())
        model.get_base_model().double()
    assert torch.equal(tokens(patched(fast)), tokens(stock))
    assert_close(fast(**make_batch()).loss.detach(), stock(**make_batch()).loss.detach(), 2e-6, "loss")
    assert torch.equal(tokens(fast, BATCH, num_beams=2), tokens(stock, BATCH, num_beams=2))
