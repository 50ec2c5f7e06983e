"""Quantised bases: the numbers of an unpatched PEFT model over the same quantised weights."""

import copy
import pickle

import pytest
import torch
from messages import warned
from parity import assert_close, assert_same_step, make_batch, prompt_of, relative_error, step
from patched_pairs import FUSED, OWN, facts, patched_pair, prompted
from peft import PeftModel, prepare_model_for_kbit_training
from quantised_modules import Linear4bit, Linear8bitLt, QuantLinear, RoundedInput, replace_linears
from tiny_models import build, pair
from torch import nn

import softprompt
from softprompt.prompts import export

BATCH = make_batch(side="left", labels="everywhere")
# Where layers round their input to 8 bits, what is off by one ulp may be rounded the other way.
ROUNDED = 5e-3


def pickled(model):
    return pickle.loads(pickle.dumps(model))


# ------------------------------------------------------------------------------------------------- torchao
def torchao(kind, *, embedding=False, head=True):
    quantization = pytest.importorskip("torchao.quantization")
    config = {
        "int8": lambda: quantization.Int8WeightOnlyConfig(),
        "int4": lambda: quantization.IntxWeightOnlyConfig(torch.int4, granularity=quantization.PerGroup(16)),
        "float8": lambda: quantization.Float8WeightOnlyConfig(),
        "int8-dynamic": lambda: quantization.Int8DynamicActivationInt8WeightConfig(),
        "int8-dynamic-per-tensor": lambda: quantization.Int8DynamicActivationInt8WeightConfig(
            granularity=[quantization.PerTensor(), quantization.PerRow()]
        ),
    }[kind]()

    def quantise(base):
        kinds, skipped = (nn.Linear, nn.Embedding) if embedding else nn.Linear, base.get_output_embeddings()
        quantization.quantize_(
            base, config, lambda m, name: isinstance(m, kinds) and (head or m is not skipped)
        )
        return base

    return quantise


@pytest.mark.parametrize("kind", ["int8", "int4", "float8"])
@pytest.mark.parametrize("name", ["llama", "bloom", "gpt2"])
def test_weight_only_quantisation_of_torchao_is_exact_on_the_packed_route(name, kind):
    base = torchao(kind)(build(name, torch.float32))
    stock, fast = patched_pair(prompted(base))
    route, head, embedding = facts(fast)
    assert (route, embedding) == ("packed", "read from its table")
    assert head.startswith(OWN + "the head's weight is a ")
    assert_same_step(fast, stock, BATCH)


@pytest.mark.parametrize("tied", [False, True])
def test_a_head_that_was_left_dense_stays_fused(tied):
    base = torchao("int8", head=False)(build("llama", torch.float32, tie_word_embeddings=tied))
    stock, fast = patched_pair(prompted(base))
    assert facts(fast)[1].startswith(FUSED)
    assert_same_step(fast, stock, BATCH)


@pytest.mark.parametrize("tied", [False, True])
def test_a_quantised_embedding_is_called(tied):
    base = torchao("int4", embedding=True)(build("llama", torch.float32, tie_word_embeddings=tied))
    stock, fast = patched_pair(prompted(base))
    assert facts(fast)[2].startswith("called as a module: the embedding's table is a IntxUnpacked")
    assert_same_step(fast, stock, BATCH)


@pytest.mark.parametrize("inputs_and_outputs", [False, True])
def test_a_model_that_transformers_quantises_on_loading_is_served(inputs_and_outputs, tmp_path):
    from transformers import AutoModelForCausalLM, TorchAoConfig

    quantization = pytest.importorskip("torchao.quantization")
    build("llama", torch.float32).save_pretrained(tmp_path / "base")
    config = TorchAoConfig(
        quantization.Int8WeightOnlyConfig(), include_input_output_embeddings=inputs_and_outputs
    )
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=config)
    stock, fast = patched_pair(prompted(base))
    assert type(base.model.layers[0].mlp.up_proj.weight).__name__ == "Int8Tensor"
    assert facts(fast)[1].startswith(OWN if inputs_and_outputs else FUSED)
    assert_same_step(fast, stock, BATCH)
    texts = {name: BATCH[name] for name in ("input_ids", "attention_mask")}
    both = [model.generate(**texts, max_new_tokens=4, do_sample=False) for model in (stock, fast)]
    assert torch.equal(*both)
    fast.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter")
    assert torch.equal(prompt_of(loaded), prompt_of(fast))


