"""Modules of a language model that run as one op in packed calls."""

import copy
import functools

import pytest
import torch
from parity import assert_close, assert_same_step, make_batch, step
from patched_pairs import prompted
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from tiny_models import ARCHITECTURES, PACKED, build, pair
from tiny_models import prompted as prompted_architecture
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.gemma import modeling_gemma
from transformers.models.llama import modeling_llama

import softprompt
from softprompt.engine import fused_modules, model_spec
from softprompt.engine import plan as plan_module
from softprompt.nesting import base_of

BATCH = make_batch(side="left", labels="everywhere")
TEXTS = {name: BATCH[name] for name in ("input_ids", "attention_mask")}
# Of two layers: what runs as one op, by class and op.
FUSED = {
    "llama": {"LlamaRMSNorm rms_norm": 5, "LlamaMLP glu": 2, "LlamaAttention rotary": 2},
    "qwen3": {"Qwen3RMSNorm rms_norm": 9, "Qwen3MLP glu": 2, "Qwen3Attention rotary": 2},
    "gemma": {"GemmaRMSNorm rms_norm": 5, "GemmaMLP glu": 2, "GemmaAttention rotary": 2},
    "gemma3_text": {"Gemma3RMSNorm rms_norm": 13, "Gemma3MLP glu": 2, "Gemma3Attention rotary": 2},
    "granite": {"GraniteRMSNorm rms_norm": 5, "GraniteMLP glu": 2, "GraniteAttention rotary": 2},
    "cohere": {"CohereMLP glu": 2, "CohereAttention rotary": 2},  # its pairs are interleaved
    "phi": {"PhiAttention rotary": 2},  # a share of each head
    "gpt_oss": {"GptOssRMSNorm rms_norm": 5},
    "falcon": {},  # its attention is answered as a whole
    "bloom": {},
}


class Counted(TorchDispatchMode):
    """Counts operations that compute something, and those of this package by name."""

    def __init__(self):
        super().__init__()
        self.kernels, self.own = 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        namespace, name = func._schema.name.split("::")
        if namespace == "softprompt":
            self.own.append(name)
        made = func(*args, **(kwargs or {}))
        writes_nothing = func.is_view or name in (
            "detach",
            "empty",
            "new_empty",
            "empty_like",
            "_unsafe_view",
        )
        self.kernels += not writes_nothing
        return made


def ops_of(model, batch=BATCH):
    """The ops of this package in a step that counts."""
    with Counted() as counted:
        step(model, batch)
    return counted.own


def llama(dtype=torch.float32, **overrides):
    return prompted(build("llama", dtype, **overrides))


def patched_pair(model, **options):
    stock, fast = pair(model)
    return stock, softprompt.patch(fast, on_unsupported="error", **options)


def fusion_of(model):
    return fused_modules.find(model_spec.body_of(base_of(model)))


@pytest.mark.parametrize("name", FUSED)
def test_modules_are_found_by_structure(name):
    found = fusion_of(prompted_architecture(name, torch.float32))
    assert {f"{kind} {op}": count for kind, op, count in found.counts} == FUSED[name]


