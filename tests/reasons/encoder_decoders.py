"""Reasons of encoder-decoders."""

import torch
from peft import MultitaskPromptTuningConfig
from quantised_modules import OneScale, replace_linears
from seq2seq_models import build, config_of, prompted, seq2seq_batch
from torch.nn import functional

import softprompt
from reasons.rows import Row
from softprompt.engine.plan import BOTH_WAYS

BATCH = seq2seq_batch()


def patched(change=lambda base: None, name="t5", dtype=torch.float64, **options):
    """Changes an encoder-decoder, then patches."""

    def act(kit):
        model = prompted(name, dtype)
        change(model.get_base_model())
        return softprompt.patch(model, **options)

    return act


def called(**changes):
    def act(kit):
        model = softprompt.patch(prompted("t5"))
        model(**(BATCH | changes))
        return model

    return act


def tasks_without_labels(kit):
    config = config_of(MultitaskPromptTuningConfig, num_tasks=3, num_ranks=2)
    model = softprompt.patch(prompted("t5", config=config))
    embeds = torch.zeros(3, 5, 24, dtype=torch.float64)
    call = BATCH | {"labels": None, "decoder_inputs_embeds": embeds, "use_cache": False}
    model(**call, task_ids=torch.tensor([0, 1, 2]))
    return model


def without_peft(kit):
    softprompt.forward(build("t5"), torch.zeros(4, 24), BATCH["input_ids"])


def changed_behind_the_head(base):
    class Raised(type(base)):
        def forward(self, *args, labels=None, **kwargs):
            output = super().forward(*args, labels=labels, **kwargs)
            output.logits = output.logits * 1.5
            if labels is not None:
                output.loss = functional.cross_entropy(output.logits.flatten(0, 1), labels.flatten())
            return output

    base.__class__ = Raised


def not_finite(base):
    base.encoder.final_layer_norm.weight.fill_(float("nan"))


def fails_on_prompts(base):
    base.encoder.register_forward_pre_hook(lambda module, args: 1 / 0)


def head_that_adds_up_its_rows(base):
    base.lm_head.register_forward_hook(lambda module, args, output: output.cumsum(1))


def with_one_scale(base):
    replace_linears(base, OneScale)


def trained_decoder(base):
    base.get_decoder().final_layer_norm.weight.requires_grad_(True)


def without_decoder_embeds(base):
    class Strict(type(base)):
        def forward(self, *args, decoder_inputs_embeds=None, **kwargs):
            if decoder_inputs_embeds is not None:
                raise TypeError("decoder_inputs_embeds are not taken")
            return super().forward(*args, **kwargs)

    base.__class__ = Strict


def rows():
    yield Row(BOTH_WAYS, patched(), "explain")
    yield Row(
        "pads at the end change what the encoder makes of the columns before ({}={})",
        patched(name="led", dtype=torch.float32),
        "explain",
    )
    yield Row(
        "numbers that stand out in pads change the other tokens (logits by {}, tried on two rows)",
        patched(with_one_scale, dtype=torch.float32),
        "explain",
    )
    yield Row(
        "whether pads change the other tokens cannot be tried: {}: {}",
        patched(without_decoder_embeds),
        "explain",
    )
    yield Row("weights of the decoder are trained", patched(trained_decoder), "explain")
    yield Row(
        "a decoder of type {} masks pads of its own accord, but where it keeps a cache",
        patched(name="t5gemma"),
        "explain",
    )
    for sentence, reads in (
        ("{}: {} off by {}{}", "{}: loss off by {}, prompt gradient by {}, logits by {}"),
        ("the fused head gave other numbers than the model's own: ", ""),
    ):
        name = f"of T5: {reads or sentence}"
        yield Row(sentence, patched(changed_behind_the_head), "explain", name, reads)
    for sentence, change in (
        ("the model's own loss or prompt gradient is not finite", not_finite),
        ("the model's own forward fails on soft prompts: {}: {}", fails_on_prompts),
        ("no faster route gives the numbers of the model's own forward: ", head_that_adds_up_its_rows),
    ):
        yield Row(sentence, patched(change), name=f"of T5: {sentence}")
    yield Row(
        "use_cache=True was asked for, and the fast route keeps none",
        called(use_cache=True),
        name="a cache of T5",
    )
    yield Row(
        "multitask prompt tuning makes the decoder's inputs from the labels, and {}", tasks_without_labels
    )
    yield Row(
        'placement="{}" is for decoder-only models, whose texts begin with BOS',
        patched(placement="after_bos"),
        "error",
    )
    yield Row(
        'positions="compact" needs the packed route: {}',
        patched(positions="compact"),
        "error",
        "compact positions of T5",
    )
    yield Row(
        "softprompt.forward takes decoder-only models, got the encoder-decoder {}: softprompt.patch serves "
        "it as a PEFT model of task type SEQ_2_SEQ_LM",
        without_peft,
        "error",
    )
