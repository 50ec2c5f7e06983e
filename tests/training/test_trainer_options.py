"""The options of transformers' Trainer, on a patched model as on PEFT's."""

import numpy as np
import pytest
import torch
from parity import assert_close, make_batch, prompt_of, real_columns
from tiny_models import pair, prompted
from torch.nn import functional
from trainer_runs import DATA, train, trainer_of

import softprompt

PROMPT = 4
TEXTS = [
    {name: value[0].tolist() for name, value in make_batch((n,), "left", "answer", width=n, seed=n).items()}
    for n in (3, 9, 4, 8, 5, 7)
]


@pytest.fixture(scope="module")
def start():
    return prompted("llama", torch.float32, num_virtual_tokens=PROMPT)


def models(start, **options):
    stock, fast = pair(start)
    return stock, softprompt.patch(fast, on_unsupported="error", **options)


def left_padded(rows):
    """The rows as a batch; the collator of the Trainer's own data sets."""
    width = max(len(row["input_ids"]) for row in rows)
    fill = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    return {
        name: torch.tensor([[value] * (width - len(row[name])) + list(row[name]) for row in rows])
        for name, value in fill.items()
    }


def smoothed(outputs, labels, num_items_in_batch=None):
    """The smoothed loss of PEFT's logits, written out."""
    logits, targets = outputs.logits[:, PROMPT - 1 : -1].flatten(0, 1), labels.flatten()
    total = functional.cross_entropy(logits, targets, label_smoothing=0.1, reduction="sum")
    return total / (num_items_in_batch or (labels != -100).sum())


# name -> (options of the Trainer, bound)
OPTIONS = {
    "grouped by length": (
        {"data": TEXTS, "extra": {"data_collator": left_padded}}
        | {"train_sampling_strategy": "group_by_length"},
        1e-5,
    ),
    "accumulated, the last one alone": (
        {"data": TEXTS[:5], "extra": {"data_collator": left_padded}, "gradient_accumulation_steps": 2}
        | {"average_tokens_across_devices": True, "max_steps": 2},
        1e-5,
    ),
    "without the last rows": (
        {"data": TEXTS[:5], "extra": {"data_collator": left_padded}, "dataloader_drop_last": True},
        1e-5,
    ),
    "compiled": ({"torch_compile": True, "torch_compile_backend": "eager"}, 1e-5),
    "bf16, checkpointed": ({"bf16": True, "gradient_checkpointing": True}, 2e-2),
    "a loss of one's own": ({"extra": {"compute_loss_func": smoothed}}, 1e-5),
    "adafactor, clipped": ({"optim": "adafactor", "max_grad_norm": 0.05, "weight_decay": 0.1}, 1e-5),
}


@pytest.mark.parametrize("options, bound", OPTIONS.values(), ids=OPTIONS)
def test_the_steps_are_those_of_peft(start, options, bound, tmp_path):
    stock, fast = models(start)
    _, expected = train(stock, tmp_path, **options)
    _, got = train(fast, tmp_path, **options)
    assert len(got) == options.get("max_steps", 3)
    assert got == pytest.approx(expected, rel=bound)
    assert_close(prompt_of(fast), prompt_of(stock), 10 * bound, "prompt")


# ---------------------------------------------------------------------------------------------- evaluation
def accuracies(prediction):
    """What a user of PEFT writes: the logits begin with the columns of the prompt."""
    predicted = prediction.predictions
    predicted = predicted.argmax(-1) if predicted.ndim == 3 else predicted
    predicted, labels = predicted[:, PROMPT:-1], prediction.label_ids[:, 1:]
    found = {"accuracy": float((predicted == labels)[labels != -100].mean())}
    if prediction.inputs is not None:
        found["inputs"] = int(prediction.inputs.sum())
        found["losses"] = float(np.mean(prediction.losses))
    return found


# name -> (options of the Trainer, its other arguments)
EVALUATIONS = {
    "plain": ({}, {}),
    "argmax before it is kept": ({}, {"preprocess_logits_for_metrics": lambda out, _: out.argmax(-1)}),
    "inputs and losses": ({"include_for_metrics": ["inputs", "loss"]}, {}),
    "moved to the host in parts": ({"eval_accumulation_steps": 1, "per_device_eval_batch_size": 2}, {}),
    "bf16 for the whole evaluation": ({"bf16_full_eval": True}, {}),
}