@pytest.mark.parametrize("name", PACKED)
def test_steps_are_pefts_with_and_without(name):
    model = prompted_architecture(name, torch.float32)
    for fused in (True, False):
        assert_same_step(patched_pair(model, fused=fused)[1], model, BATCH, bound=3e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3_text", "cohere", "phi"])
def test_16_bit_steps_are_as_near_to_the_truth_as_pefts(name, dtype):
    model = prompted_architecture(name, dtype)
    exact = copy.deepcopy(model).double()
    truth = step(exact, BATCH)
    errors = {}
    for fused in (None, False, True):
        one = copy.deepcopy(model)
        if fused is not None:
            softprompt.patch(one, fused=fused, on_unsupported="error")
        (grad,) = step(one, BATCH).grads.values()
        (expected,) = truth.grads.values()
        errors[fused] = float((grad.double() - expected).norm() / expected.norm())
    assert errors[True] <= 1.25 * errors[None], errors
    assert errors[True] <= 1.25 * errors[False], errors


def test_a_layer_takes_a_third_of_the_kernels():
    kernels = {}
    for fused in (False, True):
        of_layers = []
        for layers in (2, 3):
            model = softprompt.patch(llama(num_hidden_layers=layers), fused=fused, on_unsupported="error")
            step(model, BATCH)
            with Counted() as counted:
                step(model, BATCH)
            of_layers.append(counted.kernels)
        kernels[fused] = of_layers[1] - of_layers[0]
    assert kernels[True] <= 35, kernels
    assert kernels[False] >= 80, kernels


def test_the_option_turns_it_off_and_unpatch_leaves_nothing():
    model = llama()
    kinds = [type(module) for module in model.base_model.modules()]
    softprompt.patch(model, on_unsupported="error")
    step(model, BATCH)
    ops = ops_of(model)
    assert {"native_rms_norm", "native_glu", "native_rotary"} <= set(ops) or {
        "rms_norm",
        "glu",
        "rotary",
    } & set(ops)
    assert [type(module) for module in model.base_model.modules()] == kinds
    softprompt.patch(model, fused=False, on_unsupported="error")
    assert not any(name.endswith(("norm", "glu", "rotary")) for name in ops_of(model))
    softprompt.unpatch(model)
    assert not ops_of(model)
    with pytest.raises(ValueError, match="fused must be True or False"):
        softprompt.patch(model, fused="no")


def test_an_exception_inside_puts_the_classes_back():
    model = softprompt.patch(llama(), on_unsupported="error")
    step(model, BATCH)
    kinds = [type(module) for module in model.modules()]

    def fail(*_):
        raise KeyError("here")

    handle = base_of(model).model.layers[1].mlp.register_forward_pre_hook(fail)
    with pytest.raises(KeyError, match="here"):
        model(**BATCH)
    handle.remove()
    assert [type(module) for module in model.modules()] == kinds


def test_explain_lists_what_is_fused_and_what_is_not():
    model = softprompt.patch(prompted_architecture("cohere", torch.float32))
    text = str(softprompt.explain(model))
    assert "fused modules: 2 x CohereAttention (rotary), 2 x CohereMLP (glu)" in text
    assert "not fused: CohereLayerNorm: it normalises otherwise than rms_norm" in text
    assert "fused modules: none: patch(fused=False)" in str(
        softprompt.explain(softprompt.patch(model, fused=False))
    )
    assert "left to torch.compile" in str(softprompt.explain(softprompt.patch(model, compile=True)))
    double = softprompt.patch(prompted_architecture("llama"))
    assert "not fused: modules in float64 run as they are" in str(softprompt.explain(double))


def test_hooks_of_fused_modules_run():
    stock, fast = patched_pair(llama())
    seen = []
    for model in (stock, fast):
        body, numbers = base_of(model).model, []
        body.layers[0].input_layernorm.register_forward_hook(lambda module, given, out: out * 1.5)
        body.layers[1].mlp.register_forward_hook(lambda module, given, out: out * 0.5)
        body.layers[0].mlp.down_proj.register_forward_pre_hook(
            lambda module, given, numbers=numbers: numbers.append(given[0].detach().norm())
        )
        seen.append(numbers)
    assert_same_step(fast, stock, BATCH)
    assert len(seen[0]) == len(seen[1]) > 0


def test_a_hook_of_an_activation_runs():
    stock, fast = patched_pair(llama())
    for model in (stock, fast):
        mlp = base_of(model).model.layers[0].mlp
        mlp.act_fn.register_forward_hook(lambda module, given, out: out * 2)
    assert_same_step(fast, stock, BATCH)


def test_trained_weights_get_pefts_gradient():
    model = llama()
    base_of(model).model.norm.weight.requires_grad_(True)
    base_of(model).model.layers[0].mlp.up_proj.weight.requires_grad_(True)
    stock, fast = patched_pair(model)
    assert_same_step(fast, stock, BATCH)
    assert "native_rms_norm" in ops_of(fast) or "rms_norm" in ops_of(fast)  # the others


def test_adapters_inside_an_mlp_work():
    base = build("llama", torch.float32)
    torch.manual_seed(0)
    lora = get_peft_model(
        base, LoraConfig(target_modules=["gate_proj", "down_proj"], init_lora_weights=False)
    )
    model = get_peft_model(
        lora.base_model.model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    )
    stock, fast = patched_pair(model)
    assert_same_step(fast, stock, BATCH)
    assert "native_glu" in ops_of(fast) or "glu" in ops_of(fast)


class DoubledNorm(modeling_llama.LlamaRMSNorm):
    def forward(self, hidden_states):
        return 2 * super().forward(hidden_states)


class OwnName(modeling_llama.LlamaRMSNorm):
    pass


def test_subclasses_with_another_forward_are_left_alone():
    model = llama()
    layers = base_of(model).model.layers
    layers[0].input_layernorm.__class__ = DoubledNorm
    layers[1].input_layernorm.__class__ = OwnName
    stock, fast = patched_pair(model)
    assert_same_step(fast, stock, BATCH)
    assert {name: count for name, _, count in fusion_of(fast).counts if "m" in name}["OwnName"] == 1
    assert "DoubledNorm" not in {name for name, _, _ in fusion_of(fast).counts}


def test_what_changes_later_is_seen(monkeypatch):
    stock, fast = patched_pair(llama())
    step(fast, BATCH)
    for model in (stock, fast):
        body = base_of(model).model
        body.layers[0].input_layernorm.variance_epsilon = 0.5
        body.layers[1].mlp.act_fn = nn.ReLU()
    assert_same_step(fast, stock, BATCH)
    own = modeling_llama.apply_rotary_pos_emb

    class Halved:  # a callable that is no function
        def __call__(self, query, key, cos, sin, **kwargs):
            return own(query / 2, key, cos, sin, **kwargs)

    for replacement in (Halved(), own, lambda query, key, cos, sin: own(query, 2 * key, cos, sin), own):
        monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", replacement)
        assert_same_step(fast, stock, BATCH)
        assert softprompt.explain(fast).route == "packed"
    assert "native_rotary" in ops_of(fast) or "rotary" in ops_of(fast)


def test_a_forward_on_the_instance_is_called():
    stock, fast = patched_pair(llama())
    step(fast, BATCH)
    for model in (stock, fast):
        norm = base_of(model).model.norm
        norm.forward = lambda x, norm=norm: 3 * type(norm).forward(norm, x)
    assert_same_step(fast, stock, BATCH)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_layers_recompute_the_same(reentrant):
    stock, fast = patched_pair(llama())
    for model in (stock, fast):
        base_of(model).gradient_checkpointing_enable({"use_reentrant": reentrant})
        base_of(model).enable_input_require_grads()
        model.train()
    assert_same_step(fast, stock, BATCH)


def test_generate_gives_the_same_tokens():
    stock, fast = patched_pair(llama())
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(fast.generate(**TEXTS, **options), stock.generate(**TEXTS, **options))


def test_autocast_gives_what_the_modules_own_code_gives():
    model = llama()
    _, fast = patched_pair(model)
    _, plain = patched_pair(model, fused=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, expected = step(fast, BATCH), step(plain, BATCH)
    assert got.logits.dtype == expected.logits.dtype
    assert_close(got.loss, expected.loss, 2e-2, "loss")


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_the_ops_run_on_the_back_end_that_was_asked_for(backend):
    if not softprompt.ops.registry.availability(backend, "cpu").usable:
        pytest.skip("needs the interpreter")
    stock, fast = patched_pair(llama(), backend=backend)
    assert_same_step(fast, stock, BATCH)
    assert not any(name.startswith("native_") for name in ops_of(fast))
    rows = {op: chosen for op, chosen, _ in softprompt.explain(fast).backends}
    assert {rows["rms_norm"], rows["glu"], rows["rotary"]} == {backend}


def test_an_mlp_that_does_more_in_training_is_left_alone():
    # With p = 1 its dropout is the same in every call.
    settings = ARCHITECTURES["llama"][1] | {"residual_dropout": 1.0, "attention_dropout": 0.0}
    model = prompted(build("seed_oss", torch.float32, architectures={"seed_oss": ("seed_oss", settings)}))
    assert "SeedOssMLP" not in {name for name, _, _ in fusion_of(model).counts}
    assert "residual_dropout" in fused_modules.describe(fusion_of(model))[1]
    stock, fast = patched_pair(model)
    for one in (stock, fast):
        one.train()
    assert_same_step(fast, stock, BATCH)


def test_global_hooks_see_activations():
    stock, fast = patched_pair(llama())
    step(fast, BATCH)
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, given, out: out * 2 if type(module).__name__ == "SiLUActivation" else None
    )
    try:
        assert_same_step(fast, stock, BATCH)
    finally:
        handle.remove()


def other_inner_activation(body):
    body.layers[0].mlp.act_fn.act = torch.relu


def other_helper_on_the_instance(body):
    body.layers[0].input_layernorm._norm = lambda x: x / 2


@pytest.mark.parametrize("change", [other_inner_activation, other_helper_on_the_instance])
def test_attributes_that_change_what_a_module_computes_are_seen(change):
    stock, fast = patched_pair(prompted(build("gemma", torch.float32)))
    step(fast, BATCH)
    for model in (stock, fast):
        change(base_of(model).model)
    assert_same_step(fast, stock, BATCH)


@pytest.mark.parametrize("kind", [modeling_gemma.GemmaRMSNorm, modeling_gemma.GemmaMLP])
def test_a_wrapper_around_the_forward_of_a_class_is_called(kind, monkeypatch):
    factor = [1.0]
    own = kind.forward

    @functools.wraps(own)
    def forward(self, x):
        return factor[0] * own(self, x)

    monkeypatch.setattr(kind, "forward", forward)
    stock, fast = patched_pair(prompted(build("gemma", torch.float32)))
    for factor[0] in (1.0, 1.5):
        assert_same_step(fast, stock, BATCH)


def test_a_rotation_of_other_code_is_called(monkeypatch):
    factor = [1.0]
    own = modeling_llama.apply_rotary_pos_emb

    def rotate(query, key, cos, sin):
        return own(factor[0] * query, key, cos, sin)

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", rotate)
    stock, fast = patched_pair(llama())
    for factor[0] in (1.0, 1.5):
        assert_same_step(fast, stock, BATCH)


def test_what_a_rotation_calls_may_be_exchanged(monkeypatch):
    model = llama()
    own = modeling_llama.rotate_half
    assert "LlamaAttention" in {name for name, _, _ in fusion_of(model).counts}
    monkeypatch.setattr(modeling_llama, "rotate_half", lambda x: 0.5 * own(x))
    assert "LlamaAttention" not in {name for name, _, _ in fusion_of(model).counts}


class Swish(nn.Module):
    """SiLU, as long as its factor is 1."""

    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return x * torch.sigmoid(self.factor * x)


def test_an_activation_with_weights_or_other_code_is_left_alone():
    model = llama()
    base_of(model).model.layers[0].mlp.act_fn = Swish()
    stock, fast = patched_pair(model)
    assert_same_step(fast, stock, BATCH)
    assert "a Swish, has weights or code of its own" in str(softprompt.explain(fast))


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16, torch.device("meta")])
def test_defaults_of_the_process_do_not_matter(default):
    model = llama()
    expected = fusion_of(model)
    if isinstance(default, torch.device):
        with default:
            assert fusion_of(model) == expected
        return
    torch.set_default_dtype(default)
    try:
        assert fusion_of(model) == expected
    finally:
        torch.set_default_dtype(torch.float32)


def test_explain_says_where_the_self_check_refused_them(monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("broken here")

    model = llama()
    found = fusion_of(model)
    monkeypatch.setattr(fused_modules, "find", lambda body: found)
    monkeypatch.setattr(fused_modules, "glu", broken)
    fast = softprompt.patch(model, on_unsupported="error")
    text = str(softprompt.explain(fast))
    assert "fused modules: none" in text
    assert "broken here" in text


@pytest.mark.parametrize("seam", ["interface", "mask"])
def test_a_decoder_that_the_user_compiles_gives_the_same_step(seam, monkeypatch):
    monkeypatch.setattr(plan_module, "seams_for", lambda model: (seam,))
    stock, fast = patched_pair(llama())
    step(fast, BATCH)
    torch._dynamo.reset()
    base_of(fast).model.compile(backend="eager")
    assert_same_step(fast, stock, BATCH)
