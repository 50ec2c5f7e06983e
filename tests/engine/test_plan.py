"""The route of a model is decided by numbers, kept, and decided again when the model has changed."""

import copy
import gc
import weakref

import pytest
import torch
from parity import assert_same_step, make_batch
from tiny_models import ARCHITECTURES, PADDED, build, pair, prompted
from torch import nn

import softprompt
from softprompt.engine import guard, plan_for
from softprompt.engine import plan as plan_module
from softprompt.engine.plan import make_plan

SEAMS = {
    "gptj": "mask",
    "bloom-6-heads": "bloom",
    **{name: name for name in ("bloom", "falcon", "mpt", "gpt_neo")},
    **{f"falcon-{kind}": "falcon" for kind in ("groups", "alibi", "alibi-own-keys")},
}
COUNT_NO_PADS = ("bloom", "bloom-6-heads", "opt", "opt-projected", "falcon-alibi", "falcon-alibi-own-keys")
OWN_HEAD = ("recurrent_gemma",)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_takes_the_route_that_it_should(name):
    plan = make_plan(build(name))
    assert plan.loss_error <= 1e-6
    assert plan.grad_error <= 1e-5
    assert plan.fused_head == (name not in OWN_HEAD)
    if name in PADDED:
        assert plan.route == "padded"
        assert "leak from one text into the next" in plan.reason
    else:
        assert plan.route == "packed"
        assert plan.seam == SEAMS.get(name, "interface")
        assert plan.positions == ("mask" if name in COUNT_NO_PADS else "slots")


@pytest.mark.parametrize("name", ["gpt2", "opt", "bloom", "llama"])
def test_learned_positions_have_a_limit(name):
    assert make_plan(build(name)).position_limit == {"gpt2": 64, "opt": 64}.get(name)


def test_the_stock_forward_is_run_once_beside_the_trial_of_pads_and_the_chosen_route_once():
    model = build("llama")
    calls = []
    model.model.layers[0].register_forward_hook(lambda module, args, output: calls.append(args[0].shape))
    make_plan(model)
    assert [tuple(shape) for shape in calls] == [(2, 10, 48), (1, 14, 48), *[(2, 10, 48)] * 2]


class Counter:
    """Counts the plans that are made."""

    def __init__(self, monkeypatch):
        self.made = 0
        original = plan_module.make_plan

        def counted(model, **options):
            self.made += 1
            return original(model, **options)

        monkeypatch.setattr(plan_module, "make_plan", counted)


def cast(model):
    model.float()


def change_attention(model):
    model.set_attn_implementation("eager")


def hook_the_head(model):
    model.lm_head.register_forward_hook(lambda module, args, output: output)


def hook_the_embedding(model):
    model.model.embed_tokens.register_forward_hook(lambda module, args, output: output)


def replace_the_head(model):
    model.set_output_embeddings(nn.Linear(48, 97, bias=False).double())


def replace_the_loss(model):
    model.loss_function = lambda logits, labels, vocab_size, **kwargs: logits.sum()


def renormalise_the_embedding(model):
    model.model.embed_tokens.max_norm = 1.0


def ask_for_router_losses(model):
    model.config.output_router_logits = True


def replace_a_layer(model):
    model.model.layers[0].mlp = copy.deepcopy(model.model.layers[0].mlp)


def replace_a_configuration(model):
    model.model.layers[1].self_attn.config = copy.deepcopy(model.config)


def shorten_the_positions(model):
    model.config.max_position_embeddings = 32


def make_the_positions_dynamic(model):
    model.config.rope_parameters["rope_type"] = "dynamic"


def number_of_the_model(model):
    model.logit_scale = 2.0


