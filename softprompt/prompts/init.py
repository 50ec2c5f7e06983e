"""`softprompt.init`: where a soft prompt starts.

Every function returns a [P, H] fp32 tensor on the CPU, in the space that the model's input embedding module
maps tokens to, whatever that module or the model does to scale them; `set_prompt` puts it into a PEFT model.
`model` is a transformers causal LM or a PEFT model around one. With `seed=None` the functions draw from
torch's global generator, as PEFT does; a number gives the same prompt every time and leaves that generator
alone.

Sources: PEFT's `PromptEmbedding`, and "The Power of Scale for Parameter-Efficient Prompt Tuning" (Lester et
al. 2021), section 2.2, with its code for what the paper leaves open.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from softprompt.nesting import base_of
from softprompt.prompts.adapters import (
    check_base,
    check_prompt,
    prompt_parameter,
    read_adapter,
    read_npy,
    set_prompt,
)
from softprompt.prompts.vocabulary import check_ids, embed, mean_and_std, vocab_size_of, width_of

__all__ = [
    "answers",
    "class_labels",
    "common_tokens",
    "count_tokens",
    "from_adapter",
    "from_file",
    "from_tensor",
    "label_words",
    "matched",
    "prompt_parameter",
    "random",
    "sample_vocabulary",
    "set_prompt",
    "text",
    "uniform",
]


def random(model: Any, num_virtual_tokens: int, *, seed: int | None = None) -> Tensor:
    """Independent N(0, 1) numbers: PEFT's RANDOM, bit-equal at the same seed.

    Far larger than the vectors of most models, which is why PEFT's default learns badly; see `matched`.
    """
    return _normal(model, num_virtual_tokens, _generator(seed))


def sample_vocabulary(model: Any, num_virtual_tokens: int, *, seed: int | None = None) -> Tensor:
    """Tokens of the whole vocabulary, with replacement: PEFT's SAMPLE_VOCAB, bit-equal at the same seed."""
    generator = _generator(seed)
    _normal(model, num_virtual_tokens, generator)  # PEFT makes the random prompt first
    ids = torch.randint(0, vocab_size_of(model), (num_virtual_tokens,), generator=generator)
    return embed(model, ids)


def text(
    model: Any,
    num_virtual_tokens: int,
    tokenizer: Any,
    words: str,
    *,
    tile: bool = True,
    rest: Tensor | None = None,
    seed: int | None = None,
) -> Tensor:
    """The tokens of a text, cut after P of them.

    With `tile` the text is repeated until there are P, the tokenizer's special tokens included: PEFT's TEXT,
    bit-equal. Without it the text comes once and without special tokens, as in the paper's code, and the
    virtual tokens behind it are those of `rest`, [P, H], by default `common_tokens` at `seed`.

    Raises:
        ValueError: the text has no tokens, or `rest` has another shape.
    """
    encoded = tokenizer(words) if tile else tokenizer(words, add_special_tokens=False)
    ids = list(encoded["input_ids"])
    if not ids:
        raise ValueError(f"the text {words!r} has no tokens: give other words")
    _check_length(num_virtual_tokens)
    if tile:
        ids *= math.ceil(num_virtual_tokens / len(ids))
    return _completed(model, embed(model, ids[:num_virtual_tokens]), num_virtual_tokens, rest, seed)


def class_labels(
    model: Any,
    num_virtual_tokens: int,
    tokenizer: Any,
    labels: Sequence[str],
    *,
    rest: Tensor | None = None,
    seed: int | None = None,
) -> Tensor:
    """One virtual token for each label, the mean of the label's tokens: the paper's best initialiser.

    The virtual tokens behind the labels are those of `rest`, [P, H], by default `common_tokens` at `seed`.

    Raises:
        ValueError: no labels, more labels than virtual tokens, a label without tokens, or `rest` has another
            shape.
    """
    if isinstance(labels, str) or not labels:
        raise ValueError(f"expected a sequence of one label or more, got {labels!r}")
    if len(labels) > num_virtual_tokens:
        raise ValueError(
            f"{len(labels)} labels do not fit into {num_virtual_tokens} virtual tokens: expected a prompt of "
            f"{len(labels)} virtual tokens or more"
        )
    means = []
    for label in labels:
        ids = tokenizer(label, add_special_tokens=False)["input_ids"]
        if not ids:
            raise ValueError(f"the label {label!r} has no tokens: rename it, or start the prompt elsewhere")
        means.append(embed(model, ids).mean(0))
    return _completed(model, torch.stack(means), num_virtual_tokens, rest, seed)