@pytest.mark.parametrize("options, extra", EVALUATIONS.values(), ids=EVALUATIONS)
def test_metrics_are_those_of_peft(start, options, extra, tmp_path):
    extra = {"compute_metrics": accuracies, **extra}
    expected, got = (
        trainer_of(model, tmp_path, extra=extra, **options).evaluate() for model in models(start)
    )
    assert got.keys() == expected.keys()
    names = [name for name in expected if not any(p in name for p in ("runtime", "second", "preparation"))]
    assert "eval_accuracy" in names
    bound = 2e-2 if options.get("bf16_full_eval") else 1e-5
    assert {n: got[n] for n in names} == pytest.approx({n: expected[n] for n in names}, rel=bound)


@pytest.mark.parametrize(
    "logits, columns", [("text", slice(None, -1)), ("labels", slice(1, None))], ids=["text", "labels"]
)
def test_metrics_of_logits_that_fit_the_labels_are_those_of_peft(start, logits, columns, tmp_path):
    def fitting(prediction):
        predicted, labels = prediction.predictions.argmax(-1)[:, columns], prediction.label_ids[:, 1:]
        return {"accuracy": float((predicted == labels)[labels != -100].mean())}

    stock, fast = models(start, logits=logits)
    expected = trainer_of(stock, tmp_path, extra={"compute_metrics": accuracies}).evaluate()
    got = trainer_of(fast, tmp_path, extra={"compute_metrics": fitting}).evaluate()
    for name in ("eval_loss", "eval_accuracy"):
        assert got[name] == pytest.approx(expected[name], rel=1e-5)


def test_predictions_are_those_of_peft(start, tmp_path):
    stock, fast = models(start)
    trainers = [trainer_of(model, tmp_path) for model in (stock, fast)]
    expected, got = (trainer.predict(trainer.eval_dataset) for trainer in trainers)
    real = real_columns(DATA, PROMPT).numpy()
    assert got.predictions.shape == expected.predictions.shape
    np.testing.assert_allclose(got.predictions[real], expected.predictions[real], rtol=1e-4, atol=1e-4)
    assert (got.label_ids == expected.label_ids).all()


def test_a_loss_alone_computes_no_logits(start, tmp_path, monkeypatch):
    from softprompt.engine.lazy_logits import LazyLogits

    _, fast = models(start)
    monkeypatch.setattr(LazyLogits, "materialize", lambda self: pytest.fail("logits were computed"))
    trainer = trainer_of(fast, tmp_path, prediction_loss_only=True)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0


@pytest.mark.parametrize("patched", [False, True])
def test_the_trainer_finds_no_embeddings_for_noise_where_the_decoder_is_not_called_model(patched, tmp_path):
    model = prompted("bloom", torch.float32)
    if patched:
        softprompt.patch(model)
    with pytest.raises(AttributeError, match="object has no attribute 'model'"):
        train(model, tmp_path, neftune_noise_alpha=5.0)


# ------------------------------------------------------------------------------------------ label smoothing
@pytest.mark.parametrize("accumulated", [1, 2])
def test_label_smoothing_needs_logits_that_fit_the_labels(start, accumulated, tmp_path):
    options = {"gradient_accumulation_steps": accumulated}
    stock, fast = models(start, logits="labels")
    fast.get_base_model().config.use_cache = False  # the Trainer takes the labels away
    reference, expected = train(stock, tmp_path, extra={"compute_loss_func": smoothed}, **options)
    trainer, got = train(fast, tmp_path, label_smoothing_factor=0.1, **options)
    assert got == pytest.approx(expected, rel=1e-5)
    assert_close(prompt_of(fast), prompt_of(stock), 1e-4, "prompt")
    measured = [each.evaluate()["eval_loss"] for each in (reference, trainer)]
    assert measured[1] == pytest.approx(measured[0], rel=1e-5)


@pytest.mark.parametrize("patched", [False, True])
def test_label_smoothing_of_logits_with_the_columns_of_the_prompt_fails_as_with_peft(
    start, patched, tmp_path
):
    model = models(start)[patched]
    with pytest.raises(RuntimeError, match=r"must match|Size does not match"):
        train(model, tmp_path, label_smoothing_factor=0.1)
