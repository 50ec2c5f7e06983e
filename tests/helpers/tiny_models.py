"""Tiny random causal LMs of many architectures, with weights large enough that errors show in the loss."""

import copy
import math

import torch
import transformers
from peft import PromptTuningConfig, get_peft_model
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

transformers.logging.set_verbosity_error()

VOCABULARY = 97
WINDOW = 6  # shorter than prompt + text, so that it bites
POSITIONS = 64

_BASE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": POSITIONS,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_NO_GROUPS = _BASE | {"num_key_value_heads": 4}
_WIDE_HEADS = _BASE | {"head_dim": 16}
_ALTERNATING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": WINDOW}
_GEMMA2 = _WIDE_HEADS | _ALTERNATING | {"query_pre_attn_scalar": 16}
_EXPERTS = {
    "num_local_experts": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}
_GPT2 = {"vocab_size": VOCABULARY, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": POSITIONS}
_NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
_OPT = _NO_GROUPS | {"ffn_dim": 64, "word_embed_proj_dim": 48, "dropout": 0.0, "attention_dropout": 0.0}
_FALCON = {"vocab_size": VOCABULARY, "hidden_size": 48, "num_hidden_layers": 2}
_GPT_NEO = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "num_layers": 2,
    "num_heads": 4,
    "attention_types": [[["global", "local"], 1]],
    "max_position_embeddings": POSITIONS,
}
_STATE = {"vocab_size": VOCABULARY, "hidden_size": 48, "state_size": 8, "num_hidden_layers": 2}

