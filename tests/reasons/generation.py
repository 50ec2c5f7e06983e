"""Reasons of `generate`, and of calls that nothing else serves either."""

import contextlib

import torch
from generating import speaker
from peft import (
    MultitaskPromptTuningConfig,
    get_peft_model,
)
from tiny_models import build, prompt_config, prompted
from transformers import (
    DynamicCache,
)

import softprompt
from reasons.rows import BATCH, DYNAMIC, Row
from reasons.steps import in_training_mode


def generated(options=None, name="llama", change=lambda model: None, suppress=(), **overrides):
    def act(kit):
        model = speaker(name, **overrides)
        softprompt.patch(model)
        change(model)
        given = {"input_ids": BATCH["input_ids"][:1, -3:], "max_new_tokens": 2, "do_sample": False}
        with contextlib.suppress(suppress):
            model.generate(**given | (options or {}))
        return model

    return act


def multitask(kit):
    base = speaker("llama").get_base_model()
    config = MultitaskPromptTuningConfig(
        **prompt_config(base).to_dict() | {"peft_type": None, "num_tasks": 2}
    )
    model = softprompt.patch(get_peft_model(base, config).double().eval())
    task = torch.tensor([1])
    model.generate(input_ids=BATCH["input_ids"][:1], task_ids=task, max_new_tokens=2, use_cache=False)
    return model


def own_decoding(model, *args, **kwargs):
    return kwargs.get("input_ids", args[0] if args else None)


def with_checkpointing(model):
    model.get_base_model().gradient_checkpointing_enable()
    model.train()


def embeddings_of(name, **patch):
    def act(kit):
        model = softprompt.patch(speaker(name), **patch)
        embeds = model.get_input_embeddings()(BATCH["input_ids"][:1])
        model.generate(inputs_embeds=embeds, max_new_tokens=2)

    return act


def behind_bos_with_names(kit):
    model = softprompt.patch(speaker("llama"), placement="after_bos")
    model.generate(input_ids=torch.ones(1, 3).long(), adapter_names=["default"], max_new_tokens=2)


def ensemble_behind_bos(kit):
    model = kit.llama()
    model.add_adapter("second", prompt_config(model.get_base_model(), 3))
    softprompt.patch(model, placement="after_bos")
    softprompt.ensemble.losses(model, **BATCH)


def outside_of_a_forward(kit):
    base = build("llama")
    base.set_attn_implementation("softprompt")
    base(input_ids=BATCH["input_ids"])


def named_rows_on_stock(kit):
    softprompt.patch(prompted("lfm2")).generate(
        input_ids=BATCH["input_ids"], adapter_names=["default"] * 3, max_new_tokens=2
    )


def compact_fallback(kit):
    model = softprompt.patch(kit.llama(), positions="compact")
    model(**BATCH, output_attentions=True)


def several_prompts_padded(kit):
    base = build("lfm2")
    model = softprompt.ensemble.create(base, [prompt_config(base), prompt_config(base)])
    softprompt.ensemble.losses(model, **BATCH)


def conversation_on_stock(kit):
    cache = DynamicCache()
    cache.update(*torch.zeros(2, 1, 2, 3, 12, dtype=torch.float64), 0)
    ids = BATCH["input_ids"][:1]
    softprompt.patch(speaker("lfm2")).generate(input_ids=ids, past_key_values=cache, max_new_tokens=2)


def candidates_of_two_lengths(kit):
    prompts = [torch.zeros(4, 48), torch.zeros(2, 48)]
    ids = BATCH["input_ids"][:2]
    softprompt.score(build("lfm2"), prompts, [[1], [2, 3]], ids, prompt_of_row=[0, 1])


def rows():
    in_dict = {"return_dict_in_generate": True}
    yield Row(
        "adapter {} is of type MULTITASK_PROMPT_TUNING, whose prompt depends on the row's task", multitask
    )
    yield Row(
        "the model is in training mode with dropout ({}); model.eval() is served",
        generated(name="gpt2-dropout", change=in_training_mode),
    )
    yield Row(
        "use_cache=False was asked for, and the prompt is kept in a cache", generated({"use_cache": False})
    )
    yield Row(
        "cache_implementation={} is filled by the model itself",
        generated({"cache_implementation": "offloaded"}, suppress=AssertionError),
    )
    yield Row(
        "{} was asked for, which only the padded forward has for the prompt",
        generated({"output_hidden_states": True} | in_dict),
    )
    yield Row(
        "the decoding method is none of those that are known to leave the texts as they are",
        generated({"custom_generate": own_decoding}),
    )
    yield Row(
        "the call has arguments that are not served: {}", generated({"unheard_of": 1}, suppress=ValueError)
    )
    yield Row(
        "the model's rotary embedding changes beyond {} positions, and prompt, text and continuation "
        "may take {}",
        generated({"max_new_tokens": 6}, max_position_embeddings=12, **DYNAMIC),
        name="rotary embedding in generate",
    )
    yield Row(
        "softprompt: a model with gradient checkpointing in training mode drops its cache, and the prompt "
        "with it: call model.eval() before generate",
        generated(change=with_checkpointing),
        "error",
    )
    beforehand = "softprompt: {} needs a prompt that is computed beforehand, but {}"
    yield Row(beforehand, embeddings_of("lfm2"), "error", "embeddings on the padded route")
    yield Row(beforehand, embeddings_of("llama", placement="after_bos"), "error", "embeddings behind BOS")
    lookup = {"prompt_lookup_num_tokens": 2}
    yield Row("assisted decoding", generated(lookup, "lfm2"), "error")
    yield Row("a static cache", generated({"cache_implementation": "static"}, "lfm2"), "error")
    yield Row("softprompt: {} has no stock {} to fall back to: {}", compact_fallback, "error")
    yield Row("softprompt: adapter_names has no stock {} to fall back to: {}", named_rows_on_stock, "error")
    yield Row("softprompt: adapter_names has no generate behind BOS", behind_bos_with_names, "error")
    yield Row(
        'the model is patched with placement="{}", which only forward serves',
        ensemble_behind_bos,
        "error",
        "an ensemble behind BOS",
    )
    yield Row("past_key_values that holds a conversation", conversation_on_stock, "error")
    yield Row(
        "softprompt: several prompts on one batch need the packed route: {}", several_prompts_padded, "error"
    )
    yield Row("softprompt: candidates cannot be scored: {}", candidates_of_two_lengths, "error")
    yield Row("the packed attention only works inside a patched forward", outside_of_a_forward, "error")