# torchao gives its modules an `extra_repr` that cannot be pickled, patched or not.
@pytest.mark.parametrize("kind, twin_of", [("torchao", copy.deepcopy), ("packed", pickled)])
def test_copies_and_pickles_of_a_patched_quantised_model_compute_the_same(kind, twin_of):
    base = build("llama", torch.float32)
    base = torchao("int8")(base) if kind == "torchao" else replace_linears(base, Linear4bit, head=True)
    model = softprompt.patch(prompted(base))
    expected, twin = step(model, BATCH), twin_of(model)
    assert softprompt.explain(twin).patched
    got = step(twin, BATCH)
    assert torch.equal(got.loss, expected.loss)
    assert torch.equal(got.grads.popitem()[1], next(iter(expected.grads.values())))


def test_weights_that_are_quantised_behind_the_patch_are_looked_at_again():
    stock, fast = patched_pair(prompted(build("llama", torch.float32)))
    assert facts(fast)[1].startswith(FUSED)
    assert_same_step(fast, stock, BATCH)
    for model in (stock, fast):
        torchao("int4")(model.get_base_model())
    assert_same_step(fast, stock, BATCH)
    assert facts(fast)[1].startswith(OWN)


def test_a_decoder_that_is_quantised_behind_the_patch_is_looked_at_again():
    model = softprompt.patch(prompted(build("llama", torch.float32)))
    assert facts(model)[0] == "packed"
    torchao("int8-dynamic-per-tensor", head=False)(model.get_base_model())
    assert facts(model)[0] == "padded"


class Surprised(nn.Linear):
    """Computes otherwise where any token of the batch has a large number, under a name that nobody knows."""

    def forward(self, x):
        return super().forward(x) * (1.5 if x.detach().abs().max() > 6.0 else 1.0)


def test_what_a_large_number_in_a_pad_changes_keeps_the_rows_padded():
    """The self-check's own pads do not show it."""
    base = build("llama", torch.float32)
    base.model.layers[0].self_attn.q_proj.__class__ = Surprised
    base.model.layers[0].input_layernorm.weight.fill_(1.0)
    base.model.embed_tokens.weight[0] = torch.eye(48)[0] * 50
    stock, fast = patched_pair(prompted(base))
    assert "numbers that stand out in pads change the other tokens" in softprompt.explain(fast).reason
    batch = {**BATCH, "input_ids": BATCH["input_ids"] * BATCH["attention_mask"]}
    assert_same_step(fast, stock, batch, 1e-5)


def test_layers_that_are_exchanged_behind_the_patch_are_looked_at_again():
    stock, fast = patched_pair(prompted(build("llama", torch.float32)))
    for model in (stock, fast):
        replace_linears(model.get_base_model(), RoundedInput)
    assert_same_step(fast, stock, BATCH)
    assert facts(fast)[0] == "padded"


@pytest.mark.parametrize(
    "kind, reason",
    [
        ("int8-dynamic", "the loss has no gradient"),
        ("int8-dynamic-per-tensor", "round all tokens of the batch, pads included, with one scale"),
    ],
)
def test_rounded_activations_without_a_gradient_stay_on_the_forward_of_peft(kind, reason):
    stock, fast = pair(prompted(torchao(kind)(build("llama", torch.float32))))
    _, messages = warned(lambda: softprompt.patch(fast))
    assert len(messages) == 1
    assert reason in messages[0]
    assert reason in softprompt.explain(fast).reason
    assert torch.equal(fast(**BATCH).loss, stock(**BATCH).loss)


def test_rounded_activations_behind_a_dense_head_give_the_gradient_of_peft():
    """It lacks what goes through the rounded layers."""
    base = torchao("int8-dynamic", head=False)(build("llama", torch.float32))
    stock, fast = patched_pair(prompted(base))
    assert facts(fast)[0] == "packed"
    assert_same_step(fast, stock, BATCH, ROUNDED)