CHANGES = [
    cast,
    shorten_the_positions,
    make_the_positions_dynamic,
    number_of_the_model,
    change_attention,
    hook_the_head,
    hook_the_embedding,
    replace_the_head,
    replace_the_loss,
    renormalise_the_embedding,
    ask_for_router_losses,
    replace_a_layer,
    replace_a_configuration,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_plan_is_kept_until_the_model_changes(monkeypatch, change):
    counter = Counter(monkeypatch)
    model = build("llama")
    assert plan_for(model) is plan_for(model)
    assert counter.made == 1
    change(model)
    assert plan_for(model) is plan_for(model)
    assert counter.made == 2


def test_a_scale_of_the_logits_that_is_changed_on_the_model_alone_counts():
    """The fused head reads the configuration's."""
    stock, fast = pair(prompted("cohere"))
    softprompt.patch(fast)
    assert fast(**make_batch()).loss is not None
    for model in (stock, fast):
        model.get_base_model().logit_scale = 0.9
    assert_same_step(fast, stock, make_batch())


def test_what_the_plan_of_a_model_depends_on_is_found_out_again_only_behind_a_change(monkeypatch):
    counter = Counter(monkeypatch)
    model = build("bloom")
    plan = plan_for(model)
    with monkeypatch.context() as patch:
        patch.setattr(guard, "_lasting", None)
        assert plan_for(model) is plan
    model.transformer.h[0].self_attention.inv_norm_factor = 2.0
    assert plan_for(model) == plan
    assert counter.made == 1


def test_plans_do_not_keep_models_alive():
    model = build("llama")
    plan_for(model)
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None


def test_a_head_with_a_hook_is_called():
    model = build("llama")
    model.lm_head.register_forward_hook(lambda module, args, output: output / 3)
    plan = make_plan(model)
    assert not plan.fused_head
    assert "hooks" in plan.head_reason
    assert plan.loss_error < 1e-6


def test_a_head_that_is_no_linear_layer_is_called():
    class Head(nn.Linear):
        def forward(self, hidden):
            return torch.tanh(super().forward(hidden)) * 5

    stock = prompted("llama")
    base = stock.get_base_model()
    head = Head(48, 97, bias=False).double().requires_grad_(False)
    head.weight.copy_(base.lm_head.weight)
    base.set_output_embeddings(head)
    stock, fast = pair(stock)
    softprompt.patch(fast, on_unsupported="error")
    plan = plan_for(fast.get_base_model())
    assert (plan.fused_head, plan.head_reason) == (False, "the head is a Head")
    assert_same_step(fast, stock, make_batch(side="left", labels="everywhere"))


def test_a_head_whose_logits_are_changed_behind_it_is_found_out():
    """The fused head does not know of the change, and its numbers say so."""
    model = build("granite")

    class Hidden(type(model)):
        def forward(self, *args, **kwargs):
            labels = kwargs.pop("labels", None)
            output = super().forward(*args, **kwargs)
            output.logits = output.logits * 1.5
            if labels is not None:
                output.loss = self.loss_function(output.logits, labels, self.vocab_size)
            return output

    model.__class__ = Hidden
    plan = make_plan(model)
    assert plan.route == "packed"
    assert not plan.fused_head
    assert "other numbers" in plan.head_reason
    assert plan.loss_error < 1e-6


def test_a_loss_of_its_own_that_no_route_computes_leaves_the_stock_forward():
    stock, fast = pair(prompted("llama"))
    for model in (stock, fast):
        model.get_base_model().loss_function = lambda logits, labels, vocab_size, **kwargs: (
            logits.square().mean()
        )
    with pytest.warns(UserWarning, match="PEFT's own forward stays in use"):
        softprompt.patch(fast)
    plan = plan_for(fast.get_base_model())
    assert plan.route == "stock"
    assert "loss off by" in plan.reason
    batch = make_batch()
    assert torch.equal(fast(**batch).loss, stock(**batch).loss)


def test_router_losses_leave_the_stock_forward():
    model = build("gpt_oss", output_router_logits=True)
    plan = make_plan(model)
    assert plan.route == "stock"
    assert "output_router_logits" in plan.reason


def test_an_encoder_decoder_is_left_alone():
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=97, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    plan = make_plan(T5ForConditionalGeneration(config))
    assert plan.route == "stock"
    assert "encoder-decoder" in plan.reason


@pytest.mark.parametrize("kind", ["module", "headless", "meta"])
def test_what_cannot_be_checked_is_left_alone(kind):
    if kind == "module":
        model = nn.Linear(3, 3)
        model.config = copy.deepcopy(build("llama").config)
        reason = "is not a transformers model"
    elif kind == "headless":
        model = build("llama").model
        reason = "no decoder"
    else:
        model = build("llama").to("meta")
        reason = "meta device"
    plan = make_plan(model)
    assert plan.route == "stock"
    assert reason in plan.reason


def test_the_self_check_needs_no_gradients_of_the_base_and_leaves_none():
    model = build("llama")
    with torch.no_grad():
        plan = make_plan(model)
    assert plan.route == "packed"
    assert all(parameter.grad is None for parameter in model.parameters())
    model.requires_grad_(True)
    make_plan(model)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_plan_under_autocast_is_that_of_the_model_itself():
    model = build("llama", torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        plan = make_plan(model)
    assert plan.route == "packed"
    assert plan.loss_error < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom", "gemma2"])
def test_models_of_every_dtype_are_packed(name, dtype):
    plan = make_plan(build(name, dtype))
    assert (plan.route, plan.fused_head) == ("packed", True)
