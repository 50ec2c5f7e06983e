"""BLOOM, Falcon, MPT and GPT-Neo compute their attention inside their modules, and are answered there."""

import copy
import gc
import weakref

import pytest
import torch
from parity import assert_close, assert_same_step, make_batch, prompt_of, relative_error, step
from tiny_models import build, pair, prompt_config, prompted
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import softprompt
from softprompt.engine import attention_modules, model_spec
from softprompt.engine.attention import alibi_slopes
from softprompt.engine.attention_overrides import (
    AttentionContext,
    UnsupportedAttentionError,
    packed_attention,
)
from softprompt.engine.plan import make_plan
from softprompt.engine.structure import structure_of
from softprompt.layout import build_layout

NAMES = [
    "bloom-6-heads",
    "falcon",
    "falcon-groups",
    "falcon-alibi",
    "falcon-alibi-own-keys",
    "mpt",
    "gpt_neo",
]
BATCHES = {
    "left, everywhere": make_batch(side="left", labels="everywhere"),
    "left, first": make_batch(side="left", labels="first"),
    "right, first": make_batch(side="right", labels="first"),
    "right, answer": make_batch(side="right", labels="answer"),
    "holes": make_batch(side="left", labels="everywhere", holes=True),
    "holes on the right": make_batch(side="right", labels="answer", holes=True),
    "longer than a window": make_batch((14, 11, 12), "left", "everywhere", width=15),
    "longer than the probe": make_batch((30, 12, 21, 9, 26), "right", "everywhere", width=36),
}


def patched(name, **overrides):
    stock, fast = pair(prompted(name, **overrides))
    return stock, softprompt.patch(fast, on_unsupported="error")


@pytest.mark.parametrize("name", NAMES)
def test_every_padding_and_every_label_gives_the_numbers_of_peft(name):
    stock, fast = patched(name)
    assert softprompt.explain(fast).route == "packed"
    for batch in BATCHES.values():
        assert_same_step(fast, stock, batch)


@pytest.mark.parametrize("name", NAMES)
def test_single_precision_gives_the_numbers_of_peft(name):
    stock, fast = patched(name, dtype=torch.float32)
    assert_same_step(fast, stock, BATCHES["longer than a window"], bound=2e-5)


@pytest.mark.parametrize("name", ["falcon", "falcon-alibi", "falcon-alibi-own-keys"])
def test_falcons_eager_attention_adds_its_bias_twice_and_so_does_the_answer(name):
    stock, fast = patched(name, implementation="eager")
    assert_same_step(fast, stock, BATCHES["holes"])


def test_rotary_falcon_is_exact_with_a_dense_mask_where_its_modules_cannot_be_answered():
    stock, fast = pair(prompted("falcon"))
    for model in (stock, fast):
        attention = model.get_base_model().transformer.h[0].self_attention
        attention.forward = type(attention).forward.__get__(attention)
    softprompt.patch(fast)
    assert make_plan(fast.get_base_model()).seam == "dense"
    assert_same_step(fast, stock, BATCHES["holes"])


@pytest.mark.parametrize("name", NAMES)
def test_rows_of_two_adapters_give_the_numbers_of_peft(name):
    stock = prompted(name)
    stock.add_adapter("six", prompt_config(stock.get_base_model(), 6))
    stock.prompt_encoder.double()
    stock, fast = pair(stock)
    softprompt.patch(fast, on_unsupported="error")
    batch = make_batch(side="left", labels="everywhere")
    fast.zero_grad()
    loss = fast(**batch, adapter_names=["six", "default", "six"], num_items_in_batch=1).loss
    loss.backward()
    expected = 0
    for adapter, rows in {"default": [1], "six": [0, 2]}.items():
        stock.set_adapter(adapter)
        part = step(stock, {key: value[rows] for key, value in batch.items()}, num_items_in_batch=1)
        expected = expected + part.loss
        assert_close(prompt_of(fast, adapter).grad, prompt_of(stock, adapter).grad, 2e-5, adapter)
    assert_close(loss.detach(), expected, 2e-6, "loss")


@pytest.mark.parametrize("name", NAMES)
def test_a_compact_batch_equals_its_rows_without_pads(name):
    stock, fast = pair(prompted(name))
    softprompt.patch(fast, on_unsupported="error", positions="compact")
    batch = make_batch((9, 3, 12), "left", "everywhere")
    got = step(fast, batch, num_items_in_batch=1)
    loss, grad = 0, 0
    for row, mask in enumerate(batch["attention_mask"].bool()):
        alone = {key: value[row][mask][None] for key, value in batch.items()}
        one = step(stock, alone, num_items_in_batch=1)
        loss, grad = loss + one.loss, grad + prompt_of(stock).grad
    assert_close(got.loss, loss, 2e-6, "loss")
    assert_close(prompt_of(fast).grad, grad, 2e-5, "gradient")


