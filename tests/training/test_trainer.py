"""Hugging Face's Trainer does with a patched model what it does with PEFT's."""

import json

import pytest
import torch
from parity import assert_close, prompt_of
from tiny_models import pair, prompted
from trainer_runs import train

import softprompt


@pytest.mark.parametrize(
    "name, options",
    [
        ("llama", {}),
        ("bloom", {}),
        ("gpt2", {}),
        ("llama", {"gradient_accumulation_steps": 2}),
        ("bloom", {"gradient_checkpointing": True}),
        ("llama", {"bf16": True}),
        ("llama", {"neftune_noise_alpha": 5.0}),
        ("opt", {"remove_unused_columns": False, "max_grad_norm": 0.1}),
    ],
    ids=str,
)
def test_three_steps_give_the_losses_of_peft(name, options, tmp_path):
    stock, fast = pair(prompted(name, torch.float32))
    softprompt.patch(fast, on_unsupported="error")
    _, expected = train(stock, tmp_path, **options)
    trainer, got = train(fast, tmp_path, **options)
    assert len(got) == 3
    assert got == pytest.approx(expected, rel=2e-2 if "bf16" in options else 1e-4)
    if "bf16" not in options:
        assert_close(prompt_of(fast), prompt_of(stock), 1e-3, "prompt")
    assert trainer.evaluate()["eval_loss"] > 0


def test_checkpoints_resume_and_the_best_model_is_loaded(tmp_path):
    losses, prompts = [], []
    start = prompted("llama", torch.float32)
    for kind in ("stock", "fast"):
        model, again = pair(start)
        if kind == "fast":
            for one in (model, again):
                softprompt.patch(one, on_unsupported="error")
        options = {
            "save_strategy": "steps",
            "save_steps": 1,
            "eval_strategy": "steps",
            "eval_steps": 1,
            "load_best_model_at_end": True,
        }
        folder = tmp_path / kind
        trainer, whole = train(model, folder, **options)
        prompts.append(prompt_of(trainer.model).detach().clone())
        config = json.loads((folder / "checkpoint-2" / "adapter_config.json").read_text())
        assert config["peft_type"] == "PROMPT_TUNING"
        _, resumed = train(again, folder, resume=str(folder / "checkpoint-2"))
        assert resumed == whole
        losses.append(whole)
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert_close(prompts[1], prompts[0], 1e-3, "the best prompt")


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2}, {"bf16": True}], ids=str)
def test_the_trainer_replays_recorded_steps_without_noticing(options, tape, tmp_path):
    stock, fast = pair(prompted("llama", torch.float32))
    softprompt.patch(fast, on_unsupported="error")
    options = {"max_steps": 6, "num_train_epochs": 3} | options
    _, expected = train(stock, tmp_path, **options)
    _, got = train(fast, tmp_path, **options)
    assert got == pytest.approx(expected, rel=2e-2 if "bf16" in options else 1e-4)
    count = fast._softprompt.runner.graphs.statistics
    assert count.replayed >= 4
    assert count.eager <= 2
