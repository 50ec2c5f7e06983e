"""Reasons of calls of `forward`, of adapters, and of the classes that `patch` leaves alone."""

import contextlib
import copy
import functools
import types

import pytest
import torch
from peft import (
    LoraConfig,
    MultitaskPromptTuningConfig,
    PeftModelForCausalLM,
    PrefixTuningConfig,
    TaskType,
    get_peft_model,
)
from tiny_models import build, prompt_config, prompted
from torch._subclasses import FakeTensorMode
from transformers import (
    LlamaConfig,
    LlamaForSequenceClassification,
)

import softprompt
from reasons.models import fails_on_prompts, infinite, named_loss, own_loss, router_logits
from reasons.rows import BATCH, DYNAMIC, Row, patched
from softprompt.compiling import ONE_GRAPH
from softprompt.engine import sharding


def call_with(**changes):
    """A call of forward with other arguments than those of `BATCH`."""
    return lambda model: model(**(BATCH | changes))


def evaluate_without_labels(model):
    model.eval()
    with torch.no_grad():
        return model(input_ids=BATCH["input_ids"], attention_mask=BATCH["attention_mask"])


def ask_in_the_configuration(model):
    model.get_base_model().config.output_hidden_states = True
    try:
        return model(**BATCH)
    finally:
        model.get_base_model().config.output_hidden_states = False


_PADDED_ONLY = "{} was asked for, which only PEFT's own forward has"

# name -> (call, sentence)
CALLS = {
    "output_hidden_states": (call_with(output_hidden_states=True), _PADDED_ONLY),
    "output_hidden_states of the configuration": (ask_in_the_configuration, _PADDED_ONLY),
    "output_attentions": (call_with(output_attentions=True), _PADDED_ONLY),
    "use_cache": (
        call_with(use_cache=True),
        "use_cache=True was asked for, and the fast route keeps none",
    ),
    "evaluation without labels": (
        evaluate_without_labels,
        "without labels in evaluation mode the output holds a cache; use_cache=False takes the fast route",
    ),
    "unknown arguments": (
        call_with(labels=None, use_cache=False, logits_to_keep=2),
        "the call has arguments that the fast route does not serve: {}",
    ),
}


# ----------------------------------------------------------------------------------------------- adapters
def of_type(config):
    """A model with an adapter of another type than prompt tuning."""
    return lambda: get_peft_model(build("llama"), config).double()


def twice_the_submodules():
    base = build("llama")
    config = prompt_config(base)
    config.num_transformer_submodules = 2
    return get_peft_model(base, config).double()


def other_word_embeddings():
    model = prompted("llama")
    model.word_embeddings = copy.deepcopy(model.word_embeddings)
    return model


def hooked_language_model():
    model = prompted("llama")
    model.get_base_model().register_forward_hook(lambda module, args, output: None)
    return model


_TYPES = "adapter {} is of type {}; {} are served"

# name -> (model, sentence); all are met by the first call
ADAPTERS = {
    "prefix tuning": (of_type(PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)), _TYPES),
    "lora": (of_type(LoraConfig(task_type="CAUSAL_LM", r=2)), _TYPES),
    "two submodules": (twice_the_submodules, "adapter {} has num_transformer_submodules={}, not 1"),
    "no virtual tokens": (
        lambda: prompted("llama", num_virtual_tokens=0),
        "adapter {} has no virtual tokens",
    ),
    "other word embeddings": (
        other_word_embeddings,
        "PEFT embeds tokens with another module than the model's input embeddings",
    ),
    "hooks of the language model": (
        hooked_language_model,
        "the language model itself has hooks or a replaced forward, which the fast route would skip",
    ),
}


def forward_of(make):
    def act(kit):
        model = softprompt.patch(make())
        model(input_ids=BATCH["input_ids"], use_cache=False)
        return model

    return act


def called(call):
    def act(kit):
        model = softprompt.patch(kit.llama())
        call(model)
        return model

    return act


def called_on_stock(kit):
    model = patched(own_loss)(kit)
    model(**BATCH)
    return model