@pytest.mark.parametrize("granularity, route", [("PerRow", "packed"), ("PerTensor", "padded")])
def test_training_with_rounded_activations_is_packed_where_each_token_has_its_scale(granularity, route):
    quantization = pytest.importorskip("torchao.quantization")
    qat = pytest.importorskip("torchao.quantization.qat")
    base = build("llama", torch.float32)
    activations = qat.Float8FakeQuantizeConfig(granularity=getattr(quantization, granularity)())
    weights = qat.Float8FakeQuantizeConfig(granularity=quantization.PerRow())
    config = qat.QATConfig(activation_config=activations, weight_config=weights, step="prepare")
    quantization.quantize_(base.model, config)
    stock, fast = patched_pair(prompted(base.requires_grad_(False)))
    assert facts(fast)[0] == route
    assert_same_step(fast, stock, BATCH, ROUNDED)


# -------------------------------------------------------------------------- bitsandbytes, GPTQ, AWQ and HQQ
LAYERS = {"4bit": Linear4bit, "8bit": Linear8bitLt, "buffers": QuantLinear}


@pytest.mark.parametrize("head", [False, True], ids=["dense-head", "quantised-head"])
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("name", ["llama", "bloom"])
def test_layers_that_keep_their_weights_packed_are_exact_on_the_packed_route(name, kind, head):
    base = replace_linears(build(name, torch.float32), LAYERS[kind], head=head)
    stock, fast = patched_pair(prompted(base))
    route, text, _ = facts(fast)
    assert route == "packed"
    assert text.startswith(OWN + f"the head is a {LAYERS[kind].__name__}" if head else FUSED)
    assert_same_step(fast, stock, BATCH, *([ROUNDED] if kind == "8bit" else []))


def test_a_tied_head_stays_fused_over_quantised_layers():
    base = replace_linears(build("llama", torch.float32, tie_word_embeddings=True), Linear4bit)
    stock, fast = patched_pair(prompted(base))
    assert facts(fast)[1].startswith(FUSED)
    assert_same_step(fast, stock, BATCH)


def test_outliers_of_the_whole_batch_keep_the_rows_padded():
    base = replace_linears(build("llama", torch.float32), lambda linear: Linear8bitLt(linear, 2.0))
    stock, fast = patched_pair(prompted(base))
    report = softprompt.explain(fast)
    assert report.route == "padded"
    assert "llm_int8_threshold=2.0; with 0.0 each token is on its own" in report.reason
    assert_same_step(fast, stock, BATCH, ROUNDED)


@pytest.mark.parametrize(
    "make, reason",
    [
        (
            lambda linear: Linear8bitLt(linear, 2.0),
            "label rows cannot go through the head without the others",
        ),
        (RoundedInput, "no faster route gives the numbers"),
    ],
    ids=["known", "found out"],
)
def test_a_head_that_looks_at_all_rows_keeps_the_forward_of_peft(make, reason):
    base = replace_linears(build("llama", torch.float32), make, head=True, body=False)
    stock, fast = pair(prompted(base))
    _, messages = warned(lambda: softprompt.patch(fast))
    assert len(messages) == 1
    assert reason in softprompt.explain(fast).reason
    assert torch.equal(fast(**BATCH).loss, stock(**BATCH).loss)


def test_one_scale_for_all_tokens_is_found_out():
    base = replace_linears(build("llama", torch.float32), RoundedInput)
    stock, fast = patched_pair(prompted(base))
    assert facts(fast)[0] == "padded"
    assert_same_step(fast, stock, BATCH, ROUNDED)


class CastOutputToFloat(nn.Sequential):
    """What many training scripts put around the head."""

    def forward(self, x):
        return super().forward(x).float()


