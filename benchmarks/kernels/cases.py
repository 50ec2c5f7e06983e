"""The sizes of the kernel cases and what is asked of them."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.kernels.attention import attention
from benchmarks.kernels.attention_problem import AttentionSizes
from benchmarks.kernels.elementwise import HeadsOf, RowsOf, gate, norm, rotation
from benchmarks.kernels.head import HeadSizes, head
from benchmarks.kernels.logits import logit_rows
from benchmarks.kernels.problem import KernelCase, KernelTargets
from benchmarks.kernels.rows import RowSizes, embedding, layout, padded_rows
from benchmarks.shapes import BLOOM_VOCABULARY, LLAMA_VOCABULARY
from benchmarks.texts import EvenLengths, twitter_complaints

_TWEETS = twitter_complaints()
_ARTICLE = RowSizes(_TWEETS, 8, 64, 8, 1024, BLOOM_VOCABULARY)
_FULL = RowSizes(EvenLengths(512, 512, 0.1), 32, 512, 100, 4096, LLAMA_VOCABULARY)  # 135 MB of embeddings
_TOY_ROWS = RowSizes(_TWEETS, 2, 16, 3, 32, 64)

_HEADS = {
    "bloom-560m": (1024, BLOOM_VOCABULARY),
    "llama-1b": (2048, LLAMA_VOCABULARY),
    "llama-8b": (4096, LLAMA_VOCABULARY),
    "gemma-2b": (2304, 256_000),
}
_LABEL_ROWS = (8, 128, 1024, 4096, 8192)

_ATTENTIONS = {
    "article": AttentionSizes(_TWEETS, 8, 8, 16, 16, 64, alibi=True),
    "math": AttentionSizes(EvenLengths(100, 400, 1.0), 4, 200, 24, 8, 128),
    "8b": AttentionSizes(EvenLengths(102, 512, 0.1), 16, 100, 32, 8, 128),
    "long": AttentionSizes(EvenLengths(1639, 2048, 1.0), 32, 20, 32, 8, 64),
    "32x512": AttentionSizes(EvenLengths(512, 512, 1.0), 32, 100, 32, 32, 128),
}
_TOY_TEXTS = EvenLengths(3, 9, 1.0)

# Rows, hidden size, size of the MLP, query heads, key heads, head dim: the packed row of the step "8b", and a
# batch with SmolLM2-135M.
_LAYERS = {"llama-8b": (5120, 4096, 14336, 32, 8, 128), "smollm2": (1200, 576, 1536, 9, 3, 64)}


def _head_case(name: str, width: int, vocabulary: int, rows: int) -> KernelCase:
    limit = 1.2 if rows >= 1024 else 1.3
    return KernelCase(
        f"head-{name}-{rows}",
        "linear_cross_entropy",
        f"H {width}, V {vocabulary:,}, M {rows:,}: loss and d(hidden)",
        head,
        HeadSizes(width, vocabulary, rows),
        HeadSizes(32, 96, min(rows, 40)),
        KernelTargets(over_floor=limit, vs=(("every peer", 1.3),)),
    )


def _attention_case(name: str, sizes: AttentionSizes, *, backward: bool) -> KernelCase:
    wanted = (("flex", 1.0),)
    if name == "8b":
        wanted = (*wanted, ("sdpa padded, mask", 1.5), ("sdpa padded, causal", 1.5))
    toy = replace(
        sizes,
        texts=_TOY_TEXTS,
        rows=3,
        num_virtual_tokens=4,
        num_heads=2,
        num_key_heads=1 if sizes.num_key_heads < sizes.num_heads else 2,
        head_dim=16,
        backward=backward,
    )
    return KernelCase(
        f"attention-{name}-{'both' if backward else 'forward'}",
        "shared_prompt_attention",
        f"{sizes.rows} texts, P {sizes.num_virtual_tokens}, heads {sizes.num_heads}/{sizes.num_key_heads} "
        f"of {sizes.head_dim}{', ALiBi' if sizes.alibi else ''}: "
        f"{'forward and backward' if backward else 'forward'}",
        attention,
        replace(sizes, backward=backward),
        toy,
        KernelTargets(vs=wanted),
    )


def _elementwise_cases(name: str) -> tuple[KernelCase, ...]:
    rows, hidden_size, intermediate_size, num_heads, num_key_heads, head_dim = _LAYERS[name]
    both = "forward and backward"
    return (
        KernelCase(
            f"norm-{name}",
            "rms_norm",
            f"{rows:,} rows of {hidden_size:,}: {both}",
            norm,
            RowsOf(rows, hidden_size),
            RowsOf(5, 24),
        ),
        KernelCase(
            f"norm-heads-{name}",
            "rms_norm",
            f"queries of {rows:,} tokens, {num_heads} heads of {head_dim}: {both}",
            norm,
            RowsOf(rows * num_heads, head_dim),
            RowsOf(40, 16),
        ),
        KernelCase(
            f"glu-{name}",
            "glu",
            f"SwiGLU, {rows:,} rows of {intermediate_size:,}: {both}",
            gate,
            RowsOf(rows, intermediate_size),
            RowsOf(5, 24),
        ),
        KernelCase(
            f"rotary-{name}",
            "rotary",
            f"{rows:,} tokens, heads {num_heads}/{num_key_heads} of {head_dim}: {both}",
            rotation,
            HeadsOf(rows, num_heads, num_key_heads, head_dim),
            HeadsOf(5, 2, 1, 16),
        ),
    )


KERNEL_CASES = {
    case.name: case
    for case in (
        *(
            _attention_case(name, sizes, backward=backward)
            for name, sizes in _ATTENTIONS.items()
            for backward in (False, True)
        ),
        KernelCase(
            "embed-article",
            "embed_prompt",
            "8 tweets behind 8 virtual tokens, H 1,024",
            embedding,
            _ARTICLE,
            _TOY_ROWS,
            KernelTargets(vs=(("peft", 5.0),)),
        ),
        KernelCase(
            "embed-135mb",
            "embed_prompt",
            "32 texts of 512 behind 100 virtual tokens, H 4,096: 135 MB are written",
            embedding,
            _FULL,
            _TOY_ROWS,
            KernelTargets(over_floor=1 / 0.85),
        ),
        KernelCase(
            "layout-article",
            "pack_layout",
            "8 x 64",
            layout,
            _ARTICLE,
            _TOY_ROWS,
            KernelTargets(microseconds=10),
        ),
        KernelCase(
            "layout-65536",
            "pack_layout",
            "32 x 2,048",
            layout,
            replace(_FULL, texts=EvenLengths(1639, 2048, 0.1), pad_to=2048),
            _TOY_ROWS,
            KernelTargets(microseconds=10),
        ),
        KernelCase(
            "layout-32x512",
            "pack_layout",
            "32 x 512",
            layout,
            replace(_FULL, texts=EvenLengths(300, 512, 0.1)),
            _TOY_ROWS,
            cpu_targets=KernelTargets(vs=(("reference", 5.0),)),
        ),
        KernelCase(
            "embed-67mb",
            "embed_prompt",
            "32 texts of 512 behind 100 virtual tokens, H 1,024, V 50,000: 67 MB in fp32 are written",
            embedding,
            replace(_FULL, hidden_size=1024, vocab_size=50_000),
            _TOY_ROWS,
            cpu_targets=KernelTargets(vs=(("peft", 1.5), ("copy of the result", 1 / 1.3))),
        ),
        KernelCase(
            "rows-bloom-560m-64",
            "linear_cross_entropy",
            f"64 rows of {BLOOM_VOCABULARY:,} logits: losses and d(logits), after a copy of the logits",
            logit_rows,
            HeadSizes(0, BLOOM_VOCABULARY, 64),
            HeadSizes(0, 96, 5),
            cpu_targets=KernelTargets(vs=(("plain torch", 2.0),)),
        ),
        KernelCase(
            "prepend-article", "prepend_prompt", "8 x 64, P 8, H 1,024", padded_rows, _ARTICLE, _TOY_ROWS
        ),
        KernelCase(
            "prepend-160mb",
            "prepend_prompt",
            "32 x 512, P 100, H 4,096: 160 MB are written",
            padded_rows,
            _FULL,
            _TOY_ROWS,
        ),
        *(
            _head_case(name, *width_and_vocabulary, rows)
            for name, width_and_vocabulary in _HEADS.items()
            for rows in _LABEL_ROWS
        ),
        *(case for name in _LAYERS for case in _elementwise_cases(name)),
    )
}

# What a CPU does in seconds.
CPU_KERNELS = (
    "embed-article",
    "layout-article",
    "layout-32x512",
    "layout-65536",
    "embed-67mb",
    "prepend-article",
    "rows-bloom-560m-64",
    "norm-smollm2",
    "norm-heads-smollm2",
    "glu-smollm2",
    "rotary-smollm2",
    "head-bloom-560m-8",
    "head-bloom-560m-128",
    "attention-article-forward",
    "attention-article-both",
    "attention-math-forward",
    "attention-math-both",
)
