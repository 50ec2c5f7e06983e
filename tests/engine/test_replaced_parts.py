"""Heads and embeddings that are no plain layers, and base models with trainable weights."""

import pytest
import torch
from messages import warned
from parity import assert_close, assert_same_step, make_batch, step
from patched_pairs import FUSED, OWN, facts, patched_pair, prompted
from peft import LoraConfig, get_peft_model
from tiny_models import build, pair
from torch import nn
from torch.nn.utils import parametrizations

import softprompt

BATCH = make_batch(side="left", labels="everywhere")
CALLED = "called as a module: "


def llama(**overrides):
    return build("llama", torch.float32, **overrides)


# --------------------------------------------------------------------------------------------------- heads
class Doubled(nn.Linear):
    """A linear layer by its class, and more than one by its forward."""

    def forward(self, x):
        return 2 * super().forward(x)


def doubled(base):
    head = Doubled(48, 97, bias=False)
    head.weight = base.lm_head.weight
    base.lm_head = head


def in_sequence(base):
    base.lm_head = nn.Sequential(nn.LayerNorm(48), base.lm_head)


def weight_norm(base):
    parametrizations.weight_norm(base.lm_head)


def with_a_hook(base):
    base.lm_head.register_forward_hook(lambda module, args, output: output * 1.5)


def with_a_pre_hook(base):
    base.lm_head.register_forward_pre_hook(lambda module, args: (args[0] * 0.5,))


def with_a_backward_hook(base):
    base.lm_head.register_full_backward_hook(lambda module, grads, of_output: (grads[0] * 0.5,))


# name -> (what is done to the model, part of what explain says)
HEADS = {
    "subclass": (doubled, "the head is a Doubled"),
    "sequential": (in_sequence, "the head is a Sequential"),
    "parametrised": (weight_norm, "the head is a ParametrizedLinear"),
    "hook": (with_a_hook, "the head has hooks"),
    "pre-hook": (with_a_pre_hook, "the head has hooks"),
    "backward hook": (with_a_backward_hook, "the head has hooks"),
}


@pytest.mark.parametrize("change, reason", HEADS.values(), ids=HEADS)
def test_a_replaced_head_is_called_on_label_rows(change, reason):
    base = llama()
    change(base)
    stock, fast = patched_pair(prompted(base.requires_grad_(False)))
    route, head, _ = facts(fast)
    assert (route, head) == ("packed", OWN + reason)
    assert_same_step(fast, stock, BATCH)


def test_the_head_sees_label_rows_and_no_others():
    model = prompted(llama())
    softprompt.patch(model)
    seen = []
    model.get_base_model().lm_head.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    softprompt.explain(model)  # looks at the hook first
    seen.clear()
    model(**make_batch(labels="answer"))
    assert seen == [(1, 6, 48)]


# ------------------------------------------------------------------------------------------------ adapters
def with_lora(base, targets, *, trainable=False):
    """The base with LoRA inside that does something."""
    base.add_adapter(LoraConfig(r=2, target_modules=targets))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in base.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    return base.eval()


def trains_lora(model):
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.requires_grad_()
    return model


@pytest.mark.parametrize("tied", [False, True])
def test_lora_on_the_head_is_never_skipped(tied):
    base = with_lora(llama(tie_word_embeddings=tied), ["q_proj", "lm_head"])
    stock, fast = patched_pair(prompted(base))
    assert facts(fast)[:2] == ("packed", OWN + "the head is peft's Linear")
    assert_same_step(fast, stock, BATCH)


def test_merged_lora_leaves_a_plain_head():
    lora = get_peft_model(llama(), LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["lm_head"]))
    nn.init.normal_(lora.base_model.model.lm_head.lora_B["default"].weight)
    stock, fast = patched_pair(prompted(lora.merge_and_unload()))
    assert facts(fast)[1].startswith(FUSED)
    assert_same_step(fast, stock, BATCH)


def test_a_prompt_around_a_whole_lora_model_is_packed():
    lora = get_peft_model(
        llama(), LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["v_proj", "lm_head"])
    )
    nn.init.normal_(lora.base_model.model.lm_head.lora_B["default"].weight)
    torch.manual_seed(3)
    stock, fast = patched_pair(prompted(lora.eval()))
    assert facts(fast)[0] == "packed"
    assert_same_step(fast, stock, BATCH)


