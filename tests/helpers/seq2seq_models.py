"""Tiny random encoder-decoders of many families, their PEFT models, and batches for them."""

import math

import torch
import transformers
from parity import assert_close, make_batch, step
from peft import MultitaskPromptTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from tiny_models import VOCABULARY
from transformers import CONFIG_MAPPING, AutoModelForSeq2SeqLM

transformers.logging.set_verbosity_error()

_T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 24,
    "d_kv": 6,
    "d_ff": 32,
    "num_layers": 2,
    "num_heads": 4,
    "dropout_rate": 0.0,
    "pad_token_id": 0,
    "decoder_start_token_id": 0,
    "eos_token_id": 2,
}
_BART = {
    "vocab_size": VOCABULARY,
    "d_model": 24,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "max_position_embeddings": 64,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "pad_token_id": 1,
    "decoder_start_token_id": 2,
    "eos_token_id": 2,
}
_GEMMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "sliding_window": 6,
    "layer_types": ["sliding_attention", "full_attention"],
    "dropout_rate": 0.0,
    "attn_logit_softcapping": 5.0,
    "final_logit_softcapping": 3.0,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MARIAN = _BART | {"pad_token_id": VOCABULARY - 1}
_LED = {name: value for name, value in _BART.items() if name != "max_position_embeddings"} | {
    "attention_window": 8,
    "max_encoder_position_embeddings": 64,
    "max_decoder_position_embeddings": 64,
}
_EXPERTS = {"num_experts": 4, "encoder_sparse_step": 2, "decoder_sparse_step": 2}

# name -> (model type, configuration)
FAMILIES = {
    "t5": ("t5", _T5),
    "t5-1.1": ("t5", _T5 | {"tie_word_embeddings": False, "feed_forward_proj": "gated-gelu"}),
    "mt5": ("mt5", _T5),
    "umt5": ("umt5", _T5),
    "longt5": ("longt5", _T5 | {"encoder_attention_type": "transient-global"}),
    "switch": ("switch_transformers", _T5 | {"num_experts": 4}),
    "t5gemma": ("t5gemma", {"encoder": _GEMMA, "decoder": _GEMMA, "vocab_size": VOCABULARY}),
    "bart": ("bart", _BART),
    "bart-scaled": ("bart", _BART | {"scale_embedding": True}),
    "mbart": ("mbart", _BART),
    "pegasus": ("pegasus", _BART),
    "pegasus_x": ("pegasus_x", _BART | {"block_size": 8, "num_global_tokens": 4}),
    "marian": ("marian", _MARIAN | {"scale_embedding": True}),
    "m2m_100": ("m2m_100", _BART),
    "nllb-moe": ("nllb-moe", _BART | _EXPERTS),
    "blenderbot": ("blenderbot", _BART),
    "blenderbot-small": ("blenderbot-small", _BART),
    "plbart": ("plbart", _BART),
    "mvp": ("mvp", _BART),
    "bigbird_pegasus": ("bigbird_pegasus", _BART),
    "led": ("led", _LED),
}
# Relative positions and absolute ones, tied heads and scaled embeddings, experts, and the caps of Gemma.
QUICK_FAMILIES = ("t5", "longt5", "t5gemma", "bart-scaled", "nllb-moe", "led")
# Their encoders round lengths up, or give places to rows in order: no columns are dropped.
KEEP_COLUMNS = ("longt5", "switch", "nllb-moe", "pegasus_x", "bigbird_pegasus", "led")


def build(name, dtype=torch.float64, **overrides):
    """A frozen random model in evaluation mode, with weights large enough that errors show."""
    model_type, settings = FAMILIES[name]
    torch.manual_seed(0)
    config = CONFIG_MAPPING[model_type](**(settings | overrides))
    model = AutoModelForSeq2SeqLM.from_config(config).to(dtype).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(dtype)
            if parameter.ndim < 2:
                parameter.add_(noise * 0.1)
            elif "embed" not in parameter_name and "shared" not in parameter_name:
                parameter.copy_(noise * 1.2 / math.sqrt(parameter.shape[-1]))
        if hasattr(model, "final_logits_bias"):
            model.final_logits_bias.normal_(generator=generator)
    return model.requires_grad_(False)


def config_of(kind=PromptTuningConfig, num_virtual_tokens=4, **options):
    """PEFT's configuration, with the sizes that it cannot find in every model's configuration."""
    return kind(
        task_type="SEQ_2_SEQ_LM",
        num_virtual_tokens=num_virtual_tokens,
        token_dim=24,
        num_layers=1,
        num_attention_heads=1,
        **options,
    )


def prompted(name, dtype=torch.float64, config=None, **overrides):
    """A PEFT model around `build`, with the prompt in its dtype, so that nothing is rounded in between."""
    base = build(name, dtype, **overrides)
    torch.manual_seed(3)
    model = get_peft_model(base, config_of() if config is None else config)
    model.prompt_encoder.to(dtype)
    return model


def seq2seq_batch(side="right", answers=(5, 2, 4), *, width=9, seed=0):
    """Three padded texts, and labels of these lengths behind which -100 follows; one is -100 in between."""
    batch = make_batch(side=side, labels=None, width=width, seed=seed, vocabulary=VOCABULARY - 1)
    generator = torch.Generator().manual_seed(seed + 1)
    labels = torch.randint(3, VOCABULARY - 1, (3, max(*answers, 2)), generator=generator)
    labels[torch.arange(labels.shape[1]) >= torch.tensor(answers)[:, None]] = -100
    labels[0, 1] = -100
    return batch | {"labels": labels}


ENCODERS = {
    "mlp": lambda: config_of(PromptEncoderConfig, encoder_hidden_size=12),
    "multitask": lambda: config_of(MultitaskPromptTuningConfig, num_tasks=3, num_ranks=2),
    "multitask of the encoder": lambda: config_of(
        MultitaskPromptTuningConfig, num_tasks=3, num_ranks=2, num_transformer_submodules=1
    ),
}


def encoded(kind, name="t5"):
    model = prompted(name, config=ENCODERS[kind]())
    for parameter in model.prompt_encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model


def assert_same_answers(fast, stock, batch, bound=1e-12, **kwargs):
    """Loss, all logits, and the gradients of everything trainable are PEFT's."""
    expected, got = step(stock, batch, **kwargs), step(fast, batch, **kwargs)
    assert_close(got.loss, expected.loss, bound, "loss")
    assert_close(got.logits, expected.logits, bound, "logits")
    assert got.grads.keys() == expected.grads.keys()
    for name, grad in expected.grads.items():
        assert_close(got.grads[name], grad, 10 * bound, f"gradient of {name}")