def scored_by_trl(change=lambda base: None, **given):
    """A call of the fused head that TRL's trainers put on a language model."""

    def act(kit):
        utils = pytest.importorskip("trl.trainer.utils")
        model = softprompt.patch(kit.llama())
        change(model.get_base_model())
        utils.add_fused_lm_head(model.get_base_model())
        with contextlib.suppress(TypeError):  # of TRL, which needs labels and does not say so
            model(**(BATCH | given), use_cache=False, fused_lm_head=True)
        return model

    return act


def scored_by_trl_where_sharded(kit):
    utils = pytest.importorskip("trl.trainer.utils")
    model = softprompt.patch(kit.llama())
    utils.add_fused_lm_head(model.get_base_model())
    kit.monkeypatch.setattr(sharding, "by_fsdp", lambda model: True)
    model(**BATCH, fused_lm_head=True)
    return model


def foreign_forward(base):
    own = base.forward
    base.forward = lambda *args, **kwargs: own(*args, **kwargs)


def one_graph(kit):
    """As a compiler that allows no break traces a call."""
    model = softprompt.patch(kit.llama())
    with kit.monkeypatch.context() as tracing:
        tracing.setattr(torch.compiler, "is_compiling", lambda: True)
        model(**BATCH)
    return model


def long_rotary(kit):
    model = softprompt.patch(prompted("llama", max_position_embeddings=10, **DYNAMIC))
    model(**BATCH)
    return model


def scaled_attention(kit):
    architectures = kit.architectures
    model = prompted("llama4_text", architectures=architectures, floor_scale=16)
    softprompt.patch(model)(**BATCH)
    return model


# --------------------------------------------------------------------------------------- the class of a model
def classifier(kit):
    sizes = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    base = LlamaForSequenceClassification(LlamaConfig(**sizes, pad_token_id=0, num_labels=2))
    config = prompt_config(base)
    config.task_type = TaskType.SEQ_CLS
    return softprompt.patch(get_peft_model(base, config))


class _OwnForward(PeftModelForCausalLM):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


def own_class(kit):
    model = kit.llama()
    model.__class__ = _OwnForward
    return softprompt.patch(model)


def replaced(name):
    def act(kit):
        model = kit.llama()
        setattr(model, name, types.MethodType(lambda self, *args, **kwargs: None, model))
        return softprompt.patch(model)

    return act


def own_prompts(model):
    """With a `get_prompt` that gives what PEFT's gives."""
    stock = type(model).get_prompt
    model.get_prompt = types.MethodType(lambda self, *args, **kwargs: stock(self, *args, **kwargs), model)


def own_prompts_in_generate(kit):
    model = kit.llama()
    own_prompts(model)
    softprompt.patch(model)
    model.generate(input_ids=BATCH["input_ids"], max_new_tokens=1)
    return model


def own_prompts_of_others(kit):
    model = kit.llama()
    model.add_adapter("second", prompt_config(model.get_base_model()))
    own_prompts(model)
    softprompt.patch(model)(**BATCH, adapter_names=["default", "second", "default"])


def called_with_own_loss(kit):
    model = patched(named_loss)(kit)
    model(**BATCH)
    return model


def replaced_in_generate(kit):
    model = softprompt.patch(kit.llama())
    stock = type(model).prepare_inputs_for_generation

    @functools.wraps(stock)
    def own(self, *args, **kwargs):
        return stock(self, *args, **kwargs)

    model.prepare_inputs_for_generation = types.MethodType(own, model)
    model.generate(input_ids=BATCH["input_ids"], max_new_tokens=1)
    return model


def hooked_tasks(kit):
    base = build("llama")
    config = MultitaskPromptTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=4,
        token_dim=base.get_input_embeddings().embedding_dim,
        num_layers=1,
        num_attention_heads=1,
        num_tasks=2,
        num_ranks=2,
    )
    model = softprompt.patch(get_peft_model(base, config))
    model.prompt_encoder["default"].register_forward_hook(lambda module, args, output: output)
    model(**BATCH, task_ids=torch.tensor([0, 1, 0]))
    return model


def transformed(how):
    """A call under a transform of torch, which PEFT's forward serves."""

    def act(kit):
        model = softprompt.patch(kit.llama())
        model.get_base_model().set_attn_implementation("eager")  # SDPA has no forward-mode AD on a CPU
        how(model)
        return model

    return act