def test_lora_on_the_embedding_stays_with_peft_which_leaves_it_out():
    base = llama()
    width = base.model.embed_tokens.embedding_dim
    with_lora(base, ["embed_tokens"])
    base.model.embed_tokens.embedding_dim = width  # PEFT's wrapper does not tell
    stock, fast = pair(prompted(base))
    _, messages = warned(lambda: softprompt.patch(fast)(**BATCH))
    assert len(messages) == 1
    assert "PEFT embeds tokens with another module" in softprompt.explain(fast).reason
    assert_same_step(fast, stock, BATCH)


def test_the_functional_form_calls_a_lora_embedding():
    base = with_lora(llama(), ["embed_tokens"])
    prompt = torch.randn(4, 48, generator=torch.Generator().manual_seed(0), requires_grad=True)
    got = softprompt.forward(base, prompt, **BATCH, on_unsupported="error").loss
    mask = BATCH["attention_mask"]
    embeds = torch.cat([prompt.expand(3, -1, -1), base.get_input_embeddings()(BATCH["input_ids"])], 1)
    expected = base(
        inputs_embeds=embeds,
        attention_mask=torch.cat([mask.new_ones(3, 4), mask], 1),
        labels=torch.cat([mask.new_full((3, 4), -100), BATCH["labels"]], 1),
    ).loss
    assert_close(got, expected, 2e-6, "loss")
    grads = [torch.autograd.grad(loss, prompt)[0] for loss in (got, expected)]
    assert_close(*grads, 2e-5, "gradient")
    assert CALLED + "the embedding is peft's Embedding" in str(softprompt.explain(base))


# ---------------------------------------------------------------------------------------- trainable weights
@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["plain", "checkpoints", "reentrant"])
def test_lora_inside_the_base_gets_pefts_gradient(checkpointing):
    base = with_lora(llama(), ["q_proj", "down_proj", "lm_head"])
    if checkpointing is not None:
        base.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    stock, fast = patched_pair(trains_lora(prompted(base)).train())
    assert facts(fast)[0] == "packed"
    assert len(step(fast, BATCH).grads) == 11
    assert_same_step(fast, stock, BATCH)


@pytest.mark.parametrize("name", ["llama", "bloom", "mamba"])
def test_a_base_that_trains_gets_pefts_gradient_in_every_weight(name):
    model = prompted(build(name, torch.float32))
    model.get_base_model().requires_grad_()
    stock, fast = patched_pair(model)
    assert_same_step(fast, stock, BATCH)


def test_steps_with_trainable_weights_are_not_recorded(tape):
    stock, fast = pair(trains_lora(prompted(with_lora(llama(), ["q_proj"]))))
    _, messages = warned(lambda: assert_same_step(softprompt.patch(fast), stock, BATCH))
    for _ in range(3):
        assert_same_step(fast, stock, BATCH)
    assert any("the language model has trainable weights" in message for message in messages)
    assert "trainable weights" in dict(softprompt.explain(fast).details)["step graph"]


# ---------------------------------------------------------------------------------------------- embeddings
class Scaled(nn.Embedding):
    """Gemma's way."""

    def forward(self, ids):
        return super().forward(ids) * 3


def scaled(base):
    table = Scaled(97, 48)
    table.weight = base.model.embed_tokens.weight
    base.set_input_embeddings(table)


def embedding_hook(base):
    base.model.embed_tokens.register_forward_hook(lambda module, args, output: output * 1.5)


def embedding_pre_hook(base):
    base.model.embed_tokens.register_forward_pre_hook(lambda module, args: ((args[0] + 1) % 97,))


def renormalised(base):
    base.model.embed_tokens.max_norm = 2.0


EMBEDDINGS = {
    "subclass": (scaled, "the embedding is a Scaled"),
    "hook": (embedding_hook, "the embedding has hooks"),
    "pre-hook": (embedding_pre_hook, "the embedding has hooks"),
    "max_norm": (renormalised, "the embedding renormalises its table (max_norm)"),
}


@pytest.mark.parametrize("change, reason", EMBEDDINGS.values(), ids=EMBEDDINGS)
def test_a_replaced_embedding_is_called(change, reason):
    base = llama()
    change(base)
    stock, fast = patched_pair(prompted(base.requires_grad_(False)))
    assert facts(fast)[2] == CALLED + reason
    assert_same_step(fast, stock, BATCH)


def test_a_tied_table_that_renormalises_itself_stays_with_peft():
    base = llama(tie_word_embeddings=True)
    renormalised(base)
    stock, fast = pair(prompted(base))
    before = fast.get_base_model().lm_head.weight.clone()
    _, messages = warned(lambda: softprompt.patch(fast))
    assert "the head shares the table, so pads change the logits" in messages[0]
    assert torch.equal(fast.get_base_model().lm_head.weight, before)
    assert torch.equal(step(fast, BATCH).loss, step(stock, BATCH).loss)