def answers(
    model: Any,
    num_virtual_tokens: int,
    token_ids: Sequence[Sequence[int]],
    *,
    order: int | None = None,
) -> Tensor:
    """The answer of every label as the model is to write it, one behind the other, repeated.

    An answer is how a training row ends: the template behind the text, the label, the end token, as in
    ` Label : anger<eos> Label : joy<eos>`. The prompt shows the frozen model the form of a row, so that the
    first loss is a fraction of that of another start. It ends with a whole answer.

    Args:
        model: the model.
        num_virtual_tokens: P; where the answers have more tokens, the first ones are cut.
        token_ids: those of one answer after the other.
        order: a seed, by which the answers are shuffled before each repetition, so that several prompts start
            at different places.

    Raises:
        ValueError: no answers, or answers without tokens.
    """
    _check_length(num_virtual_tokens)
    if not any(map(len, token_ids)):
        raise ValueError("expected the token ids of one answer or more, got none")
    generator = None if order is None else _generator(order)
    ids: list[int] = []
    while len(ids) < num_virtual_tokens:
        numbers = list(range(len(token_ids)))
        if generator is not None:
            numbers = torch.randperm(len(token_ids), generator=generator).tolist()
        ids += [token for number in numbers for token in token_ids[number]]
    return embed(model, ids[-num_virtual_tokens:])


def label_words(
    model: Any,
    num_virtual_tokens: int,
    tokenizer: Any,
    labels: Sequence[str],
    *,
    order: int | None = None,
) -> Tensor:
    """The tokens of all labels, each as it stands behind a space, repeated until there are P of them.

    Args:
        model: the model.
        num_virtual_tokens: P; where the labels have more tokens, the last ones are cut.
        tokenizer: of the model.
        labels: the labels, in their order.
        order: a seed, by which each virtual token is one of these tokens drawn at random instead, so that
            several prompts start at different places.

    Raises:
        ValueError: no labels, or labels without tokens.
    """
    ids = label_word_ids(tokenizer, labels)
    _check_length(num_virtual_tokens)
    if order is None:
        ids = (ids * math.ceil(num_virtual_tokens / len(ids)))[:num_virtual_tokens]
    else:
        drawn = torch.randint(0, len(ids), (num_virtual_tokens,), generator=_generator(order))
        ids = [ids[number] for number in drawn.tolist()]
    return embed(model, ids)


def label_word_ids(tokenizer: Any, labels: Sequence[str]) -> list[int]:
    """The tokens that `label_words` repeats."""
    if isinstance(labels, str) or not labels:
        raise ValueError(f"expected a sequence of one label or more, got {labels!r}")
    ids = [i for label in labels for i in tokenizer(f" {label}", add_special_tokens=False)["input_ids"]]
    if not ids:
        raise ValueError(f"the labels {', '.join(labels)} have no tokens: start the prompt elsewhere")
    return ids


def common_tokens(
    model: Any,
    num_virtual_tokens: int,
    *,
    population: int = 5000,
    counts: Tensor | None = None,
    seed: int | None = None,
) -> Tensor:
    """Tokens drawn from the `population` most common ones: the paper's "sampled vocabulary".

    No token is drawn twice, unless there are fewer than P.

    Args:
        model: the model.
        num_virtual_tokens: P.
        population: how many tokens to draw from.
        counts: [V] how often each token occurs (see `count_tokens`); tokens that never occur are not drawn.
            Without it the smallest ids count as the most common, which is how most tokenizers number them.
        seed: of the draw.

    Raises:
        ValueError: `population` is not at least 1, or `counts` is not [V] numbers with one above 0.
    """
    _check_length(num_virtual_tokens)
    if population < 1:
        raise ValueError(f"population must be at least 1, got {population}")
    size = vocab_size_of(model)
    if counts is None:
        candidates = torch.arange(min(population, size))
    else:
        counts = torch.as_tensor(counts)
        counted = counts.shape == (size,) and bool(((counts >= 0) & (counts < math.inf)).all())
        if not counted or not bool((counts > 0).any()):
            raise ValueError(
                f"counts must be [{size}] numbers of at least 0, some of them above, got shape "
                f"{list(counts.shape)} with the sum {float(counts.sum()):g}"
            )
        order = torch.argsort(counts, descending=True, stable=True)[:population]
        candidates = order[counts[order] > 0]
    generator, found = _generator(seed), len(candidates)
    if found < num_virtual_tokens:
        chosen = torch.randint(0, found, (num_virtual_tokens,), generator=generator)
    else:
        chosen = torch.randperm(found, generator=generator)[:num_virtual_tokens]
    return embed(model, candidates[chosen])