@pytest.mark.parametrize("cast_head", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_model_prepared_for_training_in_few_bits_is_exact(cast_head, reentrant):
    base = replace_linears(build("llama", torch.bfloat16), Linear4bit)
    base.is_loaded_in_4bit = True
    base = prepare_model_for_kbit_training(base, gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    assert base.is_gradient_checkpointing
    assert base.model.norm.weight.dtype == torch.float32
    if cast_head:
        base.lm_head = CastOutputToFloat(base.lm_head)
    stock, fast = patched_pair(prompted(base).train())
    route, head, _ = facts(fast)
    assert route == "packed"
    assert head.startswith(OWN + "the head is a CastOutputToFloat" if cast_head else FUSED)
    assert_same_step(fast, stock, BATCH)


# --------------------------------------------------------------------------------------------- mixed dtypes
def double(model):
    """The model in fp64, as the truth."""
    truth = copy.deepcopy(model).double()
    for module in truth.modules():
        if isinstance(module, Cast):
            module.dtype = torch.float64
        if isinstance(module, Linear4bit):
            module.compute_dtype = None
            state = module.weight.quant_state
            state.scale = state.scale.double()
    return truth


def fp32_norms(base):
    """As a hook of some scripts leaves them: norms in fp32, cast back behind."""
    norm = base.model.norm
    base.model.norm = nn.Sequential(norm.float(), Cast(torch.bfloat16))
    return base


class Cast(nn.Module):
    def __init__(self, dtype):
        super().__init__()
        self.dtype = dtype

    def forward(self, x):
        return x.to(self.dtype)


def fp32_head(base):
    base.lm_head = nn.Sequential(Cast(torch.float32), base.lm_head.float())
    return base


def in_bf16_layers(base):
    return replace_linears(base, lambda linear: Linear4bit(linear, torch.bfloat16))


MIXED = {
    "bf16 with an fp32 head": (torch.bfloat16, fp32_head),
    "bf16 with an fp32 norm": (torch.bfloat16, fp32_norms),
    "fp16": (torch.float16, lambda base: base),
    "4 bits and bf16 products in fp32": (torch.float32, in_bf16_layers),
    "4 bits in bf16": (torch.bfloat16, in_bf16_layers),
}


@pytest.mark.parametrize("dtype, change", MIXED.values(), ids=MIXED)
def test_mixed_dtypes_are_packed_with_no_more_error_than_pefts_own(dtype, change):
    stock, fast = patched_pair(prompted(change(build("llama", dtype))))
    assert facts(fast)[0] == "packed"
    truth = double(stock)
    # A single loss may happen to hit the truth, which depends on how a processor rounds.
    batches = [make_batch(labels="everywhere", seed=seed) for seed in range(4)]
    steps = [[step(model, batch) for model in (truth, stock, fast)] for batch in batches]
    for what in ("loss", "grads"):
        theirs, ours = 0.0, 0.0
        for one in steps:
            true, peft, own = (next(iter(s.grads.values())) if what == "grads" else s.loss for s in one)
            theirs += relative_error(peft, true) / len(steps)
            ours += relative_error(own, true) / len(steps)
        assert ours <= 2 * theirs + 2e-3, what


def test_a_head_that_casts_its_logits_keeps_their_dtype_under_autocast():
    base = build("llama", torch.float32)
    base.lm_head = CastOutputToFloat(base.lm_head)
    stock, fast = patched_pair(prompted(base))
    with torch.autocast("cpu", torch.bfloat16):
        expected, got = stock(**BATCH).logits, fast(**BATCH).logits
    assert got.dtype == expected.dtype == torch.float32
    grads = []
    for model, logits in ((stock, expected), (fast, got)):
        (grad,) = torch.autograd.grad(logits[:, -1].square().sum(), prompt_of(model))
        grads.append(grad)
    assert_close(grads[1], grads[0], 5e-2, "gradient of the prompt")


def test_the_vectors_of_a_quantised_table_are_exported_as_the_model_gets_them():
    base = build("llama", torch.float32)
    table = base.model.embed_tokens

    class Int8Embedding(nn.Module):
        def __init__(self):
            super().__init__()
            self.num_embeddings, self.embedding_dim = table.num_embeddings, table.embedding_dim
            self.scale = table.weight.abs().max() / 127
            weight = (table.weight / self.scale).round().to(torch.int8)
            self.weight = nn.Parameter(weight, requires_grad=False)

        def forward(self, ids):
            return self.weight[ids] * self.scale

    base.set_input_embeddings(Int8Embedding())
    stock, fast = patched_pair(prompted(base))
    assert_same_step(fast, stock, BATCH)
    embeds = export.prompt_embeds(fast, [5, 6])
    assert embeds.dtype == torch.float32
    assert torch.equal(embeds[4:], base.model.embed_tokens(torch.tensor([5, 6])))
