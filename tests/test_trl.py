"""TRL's SFTTrainer trains a patched model as it trains PEFT's, and gets logits that fit its labels."""

import warnings

import pytest
import torch
from parity import prompt_of, relative_error
from peft import PromptTuningConfig, get_peft_model
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.trainer_pt_utils import LabelSmoother

import softprompt
from softprompt.tiny import model_path

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
TEXTS = ("the app crashed again", "lovely weather today", "my phone is broken", "thanks for the help")


def trained(path, *, patch=None, compute_metrics=None, **options):
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(model_path(), dtype="float32")
    model = get_peft_model(base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=8))
    if patch is not None:
        softprompt.patch(model, **patch)
    rows = datasets.Dataset.from_list([{"text": text} for text in TEXTS * 3])
    arguments = trl.SFTConfig(
        output_dir=str(path),
        use_cpu=True,
        bf16=False,
        report_to=[],
        disable_tqdm=True,
        max_steps=3,
        logging_steps=1,
        save_strategy="no",
        learning_rate=0.05,
        per_device_train_batch_size=4,
        gradient_checkpointing=False,
        max_length=16,
        **options,
    )
    trainer = trl.SFTTrainer(
        model,
        arguments,
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(model_path()),
        compute_metrics=compute_metrics,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train()
    return trainer, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("logits", ["full", "text"])
def test_three_steps_give_the_losses_of_peft(logits, tmp_path):
    stock, expected = trained(tmp_path)
    fast, got = trained(tmp_path, patch={"logits": logits})
    assert len(got) == 3
    assert got == pytest.approx(expected, rel=1e-4)
    assert relative_error(prompt_of(fast.model).detach(), prompt_of(stock.model).detach()) < 1e-3


def test_label_smoothing_is_that_of_the_tokens_behind_the_first(tmp_path, monkeypatch):
    losses = []

    def smoothed(self, outputs, labels, shift_labels=False, **kwargs):
        with torch.no_grad():
            logits, targets = outputs["logits"][:, :-1], labels[:, 1:]
            losses.append(
                functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), label_smoothing=0.1)
            )
        return original(self, outputs, labels, shift_labels=shift_labels, **kwargs)

    original = LabelSmoother.__call__
    monkeypatch.setattr(LabelSmoother, "__call__", smoothed)
    _, got = trained(tmp_path, patch={"logits": "text"}, label_smoothing_factor=0.1)
    assert len(got) == 3
    assert got == pytest.approx([float(loss) for loss in losses], rel=1e-4)


def test_compute_metrics_gets_predictions_that_fit_the_labels(tmp_path):
    seen = []

    def accuracy(prediction):
        predicted, labels = prediction.predictions.argmax(-1)[:, :-1], prediction.label_ids[:, 1:]
        seen.append((prediction.predictions.shape, prediction.label_ids.shape))
        return {"accuracy": float((predicted == labels)[labels != -100].mean())}

    trainer, _ = trained(tmp_path, patch={"logits": "text"}, compute_metrics=accuracy)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert 0 <= trainer.evaluate()["eval_accuracy"] <= 1
    assert seen[0][0][:2] == seen[0][1]