def in_a_packed_call(model, num_tokens=4):
    body, plan = model_spec.body_of(model), make_plan(model)
    layout = build_layout(torch.ones(2, num_tokens, dtype=torch.int64), [3])
    packing = AttentionContext(layout, model_spec.decoder_facts(model))
    return body, packed_attention(body, plan.seam, packing), layout.num_rows


DROPOUT = {
    "bloom": ({"attention_dropout": 0.4, "hidden_dropout": 0.3}, "BloomAttention"),
    "falcon-alibi": ({"attention_dropout": 0.4}, "FalconAttention"),
    "mpt": ({}, "MptAttention"),  # whose configuration takes no fraction
    "gpt_neo": ({"attention_dropout": 0.4, "resid_dropout": 0.3}, "GPTNeoSelfAttention"),
}


@pytest.mark.parametrize("name", DROPOUT)
def test_dropout_changes_every_draw_of_the_attention_but_not_its_mean(name):
    settings, kind = DROPOUT[name]
    model = build(name, **settings)
    body, call, num_rows = in_a_packed_call(model)
    module = next(module for module in body.modules() if type(module).__name__ == kind)
    torch.manual_seed(0)
    hidden = torch.randn(1, num_rows, model_spec.config_of(model).hidden_size, dtype=torch.float64)
    extra = {"bloom": {"residual": torch.zeros_like(hidden)}, "mpt": {"position_bias": None}}.get(name, {})
    alibi = {"alibi": hidden[:, :1]} if name in ("bloom", "falcon-alibi") else {}
    with call, torch.no_grad():
        arguments = {"hidden_states": hidden, "attention_mask": None, **extra, **alibi}
        expected = module(**arguments)[0]
        module.train()
        if name == "mpt":
            module.attn_dropout_p = 0.4
        draws = torch.stack([module(**arguments)[0] for _ in range(600)])
    assert (draws[0] != draws[1]).any()
    error = draws.std(0) / 600**0.5
    assert ((draws.mean(0) - expected).abs() < 6 * error + 1e-9).all()


SLOPES = {
    "bloom": lambda m, heads: m.build_alibi_tensor(torch.ones(1, 3), heads, torch.float32)[:, 0, 1],
    "falcon": lambda m, heads: m.build_alibi_tensor(torch.ones(1, 3), heads, torch.float32)[:, 0, 1],
    "mpt": lambda m, heads: -m.build_mpt_alibi_tensor(heads, 3)[:, 0, 1],
}


@pytest.mark.parametrize("heads", [4, 6, 32, 112])
@pytest.mark.parametrize("model_type", SLOPES)
def test_slopes_are_bit_equal_to_the_models_own_and_made_once(model_type, heads):
    code = __import__(f"transformers.models.{model_type}.modeling_{model_type}", fromlist=["code"])
    slopes = alibi_slopes(model_type, heads, torch.device("cpu"))
    assert torch.equal(slopes, SLOPES[model_type](code, heads))
    assert alibi_slopes(model_type, heads, torch.device("cpu")) is slopes


