"""The architectures of the table in docs/models.md: those of tiny_models.py, and more."""

from tiny_models import (
    _ALTERNATING,
    _BASE,
    _EXPERTS,
    _GEMMA2,
    _GPT2,
    _NO_DROPOUT,
    _NO_GROUPS,
    _WIDE_HEADS,
    POSITIONS,
    VOCABULARY,
    WINDOW,
)
from tiny_models import ARCHITECTURES as COMMON
from tiny_models import PADDED as COMMON_PADDED

_FOUR_LAYERS = {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}
_GEMMA4 = (
    _GEMMA2
    | _FOUR_LAYERS
    | {"vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 0, "per_layer_config": {}}
)

MORE = {
    "codegen": ("codegen", _GPT2 | _NO_DROPOUT | {"rotary_dim": 8}),
    "gpt_bigcode": ("gpt_bigcode", _GPT2 | _NO_DROPOUT),
    "xglm": (
        "xglm",
        {"vocab_size": VOCABULARY, "d_model": 48, "num_layers": 2, "attention_heads": 4, "ffn_dim": 64}
        | {"max_position_embeddings": POSITIONS, "dropout": 0.0, "attention_dropout": 0.0},
    ),
    "biogpt": (
        "biogpt",
        _NO_GROUPS | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    ),
    "mixtral-window": ("mixtral", _BASE | _EXPERTS | {"sliding_window": WINDOW}),
    "qwen3_moe": ("qwen3_moe", _WIDE_HEADS | _EXPERTS),
    "olmoe": ("olmoe", _BASE | _EXPERTS),
    "phi3-window": ("phi3", _BASE | {"sliding_window": WINDOW}),
    "cohere2": ("cohere2", _WIDE_HEADS | _ALTERNATING),
    "olmo2": ("olmo2", _BASE),
    "olmo3": ("olmo3", _BASE | _ALTERNATING),
    "exaone4": ("exaone4", _WIDE_HEADS | _ALTERNATING),
    "smollm3": ("smollm3", _BASE | {"no_rope_layer_interval": 2}),
    "glm": ("glm", _WIDE_HEADS),
    "glm4": ("glm4", _WIDE_HEADS),
    "nemotron": ("nemotron", _WIDE_HEADS),
    "deepseek_v3": (
        "deepseek_v3",
        _NO_GROUPS
        | {"num_hidden_layers": 3, "moe_intermediate_size": 32, "n_shared_experts": 1, "n_routed_experts": 8}
        | {"kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 12}
        | {
            "v_head_dim": 12,
            "n_group": 2,
            "topk_group": 1,
            "num_experts_per_tok": 2,
            "first_k_dense_replace": 1,
        },
    ),
    "llama4_text": (
        "llama4_text",
        _WIDE_HEADS
        | _EXPERTS
        | {"num_hidden_layers": 4, "intermediate_size_mlp": 64, "attention_chunk_size": 8}
        | {"no_rope_layer_interval": 2, "layer_types": ["chunked_attention", "full_attention"] * 2},
    ),
    "gemma3n_text": (
        "gemma3n_text",
        _GEMMA2
        | _FOUR_LAYERS
        | {"vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8, "laurel_rank": 8}
        | {"num_kv_shared_layers": 0, "activation_sparsity_pattern": [0.0] * 4},
    ),
    "gemma3n_text-shared-keys": (
        "gemma3n_text",
        _GEMMA2
        | _FOUR_LAYERS
        | {"vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8, "laurel_rank": 8}
        | {"num_kv_shared_layers": 2, "activation_sparsity_pattern": [0.0] * 4},
    ),
    "gemma4_text": ("gemma4_text", _GEMMA4 | {"num_kv_shared_layers": 0}),
    "gemma4_text-layer-inputs": ("gemma4_text", _GEMMA4 | {"hidden_size_per_layer_input": 8}),
    "rwkv": (
        "rwkv",
        {"vocab_size": VOCABULARY, "hidden_size": 48, "num_hidden_layers": 2, "attention_hidden_size": 48}
        | {"intermediate_size": 64, "context_length": POSITIONS},
    ),
}
ARCHITECTURES = {name: made for name, made in (COMMON | MORE).items() if name != "gpt2-dropout"}
# Nobody can train this one with soft prompts: its embeddings have to be inverted to ids.
STOCK = ("gemma4_text-layer-inputs",)
# The backward of PEFT's forward fails on this one, whose cache changes states in place.
NO_REFERENCE = ("rwkv",)
PADDED = COMMON_PADDED
PACKED = tuple(name for name in ARCHITECTURES if name not in (*PADDED, *STOCK, *NO_REFERENCE))
# Constants of fp32 in the model's code, which fp64 does not take.
ONLY_FP32 = ("xglm",)
