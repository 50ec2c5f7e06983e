"""Code of a language model, of transformers or of PyTorch that is replaced behind the patch."""

import functools
import types

import pytest
import torch
from generating import tokens
from parity import assert_close, assert_same_step, make_batch, step
from patched_pairs import prompted
from tiny_models import build, pair
from torch import nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama

import softprompt

BATCH = make_batch(side="right", labels="everywhere")
TEXTS = {name: BATCH[name] for name in ("input_ids", "attention_mask")}


def llama(**overrides):
    return build("llama", torch.float32, **overrides)


def twins(base):
    stock, fast = pair(prompted(base))
    softprompt.patch(fast)
    step(fast, BATCH)
    return stock, fast


def triple_loss(stock):
    @functools.wraps(stock)
    def forward(self, *args, **kwargs):
        output = stock(self, *args, **kwargs)
        return (
            output if output.loss is None else output.__class__(**(dict(output) | {"loss": 3 * output.loss}))
        )

    return forward


def attention_without_interface(stock):
    """As kernel libraries write one: it asks for no attention function, and masks by causality alone."""

    def forward(self, hidden_states, position_embeddings=None, attention_mask=None, **kwargs):
        heads = [
            projection(hidden_states).unflatten(2, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        ]
        query, key = modeling_llama.apply_rotary_pos_emb(*heads[:2], *position_embeddings)
        out = nn.functional.scaled_dot_product_attention(
            query, key, heads[2], is_causal=True, enable_gqa=True
        )
        return 0.5 * self.o_proj(out.transpose(1, 2).flatten(2)), None

    return forward


def scaled_norm(stock):
    return lambda self, hidden_states: 1.5 * stock(self, hidden_states)


@pytest.mark.parametrize(
    "kind, replace, route",
    [
        (modeling_llama.LlamaForCausalLM, triple_loss, "stock"),
        (modeling_llama.LlamaAttention, attention_without_interface, "padded"),
        (modeling_llama.LlamaRMSNorm, scaled_norm, "packed"),
    ],
    ids=["loss", "attention", "norm"],
)
def test_a_forward_of_a_class_of_the_model_replaced_behind_the_patch_is_seen(
    kind, replace, route, monkeypatch
):
    stock, fast = pair(prompted(llama()))
    softprompt.patch(fast)
    batch = make_batch(side="right", labels="everywhere")
    before = step(fast, batch).loss
    monkeypatch.setattr(kind, "forward", replace(kind.forward))
    assert_same_step(fast, stock, batch)
    assert step(fast, batch).loss != before
    assert softprompt.explain(fast).route == route
    monkeypatch.undo()
    assert softprompt.explain(fast).route == "packed"
    assert torch.equal(step(fast, batch).loss, before)


def test_a_function_beside_the_classes_replaced_behind_the_patch_is_seen(monkeypatch):
    """Here the mask, which then hides nothing that the packed row has to hide."""
    stock, fast = pair(prompted(llama(attn_implementation="eager")))
    softprompt.patch(fast)
    batch = make_batch(side="right", labels="everywhere")

    def causal(config, inputs_embeds, **kwargs):
        length = inputs_embeds.shape[1]
        mask = torch.full((length, length), torch.finfo(inputs_embeds.dtype).min)
        return mask.triu(1)[None, None]

    monkeypatch.setattr(modeling_llama, "create_causal_mask", causal)
    assert_same_step(fast, stock, batch)


# ------------------------------------------------------------------------------------------------- attention
def half(function):
    """A function of a user's own around one that gives (output, weights)."""
    factor = [1.0]

    def own(*args, **kwargs):
        own.calls += 1
        out, weights = function(*args, **kwargs)
        return factor[0] * out, weights

    own.calls, own.factor = 0, factor
    return own


@pytest.fixture
def attention_tables():
    """Transformers' tables of attention functions, put back as they were."""
    tables = (AttentionInterface._global_mapping, ALL_ATTENTION_FUNCTIONS._local_mapping)
    before = [dict(table) for table in tables]
    yield tables
    for table, content in zip(tables, before, strict=True):
        table.clear()
        table.update(content)


@pytest.mark.parametrize("place", [0, 1], ids=["registered", "set on the interface"])
def test_an_attention_function_of_the_users_own_is_called(place, attention_tables):
    stock, fast = twins(llama())
    own = half(sdpa_attention_forward)
    attention_tables[place]["sdpa"] = own
    assert_same_step(fast, stock, BATCH)
    report = softprompt.explain(fast)
    assert (report.route, dict(report.details)["attention"]) == ("packed", "dense seam")
    before, called = step(fast, BATCH).loss, own.calls
    own.factor[0] = 0.5  # which nothing but a call can see
    assert_same_step(fast, stock, BATCH)
    assert step(fast, BATCH).loss != before
    assert own.calls > called
    stock.eval(), fast.eval()
    assert torch.equal(tokens(fast, TEXTS), tokens(stock, TEXTS))


def test_an_attention_of_the_users_own_may_be_chosen_before_the_patch(attention_tables):
    own = half(sdpa_attention_forward)
    AttentionInterface.register("my_sdpa", own)
    base = llama()
    base.set_attn_implementation("my_sdpa")
    stock, fast = twins(base)
    for factor in (1.0, 0.5):
        own.factor[0] = factor
        assert_same_step(fast, stock, BATCH)
    stock.eval(), fast.eval()
    assert torch.equal(tokens(fast, TEXTS), tokens(stock, TEXTS))


def test_an_eager_attention_of_the_users_own_is_called(monkeypatch):
    base = llama()
    base.set_attn_implementation("eager")
    stock, fast = twins(base)
    own = half(modeling_llama.eager_attention_forward)
    monkeypatch.setattr(modeling_llama, "eager_attention_forward", own)
    for factor in (1.0, 0.5):
        own.factor[0] = factor
        assert_same_step(fast, stock, BATCH)


def test_pytorchs_attention_replaced_is_called(monkeypatch):
    """As kernels for it say in their instructions."""
    stock, fast = twins(llama())
    original = nn.functional.scaled_dot_product_attention

    def own(*args, **kwargs):
        return 0.5 * original(*args, **kwargs)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", own)
    assert_same_step(fast, stock, BATCH)
    stock.eval(), fast.eval()
    assert torch.equal(tokens(fast, TEXTS), tokens(stock, TEXTS))


HELPERS = {
    "bloom": ("build_alibi_tensor", 1.5),
    "mpt": ("build_mpt_alibi_tensor", 1.5),
    "gpt_neo": ("_attn", None),
}


@pytest.mark.parametrize("place", ["class", "instance"])
@pytest.mark.parametrize("name", HELPERS)
def test_methods_that_the_packed_row_stands_in_for_may_be_replaced(name, place, monkeypatch):
    method, factor = HELPERS[name]
    stock, fast = twins(build(name, torch.float32))

    def holders(model):
        return [module for module in model.modules() if hasattr(type(module), method)]

    original = getattr(type(holders(stock)[0]), method)

    def own(self, *args, **kwargs):
        result = original(self, *args, **kwargs)
        return factor * result if factor else (0.5 * result[0], *result[1:])

    if place == "class":
        monkeypatch.setattr(type(holders(stock)[0]), method, own)
    else:
        for model in (stock, fast):
            for module in holders(model):
                setattr(module, method, types.MethodType(own, module))
    before = step(fast, BATCH).loss
    assert_same_step(fast, stock, BATCH, bound=1e-5)
    plain = twins(build(name, torch.float32))[0] if place == "instance" else None
    if plain is not None:
        assert before != step(plain, BATCH).loss


# ----------------------------------------------------------------------------------------- loss and positions
def test_a_loss_function_of_the_users_own_is_called_at_each_step():
    stock, fast = twins(llama())
    factor = [1.0]
    for model in (stock, fast):
        base = model.get_base_model()
        original = base.loss_function
        base.loss_function = lambda *args, _original=original, **kwargs: (
            factor[0] * _original(*args, **kwargs)
        )
    for value in (1.0, 2.0):
        factor[0] = value
        assert_same_step(fast, stock, BATCH)
    assert "loss function of its own" in softprompt.explain(fast).fallbacks[0][0]
    with torch.no_grad():
        logits = fast(**TEXTS, use_cache=False).logits
    assert len(softprompt.explain(fast).fallbacks) == 1  # a call without labels has no loss
    expected = stock(**TEXTS, use_cache=False).logits.detach()
    assert_close(logits[:, :5], expected[:, :5], 1e-5, "logits of the prompt and the first tokens")


def test_a_cross_entropy_of_the_users_own_is_called(monkeypatch):
    stock, fast = twins(llama())
    original = nn.functional.cross_entropy

    def smoothed(*args, **kwargs):
        return original(*args, **kwargs, label_smoothing=0.1)

    before = step(fast, BATCH).loss
    monkeypatch.setattr(nn.functional, "cross_entropy", smoothed)
    assert step(fast, BATCH).loss != before
    assert_same_step(fast, stock, BATCH)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_decoder_may_be_wrapped_on_the_instance(name, moment):
    base = build(name, torch.float32)

    def wrap(model):
        body = model.get_base_model().base_model if name != "opt" else model.get_base_model().model.decoder
        original = body.forward
        body.forward = lambda *args, **kwargs: original(*args, **kwargs)

    stock, fast = pair(prompted(base))
    batch = make_batch(side="left", labels="everywhere")
    if moment == "before":
        wrap(fast)
    softprompt.patch(fast)
    step(fast, batch)
    if moment == "after":
        wrap(fast)
    wrap(stock)
    assert_same_step(fast, stock, batch)
    assert softprompt.explain(fast).route == "packed"


@pytest.mark.parametrize("training", [False, True])
def test_a_part_that_is_compiled_is_called(training):
    stock, fast = twins(llama())
    for model in (stock, fast):
        layer = model.base_model.model.layers[0]
        layer.mlp = torch.compile(layer.mlp, backend="eager")
        model.train(training)
    assert_same_step(fast, stock, BATCH)
    assert softprompt.explain(fast).route == "packed"