class Operations(TorchDispatchMode):
    """Names of the operations that run."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", [*NAMES, "llama", "gemma2", "gpt2"])
def test_entering_and_running_the_decoder_copies_nothing_from_the_host_and_reads_nothing(name):
    model = build(name, dtype=torch.float32)
    body, call, num_rows = in_a_packed_call(model)
    arguments = {"inputs_embeds": torch.randn(1, num_rows, 32 if name == "bloom" else 48), "use_cache": False}
    if model_spec.takes_position_ids(body):
        arguments["position_ids"] = torch.arange(num_rows)[None]
    mask = torch.ones(1, num_rows, dtype=torch.bool)
    with Operations() as seen, call, torch.no_grad():
        body(attention_mask=mask, **arguments)
    assert "aten::addmm" in seen.names or "aten::mm" in seen.names
    assert not seen.names & {"aten::lift_fresh", "aten::_local_scalar_dense", "aten::nonzero", "aten::item"}


@pytest.mark.parametrize("name", NAMES)
def test_after_a_call_every_module_has_its_class_again_also_after_an_exception(name):
    model = build(name)
    body, call, _ = in_a_packed_call(model)
    classes = [type(module) for module in body.modules()]
    inside = []

    def fail():
        with call:
            inside.extend(type(module) for module in body.modules())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert inside != classes
    assert [kind.__name__ for kind in inside] == [kind.__name__ for kind in classes]
    assert [type(module) for module in body.modules()] == classes


def test_a_packed_call_meets_the_same_classes_every_time():
    model = build("bloom")
    body = model_spec.body_of(model)
    first, second = attention_modules.answered(body, "bloom"), attention_modules.answered(body, "bloom")
    assert [entry[2] for entry in first] == [entry[2] for entry in second]
    assert len({entry[2] for entry in first}) == 2  # attention and GELU


class Attention(nn.Module):
    def forward(self, hidden_states, **kwargs):
        return hidden_states, None


class Doubled:
    """A stock attention with a forward of its own."""

    def forward(self, *args, **kwargs):
        out, weights = super().forward(*args, **kwargs)
        return out * 2, weights


def exchange_an_attention(layer):
    layer.self_attention = Attention()


def replace_a_forward(layer):
    layer.self_attention.forward = lambda *args, **kwargs: None


def derive_a_class(layer):
    kind = type(layer.self_attention)
    layer.self_attention.__class__ = type("Derived", (Doubled, kind), {})


@pytest.mark.parametrize("change", [exchange_an_attention, replace_a_forward, derive_a_class])
def test_a_module_that_is_no_longer_what_was_known_is_seen_at_the_next_call(change):
    model = build("bloom")
    body = model_spec.body_of(model)
    assert attention_modules.obstacle(body, "bloom") is None
    change(body.h[1])
    with pytest.raises(UnsupportedAttentionError, match=r"layer 1 has 0 modules|replaced on the instance"):
        attention_modules.answered(body, "bloom")


def test_a_class_that_keeps_the_stock_forward_is_answered():
    stock, fast = pair(prompted("bloom"))
    for layer in fast.get_base_model().transformer.h:
        kind = type(layer.self_attention)
        layer.self_attention.__class__ = type("Sharded", (kind,), {})
    softprompt.patch(fast, on_unsupported="error")
    assert_same_step(fast, stock, BATCHES["holes"])


def test_a_replaced_layer_and_a_hook_act_at_the_next_call():
    stock, fast = patched("bloom")
    assert_same_step(fast, stock, BATCHES["holes"])
    before = step(fast, BATCHES["holes"]).loss
    for model in (stock, fast):
        layers = model.get_base_model().transformer.h
        layers[0] = copy.deepcopy(layers[1])
        layers[0].self_attention.layer_idx = 0
        layers[1].self_attention.register_forward_hook(lambda module, args, output: (output[0] * 2, None))
    assert_same_step(fast, stock, BATCHES["holes"])
    assert relative_error(step(fast, BATCHES["holes"]).loss, before) > 1e-3


def test_what_depends_on_modules_is_looked_up_again_when_one_was_exchanged():
    model = build("gpt2-dropout")
    body = model_spec.body_of(model)
    structure = structure_of(body)[0]
    assert structure_of(body)[0] is structure
    assert model_spec.dropout_of(model) == ["Dropout(p=0.1)"]
    body.drop.p = 0.25
    assert model_spec.dropout_of(model) == ["Dropout(p=0.1)", "Dropout(p=0.25)"]
    body.drop = nn.Dropout(0.5)
    assert model_spec.dropout_of(model) == ["Dropout(p=0.1)", "Dropout(p=0.5)"]
    assert structure_of(body)[0] is not structure
    assert structure_of(body)[1] == list(body.modules())


def test_what_is_known_of_a_model_does_not_keep_it_alive_not_even_where_its_hooks_hold_it():
    body = model_spec.body_of(build("bloom"))
    body.h[0].self_attention.register_forward_hook(lambda module, args, output, held=body: None)
    assert attention_modules.obstacle(body, "bloom") is None
    alive = weakref.ref(body)
    del body
    gc.collect()
    assert alive() is None


def test_checkpointing_that_is_switched_on_is_seen():
    model = build("llama").train()
    body = model_spec.body_of(model)
    assert not model_spec.uses_gradient_checkpointing(body)
    model.gradient_checkpointing_enable()
    assert model_spec.uses_gradient_checkpointing(body)
    model.eval()
    assert not model_spec.uses_gradient_checkpointing(body)


def test_another_configuration_of_a_module_is_seen():
    body = model_spec.body_of(build("llama"))
    config = body.config
    assert model_spec.attention_configs(body) == [config]
    body.layers[0].self_attn.config = other = type(config)(**config.to_dict())
    assert [id(c) for c in model_spec.attention_configs(body)] == [id(config), id(other)]


@pytest.mark.filterwarnings("ignore:softprompt")
def test_an_attention_that_is_replaced_later_gets_a_new_plan():
    stock, fast = patched("gpt_neo")
    assert_same_step(fast, stock, BATCHES["holes"])
    for model in (stock, fast):
        attention = model.get_base_model().transformer.h[1].attn.attention
        attention.forward = type(attention).forward.__get__(attention)
    assert_same_step(fast, stock, BATCHES["holes"])
    assert softprompt.explain(fast).route == "padded"
