"""Candidates scored in one packed row against one candidate behind one text at a time."""

import dataclasses
import warnings

import pytest
import torch
from parity import make_batch
from tiny_models import POSITIONS, VOCABULARY, build

import softprompt
from softprompt.engine import model_records, plan_for

CANDIDATES = [[5], [7, 9], [7, 9, 11, 2], [3, 2], [8, 8, 8, 8]]


def prompt_for(model, length=4, seed=1):
    generator = torch.Generator().manual_seed(seed)
    shape = (length, model.get_input_embeddings().embedding_dim)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def alone(model, prompt, text, candidate, pads=0):
    """Log p(candidate) from the model's own forward over one row, behind `pads` pads."""
    embedding = model.get_input_embeddings()
    row = embedding(torch.tensor([[0] * pads + text + candidate]))[0]
    mask = torch.ones(1, len(prompt) + len(row))
    mask[0, len(prompt) : len(prompt) + pads] = 0
    logits = model(inputs_embeds=torch.cat([prompt, row])[None], attention_mask=mask, use_cache=False).logits[
        0
    ]
    first = len(prompt) + pads + len(text) - 1
    logs = logits.double().log_softmax(1)
    return sum(logs[first + place, token] for place, token in enumerate(candidate))


def one_at_a_time(model, prompts, batch, padded=False):
    rows = []
    width = batch["input_ids"].shape[1]
    for prompt, ids, mask in zip(prompts, batch["input_ids"], batch["attention_mask"], strict=True):
        text = ids[mask.bool()].tolist()
        pads = width - len(text) if padded else 0
        rows.append(torch.stack([alone(model, prompt, text, c, pads) for c in CANDIDATES]))
    return torch.stack(rows)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    "name", ["bloom", "llama", "gpt2", "opt", "mistral-window", "gemma2", "falcon", "gptj", "mpt"]
)
def test_all_candidates_at_once_equal_one_at_a_time(name, side):
    model = build(name)
    prompt, batch = prompt_for(model), make_batch((7, 3, 5), side, None)
    got = softprompt.score(model, prompt, CANDIDATES, **batch, positions="compact")
    torch.testing.assert_close(got, one_at_a_time(model, [prompt] * 3, batch), rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ["bloom", "llama", "gpt2", "mistral-window"])
def test_padded_positions_equal_the_left_padded_row(name):
    model = build(name)
    prompt, batch = prompt_for(model), make_batch((7, 3, 5), "left", None)
    got = softprompt.score(model, prompt, CANDIDATES, **batch)
    torch.testing.assert_close(got, one_at_a_time(model, [prompt] * 3, batch, padded=True), rtol=0, atol=1e-5)


@torch.no_grad()
def test_the_dense_mask_of_a_model_knows_branches():
    model = build("llama")
    plan = plan_for(model)
    prompt, batch = prompt_for(model), make_batch((7, 3), "left", None)
    expected = softprompt.score(model, prompt, CANDIDATES, **batch)
    for seam in ("mask", "dense"):
        changed = dataclasses.replace(plan, seam=seam)
        model_records.put(model, "plan", model_records.last(model, "plan")[0], changed)
        torch.testing.assert_close(softprompt.score(model, prompt, CANDIDATES, **batch), expected)


@torch.no_grad()
def test_rows_see_their_own_prompt():
    model = build("llama")
    prompts, batch = [prompt_for(model, 4, 1), prompt_for(model, 2, 2)], make_batch((7, 3, 5), "right", None)
    got = softprompt.score(model, prompts, CANDIDATES, **batch, prompt_of_row=[1, 0, 1], positions="compact")
    expected = one_at_a_time(model, [prompts[1], prompts[0], prompts[1]], batch)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_an_empty_text_is_followed_by_its_candidates():
    model = build("gpt2")
    prompt, batch = prompt_for(model), make_batch((3, 0), "left", None)
    got = softprompt.score(model, prompt, CANDIDATES, **batch, positions="compact")
    torch.testing.assert_close(got, one_at_a_time(model, [prompt] * 2, batch), rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ["lfm2", "jamba"])
