"""The loop that tries candidates against the reference forward."""

import pytest
import torch
from seq2seq_models import build as build_seq2seq
from tiny_models import build

from softprompt.engine import self_check
from softprompt.engine.self_check import GRADIENT, LOSS, first_that_holds

EXPECTED = {LOSS: torch.tensor(2.0), GRADIENT: torch.tensor([3.0, 4.0])}
BOUNDS = {LOSS: 1e-3, GRADIENT: 1e-2}


def results(loss=2.0, grad=(3.0, 4.0)):
    return {LOSS: torch.tensor(loss), GRADIENT: torch.tensor(grad)}


def fails():
    raise ValueError("no such mask\nsecond line")


def fails_without_a_word():
    raise RuntimeError


CANDIDATES = {
    "broken": fails,
    "silent": fails_without_a_word,
    "wrong": lambda: results(loss=3.0),
    "without a number": lambda: results(grad=(float("nan"), 4.0)),
    "right": lambda: results(loss=2.001),
    "never run": lambda: pytest.fail("a candidate behind the one that holds was run"),
}


def test_the_first_candidate_whose_results_are_the_references_is_taken():
    verdict = first_that_holds(CANDIDATES, lambda candidate: candidate(), EXPECTED, BOUNDS)
    assert verdict.chosen is CANDIDATES["right"]
    assert verdict.errors == pytest.approx({LOSS: 5e-4, GRADIENT: 0.0}, rel=1e-3)
    assert verdict.rejected == (
        "broken: ValueError: no such mask",
        "silent: RuntimeError: ",
        "wrong: loss off by 5.0e-01, prompt gradient by 0.0e+00",
        "without a number: loss off by 0.0e+00, prompt gradient by nan",
    )


def test_no_candidate_is_taken_where_none_holds():
    verdict = first_that_holds({"wrong": results(loss=3.0)}, lambda got: got, EXPECTED, BOUNDS)
    assert verdict.chosen is None
    assert verdict.errors == {}
    assert len(verdict.rejected) == 1


def test_a_reference_that_fails_or_is_not_finite_is_none():
    model = build("llama")
    batch = self_check.probe_batch(model)
    with pytest.raises(self_check.ReferenceFailedError, match="fails on soft prompts: "):
        self_check.reference_step(model, batch, labels=1.0)
    model.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(self_check.ReferenceFailedError, match="is not finite"):
        self_check.reference_step(model, batch)


def test_the_reference_of_a_decoder_is_its_own_loss_on_prompt_and_text():
    model = build("llama")
    batch = self_check.probe_batch(model)
    output, step = self_check.reference_step(model, batch)
    assert output.logits.shape == (2, 4 + 6, model.config.vocab_size)
    assert torch.equal(step[LOSS], output.loss.detach())
    assert step[GRADIENT].shape == batch.prompts[0].shape


def test_the_reference_of_an_encoder_decoder_scores_the_labels_as_they_are():
    model = build_seq2seq("t5")
    batch, inputs = self_check.encoder_decoder_probe(model)
    output, _ = self_check.reference_step(model, batch, labels=inputs.labels)
    assert output.logits.shape[:2] == inputs.labels.shape