def count_tokens(model: Any, tokenizer: Any, texts: Iterable[str]) -> Tensor:
    """[V] int64: how often each token of the model occurs in the texts, special tokens left out.

    Raises:
        ValueError: a token is outside of the model's vocabulary.
    """
    counts = torch.zeros(vocab_size_of(model), dtype=torch.int64)
    for one in texts:
        ids = torch.tensor(tokenizer(one, add_special_tokens=False)["input_ids"], dtype=torch.int64)
        check_ids(model, ids)
        counts += torch.bincount(ids, minlength=len(counts))
    return counts


def uniform(
    model: Any,
    num_virtual_tokens: int,
    *,
    bound: float | None = 0.5,
    seed: int | None = None,
) -> Tensor:
    """Independent uniform numbers of [-bound, bound), by default the paper's 0.5.

    With `bound=None` it is sqrt(3) times the root mean square of the model's own vectors around their mean,
    so that both vary alike.

    Raises:
        ValueError: `bound` is not above 0.
    """
    if bound is None:
        bound = math.sqrt(3 * float(mean_and_std(model)[1].square().mean()))
    if not 0 < bound < math.inf:
        raise ValueError(f"bound must be a number above 0, got {bound}")
    shape = _check_length(num_virtual_tokens), width_of(model)
    return (2 * torch.rand(shape, generator=_generator(seed), dtype=torch.float32) - 1) * bound


def matched(model: Any, num_virtual_tokens: int, *, seed: int | None = None) -> Tensor:
    """Independent normal numbers with the mean and the standard deviation of the model's vectors, dimension
    by dimension: random, but where and as large as real tokens are.
    """
    mean, std = mean_and_std(model)
    return _normal(model, num_virtual_tokens, _generator(seed)) * std.float() + mean.float()


def from_tensor(model: Any, prompt: Tensor, *, num_virtual_tokens: int | None = None) -> Tensor:
    """A copy of `prompt`, [P, H] of any floating dtype.

    Raises:
        ValueError: another width than the model's tokens, another length than asked for, or values that are
            not finite.
    """
    checked = check_prompt(prompt, width=width_of(model), num_virtual_tokens=num_virtual_tokens)
    return checked.detach().to("cpu", torch.float32, copy=True)


def from_file(model: Any, path: str | Path, *, num_virtual_tokens: int | None = None) -> Tensor:
    """The prompt in a .npy file, [P, H] floating-point numbers.

    Raises:
        ValueError: as `from_tensor`; the file does not exist, cannot be read or holds pickled objects.
    """
    prompt = read_npy(path)
    return check_prompt(
        prompt, width=width_of(model), num_virtual_tokens=num_virtual_tokens, source=str(path)
    )


def from_adapter(
    model: Any,
    folder: str | Path,
    *,
    num_virtual_tokens: int | None = None,
    other_base: bool = False,
) -> Tensor:
    """The prompt of another adapter folder of PEFT: transfer from another task (SPoT, Vu et al. 2022).

    Args:
        model: the model.
        folder: what `save_pretrained` or `softprompt train` wrote.
        num_virtual_tokens: P, where it has to be a certain one.
        other_base: also take an adapter that names another base model, such as a variant of this one.

    Raises:
        ValueError: as `from_tensor`; not a readable prompt-tuning adapter, or one of another base model.
    """
    config, prompt = read_adapter(folder)
    source = f"the adapter in {folder}"
    check_prompt(prompt, width=width_of(model), num_virtual_tokens=num_virtual_tokens, source=source)
    if not other_base:
        check_base(base_of(model), config, source)
    return prompt


def _generator(seed: int | None) -> torch.Generator | None:
    return None if seed is None else torch.Generator().manual_seed(seed)


def _normal(model: Any, num_virtual_tokens: int, generator: torch.Generator | None) -> Tensor:
    prompt = torch.empty(_check_length(num_virtual_tokens), width_of(model), dtype=torch.float32)
    return prompt.normal_(generator=generator)


def _check_length(num_virtual_tokens: int) -> int:
    if not isinstance(num_virtual_tokens, int) or num_virtual_tokens < 1:
        raise ValueError(f"num_virtual_tokens must be at least 1, got {num_virtual_tokens!r}")
    return num_virtual_tokens


def _completed(
    model: Any,
    start: Tensor,
    num_virtual_tokens: int,
    rest: Tensor | None,
    seed: int | None,
) -> Tensor:
    """`start`, [n, H], and behind it the last P - n virtual tokens of `rest`."""
    if len(start) == num_virtual_tokens and rest is None:
        return start
    if rest is None:
        rest = common_tokens(model, num_virtual_tokens, seed=seed)
    check_prompt(rest, width=width_of(model), num_virtual_tokens=num_virtual_tokens, source="rest")
    return torch.cat([start, rest[len(start) :].to("cpu", torch.float32)])
