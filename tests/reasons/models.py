"""Reasons that a language model itself brings."""

import functools

import torch
from tiny_models import build
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration
from transformers.loss.loss_utils import ForCausalLMLoss

import softprompt
from reasons.rows import Row, as_it_is, explained, patched

NO_BIAS = torch.zeros(1, 1, 1, 1, dtype=torch.float64)


def own_loss(base):
    base.loss_function = lambda logits, labels, vocab_size, **kwargs: logits.square().mean()


def own_alibi(base):
    body = base.transformer
    stock = body.build_alibi_tensor
    body.build_alibi_tensor = lambda *args, **kwargs: stock(*args, **kwargs)


def named_loss(base):
    def as_ever(*args, **kwargs):
        return ForCausalLMLoss(*args, **kwargs)

    base.loss_function = as_ever


def router_logits(base):
    base.config.output_router_logits = True


def fails_on_prompts(base):
    base.model.layers[0].mlp.register_forward_hook(
        lambda module, args, output: output if args[0].shape[1] != 10 else 1 / 0
    )


def infinite(base):
    base.model.norm.register_forward_hook(lambda module, args, output: output * torch.inf)


def without(name):
    return lambda base: setattr(base, name, lambda: None)


def whole_numbers(base):
    for parameter in base.parameters():
        parameter.data = parameter.data.to(torch.int8)


def no_transformers_model(base):
    model = nn.Linear(3, 3)
    model.config = base.config
    return model


def without_a_decoder(base):
    return base.model


def encoder_decoder(base):
    sizes = {"vocab_size": 97, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(**sizes))


def temperature(base):
    base.config.attn_temperature_tuning = True


def wrapped_attention(base):
    attention = base.transformer.h[0].attn.attention
    attention.forward = functools.partial(type(attention).forward, attention)


def slow_but_exact(base):
    for layer in base.transformer.h:
        layer.self_attention.pretraining_tp, layer.self_attention.slow_but_exact = 2, True


class _Doubled:
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


def derived_attention(number):
    def change(base):
        for layer in base.transformer.h[:number]:
            kind = type(layer.self_attention)
            layer.self_attention.__class__ = type("Derived", (_Doubled, kind), {})

    return change


class Weight(nn.Parameter):
    """As DTensor and quantised weights are: of a class of its own."""


def weight_of_a_class(name):
    def change(base):
        module = base.get_submodule(name)
        module.weight = Weight(module.weight.detach(), requires_grad=False)

    return change


def hooked(name):
    return lambda base: base.get_submodule(name).register_forward_hook(lambda *args: None) and None


def trainable(name):
    return lambda base: base.get_submodule(name).requires_grad_(True) and None


def renormalised(base):
    base.model.embed_tokens.max_norm = 100.0


class _Head(nn.Linear):
    pass


def head_of_a_class(base):
    base.lm_head.__class__ = _Head


def changed_behind_the_head(base):
    class Doubled(type(base)):
        def forward(self, *args, **kwargs):
            labels = kwargs.pop("labels", None)
            output = super().forward(*args, **kwargs)
            output.logits = output.logits * 1.5
            if labels is not None:
                output.loss = self.loss_function(output.logits, labels, self.vocab_size)
            return output

    base.__class__ = Doubled


def attention_gets(**changes):
    def change(base):
        for layer in base.model.layers:
            layer.self_attn.register_forward_pre_hook(
                lambda module, args, kwargs: (args, kwargs | changes), with_kwargs=True
            )

    return change


def other_cache(base):
    """Layers that answer otherwise where there is a cache."""
    base.model.layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: (
            (args[0] * (2 if kwargs.get("past_key_values") is not None else 1), *args[1:]),
            kwargs,
        ),
        with_kwargs=True,
    )


def rows():
    """Reasons that a language model itself brings: `explain` names them, patched or not."""

    def row(sentence, act):
        return Row(sentence, act, "explain")

    yield row(
        "the model is an encoder-decoder; only decoder-only models are packed", explained(encoder_decoder)
    )
    yield row("{} is not a transformers model", explained(no_transformers_model))
    yield row("{} has no decoder under `base_model` or `model`", explained(without_a_decoder))
    yield row("the model names no input embeddings", explained(without("get_input_embeddings")))
    yield row("{} has no language modelling head", explained(without("get_output_embeddings")))
    yield row("the model has no floating point weights", explained(whole_numbers))
    yield row(
        "some weights are on the meta device, so the self-check cannot run",
        explained(lambda base: base.to("meta")),
    )
    yield row(
        "{} keeps a recurrent state, which would leak from one text into the next",
        explained(as_it_is, "mamba"),
    )
    yield row(
        "{} has layers with state other than keys and values ({}), which would leak from one text into "
        "the next",
        explained(as_it_is, "lfm2"),
    )
    yield row(
        "{} scales its attention by the place in the row, which packing changes", explained(temperature)
    )
    yield row(
        "{} masks tokens by their place in the row, which packing changes, and {}",
        explained(wrapped_attention, "gpt_neo"),
    )
    yield row("the forward of a {} was replaced on the instance", explained(wrapped_attention, "gpt_neo"))
    yield row("BLOOM with pretraining_tp > 1 and slow_but_exact", explained(slow_but_exact, "bloom"))
    yield row("layer {} has {} modules with {}, expected 1", explained(derived_attention(1), "bloom"))
    yield Row(
        "the embedding is {}", explained(as_it_is, "gemma"), "explain", reads="the embedding is a Gemma"
    )
    yield row("the embedding has hooks", explained(hooked("model.embed_tokens")))
    for sentence, reads in (
        ("{} is a {}", "the embedding's table is a Weight"),
        ("the embedding's table", "called as a module: the embedding's table is a Weight"),
    ):
        yield Row(sentence, explained(weight_of_a_class("model.embed_tokens")), "explain", reads=reads)
    yield row("the embedding's table is trainable", explained(trainable("model.embed_tokens")))
    yield row("the embedding renormalises its table (max_norm)", explained(renormalised))
    yield Row("the head is {}", explained(head_of_a_class), "explain", reads="the head is a _Head")
    yield row("the head has hooks", explained(hooked("lm_head")))
    yield Row(
        "the head's weight",
        explained(weight_of_a_class("lm_head")),
        "explain",
        reads="the head's weight is a Weight",
    )
    yield row("the model has a loss function of its own ({})", explained(named_loss))
    yield Row(
        "{} was replaced on the instance",
        explained(own_alibi, "bloom"),
        "explain",
        reads="build_alibi_tensor was replaced on the instance",
    )
    yield row("the fused head gave other numbers than the model's own: ", explained(changed_behind_the_head))
    yield row("the model's mask is neither causal nor a sliding window of {}", chunked)
    yield row(
        "{} adds a position bias",
        explained(attention_gets(position_bias=NO_BIAS)),
    )
    yield row("{} was not handed the mask that was made", explained(attention_gets(attention_mask=None)))
    yield row("its attention does not run on the packed row's own", patched(as_it_is, "gptj"))
    yield row(
        "a prompt that is computed beforehand gives other logits than the model: ", patched(other_cache)
    )
    yield Row("{}: {} off by {}{}", patched(other_cache), "explain", reads="{}: logits off by {}")
    yield row('the model is patched with placement="{}", which only forward serves', behind_bos)


def chunked(kit):
    return build("llama4_text", architectures=kit.architectures)


def behind_bos(kit):
    return softprompt.patch(kit.llama(), placement="after_bos")