def test_a_model_that_cannot_be_packed_is_run_one_candidate_at_a_time(name):
    model = build(name)
    prompt, batch = prompt_for(model), make_batch((7, 3, 5), "left", None)
    with pytest.warns(UserWarning, match="candidates are scored one at a time: .*state"):
        got = softprompt.score(model, prompt, CANDIDATES, **batch)
    torch.testing.assert_close(got, one_at_a_time(model, [prompt] * 3, batch), rtol=0, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("positions", ["padded", "compact"])
def test_a_long_row_does_not_change_the_rotary_embedding_of_the_others(positions):
    factors = {"factor": 4.0, "short_factor": [1.0] * 6, "long_factor": [3.0] * 6}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 13, **factors}
    model = build("llama", rope_parameters=rope)
    prompt, batch = prompt_for(model), make_batch((9, 3, 5), "left", None)
    with pytest.warns(UserWarning, match="one at a time: the model's rotary embedding changes beyond 13"):
        got = softprompt.score(model, prompt, CANDIDATES, **batch, positions=positions)
    torch.testing.assert_close(got, one_at_a_time(model, [prompt] * 3, batch), rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:softprompt")
def test_one_candidate_at_a_time_takes_no_more_positions_than_all_at_once():
    model = build("gpt_neo")
    attention = model.transformer.h[1].attn.attention
    attention.forward = type(attention).forward.__get__(attention)
    assert plan_for(model).route == "padded"
    prompt, batch = prompt_for(model), make_batch((POSITIONS - 6, 3), "left", None, width=POSITIONS - 6)
    expected = softprompt.score(build("gpt_neo"), prompt, [[3, 4, 5]], **batch, positions="compact")
    got = softprompt.score(model, prompt, [[3, 4, 5]], **batch)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_texts_are_computed_once(monkeypatch):
    model = build("llama")
    seen = []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    plan_for(model)
    seen.clear()
    softprompt.score(model, prompt_for(model), CANDIDATES, **make_batch((7, 3, 5), "left", None))
    assert seen == [4 + (7 + 3 + 5) + 3 * sum(len(candidate) - 1 for candidate in CANDIDATES)]


def test_scores_have_the_gradient_of_one_at_a_time():
    model = build("llama")
    prompt, batch = prompt_for(model).requires_grad_(), make_batch((5, 3), "right", None)
    (got,) = torch.autograd.grad(
        softprompt.score(model, prompt, CANDIDATES, **batch, positions="compact").sum(), prompt
    )
    (expected,) = torch.autograd.grad(one_at_a_time(model, [prompt] * 2, batch).sum(), prompt)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_a_candidate_is_never_likelier_than_its_own_beginning():
    model = build("bloom")
    batch = make_batch((5, 3), "left", None)
    scores = softprompt.score(model, prompt_for(model), [[7], [7, 9], [7, 2]], **batch)
    assert (scores[:, 1] < scores[:, 0]).all()
    # Both of these are ended: either can be the likelier one, and both are parts of their beginning.
    assert (scores[:, 1:].exp().sum(1) < scores[:, 0].exp()).all()


@pytest.mark.parametrize(
    "candidates, error, message",
    [
        ([], ValueError, "expected at least one candidate, got none"),
        ([[3], []], ValueError, "candidate 1 has no tokens, expected at least one"),
        ([3, 4], ValueError, r"candidates must be lists of token ids, got \[3, 4\]"),
        ([[3.7]], ValueError, r"candidates must be lists of token ids, got \[\[3.7\]\]"),
        (["no"], ValueError, r"candidates must be lists of token ids, got \['no'\]"),
        ([[3], [4, VOCABULARY]], IndexError, rf"candidates\[1\]\[1\] = {VOCABULARY} is outside"),
    ],
)
def test_bad_candidates_are_refused(candidates, error, message):
    model = build("bloom")
    with pytest.raises(error, match=message):
        softprompt.score(model, prompt_for(model), candidates, **make_batch((5, 3), "left", None))


@pytest.mark.parametrize("positions", ["padded", "compact"])
def test_texts_longer_than_the_model_are_refused(positions):
    model = build("gpt2")
    batch = make_batch((POSITIONS - 6, 3), "left", None, width=POSITIONS - 6)
    with torch.no_grad():
        softprompt.score(model, prompt_for(model), [[3, 4, 5]], **batch, positions=positions)
        with pytest.raises(ValueError, match=rf"prompt \(4 tokens\), text \({POSITIONS - 6}\) and candidate"):
            softprompt.score(model, prompt_for(model), [[3, 4, 5, 6]], **batch, positions=positions)


def test_nothing_is_said_on_the_fast_route():
    model = build("bloom")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        softprompt.score(model, prompt_for(model), CANDIDATES, **make_batch((5, 3), "left", None))