def under_torch_func(model):
    values = {name: value.detach() for name, value in model.named_parameters() if value.requires_grad}
    torch.func.grad(lambda values: torch.func.functional_call(model, values, (), BATCH).loss)(values)


def under_jit_trace(model):
    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, input_ids):
            return self.model(input_ids=input_ids, use_cache=False).logits

    torch.jit.trace(Logits(), BATCH["input_ids"], check_trace=False)


def under_forward_mode(model):
    with torch.autograd.forward_ad.dual_level():
        model(**BATCH)


def under_fake_tensors(model):
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        model(**{name: mode.from_tensor(value) for name, value in BATCH.items()})


def rows():
    yield from (Row(sentence, called(call), name=name) for name, (call, sentence) in CALLS.items())
    yield from (Row(sentence, forward_of(make), name=name) for name, (make, sentence) in ADAPTERS.items())
    yield Row(
        "the model's rotary embedding changes beyond {} positions, and in a padded batch of {} pads count "
        "for that",
        long_rotary,
    )
    yield Row(
        "the model scales its attention by the place in the row, from {} rows on, and the prompts and texts "
        "of this batch may take {}",
        scaled_attention,
    )
    yield Row(
        "{} is not a causal language model (task type CAUSAL_LM), and no encoder-decoder (SEQ_2_SEQ_LM)",
        classifier,
    )
    yield Row("{} has a {} of its own, which the packed one would not call", own_class)
    yield Row("get_prompt was replaced", own_prompts_in_generate)
    yield Row(
        "the model has a loss function of its own ({}), which is given whole rows of logits",
        called_with_own_loss,
    )
    yield Row("{}, and only forward asks it for the prompt of each row", own_prompts_in_generate)
    yield Row(
        "{}: it gives prompts of the active adapter alone, and adapter_names has others",
        own_prompts_of_others,
        "error",
    )
    yield Row("the encoder of adapter {} has hooks, or is not PEFT's", hooked_tasks)
    yield Row(
        "a torch.func transform (grad, vmap, jvp, ...) has no rule for packed steps",
        transformed(under_torch_func),
    )
    yield Row("torch.jit.trace would record the layout of this one batch", transformed(under_jit_trace))
    yield Row("forward-mode AD has no rule for packed steps", transformed(under_forward_mode))
    yield Row(
        "fake and meta tensors have no values, which the layout of a packed step is read from",
        transformed(under_fake_tensors),
    )
    yield Row(
        "the model's {} was replaced on the instance",
        replaced_in_generate,
        reads="the model's prepare_inputs_for_generation was replaced on the instance",
    )
    yield Row(
        "the model's forward was replaced on the instance (accelerate's prepare does that); call "
        "softprompt.patch before",
        replaced("forward"),
    )
    yield Row("the model's own forward is used: {}", called_on_stock)
    yield Row(
        "the call has arguments that the fast route does not serve: {}",
        scored_by_trl(labels=None),
        name="TRL's head without labels",
        reads="does not serve: fused_lm_head",
    )
    yield Row(
        "the language model itself has hooks or a replaced forward, which the fast route would skip",
        scored_by_trl(foreign_forward),
        name="TRL's head around a foreign forward",
    )
    yield Row(
        "TRL's fused head reads a weight that fully_shard gathers for the model's own forward only",
        scored_by_trl_where_sharded,
    )
    yield Row(ONE_GRAPH, one_graph)
    yield Row("no faster route gives the numbers of the model's own forward: ", patched(own_loss))
    yield Row("{}: {} off by {}{}", patched(own_loss), reads="{}: loss off by {}, prompt gradient by {}")
    yield Row(
        "output_router_logits adds a loss over all tokens, pads and repeated prompts included",
        patched(router_logits),
    )
    yield Row("the model's own forward fails on soft prompts: {}: {}", patched(fails_on_prompts))
    yield Row("the model's own loss or prompt gradient is not finite", patched(infinite))
    yield Row(
        'positions="compact" needs the packed route: {}',
        patched(lambda base: None, "lfm2", positions="compact"),
        "error",
    )