# name -> (model type, configuration)
ARCHITECTURES = {
    "bloom": ("bloom", {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "bloom-6-heads": ("bloom", {"vocab_size": VOCABULARY, "hidden_size": 48, "n_layer": 2, "n_head": 6}),
    "llama": ("llama", _BASE),
    "qwen2": ("qwen2", _BASE),
    "qwen2-window": ("qwen2", _BASE | _ALTERNATING | {"use_sliding_window": True}),
    "qwen3": ("qwen3", _WIDE_HEADS),
    "mistral-window": ("mistral", _WIDE_HEADS | {"sliding_window": WINDOW}),
    "gemma": ("gemma", _WIDE_HEADS),
    "gemma2": (
        "gemma2",
        _GEMMA2 | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    ),
    "gemma3_text": ("gemma3_text", _GEMMA2),
    "gpt2": ("gpt2", _GPT2 | _NO_DROPOUT),
    "gpt2-dropout": ("gpt2", _GPT2),
    "gptj": ("gptj", _GPT2 | _NO_DROPOUT | {"rotary_dim": 8}),
    "gpt_neox": ("gpt_neox", _NO_GROUPS),
    "opt": ("opt", _OPT),
    "opt-projected": ("opt", _OPT | {"word_embed_proj_dim": 32, "do_layer_norm_before": False}),
    "phi": ("phi", _BASE),
    "falcon": ("falcon", _FALCON | {"num_attention_heads": 4, "alibi": False}),
    "falcon-groups": (
        "falcon",
        _FALCON | {"num_attention_heads": 4, "new_decoder_architecture": True, "num_kv_heads": 2},
    ),
    "falcon-alibi": ("falcon", _FALCON | {"num_attention_heads": 6, "alibi": True}),
    "falcon-alibi-own-keys": (
        "falcon",
        _FALCON
        | {"num_attention_heads": 4, "alibi": True, "multi_query": False, "parallel_attn": False}
        | {"bias": True},
    ),
    "mpt": (
        "mpt",
        {"vocab_size": VOCABULARY, "d_model": 48, "n_heads": 6, "n_layers": 2, "max_seq_len": POSITIONS},
    ),
    "gpt_neo": (
        "gpt_neo",
        _GPT_NEO | {"window_size": WINDOW},
    ),
    "starcoder2-window": ("starcoder2", _BASE | {"sliding_window": WINDOW}),
    "granite": (
        "granite",
        _BASE
        | {
            "embedding_multiplier": 3.0,
            "logits_scaling": 2.0,
            "residual_multiplier": 0.5,
            "attention_multiplier": 0.3,
        },
    ),
    "cohere": ("cohere", _BASE),
    "gpt_oss": (
        "gpt_oss",
        _WIDE_HEADS
        | _ALTERNATING
        | _EXPERTS
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    ),
    "stablelm": ("stablelm", _BASE | {"hidden_size": 64}),
    "mamba": ("mamba", _STATE),
    "mamba2": ("mamba2", _STATE | {"num_heads": 6, "head_dim": 16, "n_groups": 1, "chunk_size": 8}),
    "jamba": (
        "jamba",
        _BASE
        | _EXPERTS
        | {
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "mamba_d_state": 8,
            "mamba_dt_rank": 8,
            "use_mamba_kernels": False,
        },
    ),
    "recurrent_gemma": (
        "recurrent_gemma",
        _BASE | {"num_hidden_layers": 3, "lru_width": 48, "attention_window_size": 64, "head_dim": 16},
    ),
    "lfm2": ("lfm2", _BASE | {"layer_types": ["conv", "full_attention"]}),
    "qwen3_next": (
        "qwen3_next",
        _WIDE_HEADS
        | _EXPERTS
        | {
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "shared_expert_intermediate_size": 32,
            "layer_types": ["linear_attention", "full_attention"],
        },
    ),
}
PADDED = ("mamba", "mamba2", "jamba", "recurrent_gemma", "lfm2", "qwen3_next")
PACKED = tuple(name for name in ARCHITECTURES if name not in (*PADDED, "gpt2-dropout"))


def build(name, dtype=torch.float64, implementation=None, architectures=ARCHITECTURES, **overrides):
    """A frozen random model in evaluation mode."""
    model_type, settings = architectures[name]
    config = CONFIG_MAPPING[model_type](**(settings | overrides))
    extra = {} if implementation is None else {"attn_implementation": implementation}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, **extra).to(dtype).eval()
    if any("Experts" in type(module).__name__ for module in model.modules()):
        model.set_experts_implementation("eager")  # the grouped product has no fp64
    _spread(model, embedding_scale=1 / 8 if "gemma" in name else 1.0)
    return model.requires_grad_(False)


def _spread(model, embedding_scale):
    """Weights of 0.02, as transformers makes them, would hide mistakes: every layer shall matter."""
    generator = torch.Generator().manual_seed(1)
    embedding = model.get_input_embeddings().weight
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.dtype)
        with torch.no_grad():
            if parameter is embedding:
                parameter.copy_(noise * embedding_scale)
            elif any(part in name for part in ("A_log", "dt", "conv", "recurrent")):
                continue  # a recurrence with random decay explodes
            elif parameter.ndim >= 2:
                parameter.copy_(noise * 1.2 / math.sqrt(parameter.shape[-1]))
            elif name.endswith("weight"):
                parameter.add_(noise * 0.1)
            else:
                parameter.copy_(noise * 0.3)


def prompt_config(base, num_virtual_tokens=4):
    """PEFT's configuration, with the sizes that it cannot find in every model's configuration."""
    return PromptTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=num_virtual_tokens,
        token_dim=base.get_input_embeddings().embedding_dim,
        num_layers=1,
        num_attention_heads=1,
    )


def with_prompt(base, num_virtual_tokens=4, seed=3):
    """A PEFT model around `base`, with the prompt in its dtype, so that nothing is rounded in between."""
    torch.manual_seed(seed)
    model = get_peft_model(base, prompt_config(base, num_virtual_tokens))
    model.prompt_encoder.to(next(base.parameters()).dtype)
    return model


def prompted(name, dtype=torch.float64, implementation=None, num_virtual_tokens=4, **overrides):
    """`with_prompt` of `build`."""
    return with_prompt(build(name, dtype, implementation, **overrides), num_virtual_tokens)


def pair(model):
    """Two models with the same weights, to be compared with each other."""
    return copy.deepcopy(model), copy.deepcopy(model)
