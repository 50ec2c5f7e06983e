"""TRL's SFTTrainer trains a patched model as it trains PEFT's, and gets logits that fit its labels."""

import warnings

import pytest
import torch
from parity import prompt_of, relative_error
from peft import PromptTuningConfig, get_peft_model
from tiny_models import prompted
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.trainer_pt_utils import LabelSmoother

import softprompt
from softprompt import eligibility
from softprompt.engine import plan_for, sharding
from softprompt.engine.trl_head import ASKED
from softprompt.tiny import model_path

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
TEXTS = ("the app crashed again", "lovely weather today", "my phone is broken", "thanks for the help")


DIALOGUES = [
    {
        "messages": [
            {"role": "user", "content": text},
            {"role": "assistant", "content": "no complaint" if number % 2 else "complaint"},
        ]
    }
    for number, text in enumerate(TEXTS)
]
ANSWERS = [
    {"prompt": f"{text} :", "completion": " no" if n % 2 else " yes it is"} for n, text in enumerate(TEXTS)
]
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}</s>"
    "{% endgeneration %}{% else %}{{ m['content'] }} : {% endif %}{% endfor %}"
)


def trained(path, *, patch=None, late=False, rows=None, compute_metrics=None, **options):
    """The trainer after three steps, and their losses.

    Args:
        path: for its output.
        patch: options of the patch; None: PEFT's model.
        late: patch the model when the trainer has it.
        rows: of the data set.
        compute_metrics: for the trainer.
        options: of the SFTConfig.
    """
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(model_path(), dtype="float32")
    model = get_peft_model(base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=8))
    if patch is not None and not late:
        softprompt.patch(model, **patch)
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    tokenizer.chat_template = TEMPLATE
    data = datasets.Dataset.from_list((rows or [{"text": text} for text in TEXTS]) * 3)
    defaults = {
        "bf16": False,
        "max_steps": 3,
        "logging_steps": 1,
        "save_strategy": "no",
        "learning_rate": 0.05,
        "per_device_train_batch_size": 4,
        "gradient_checkpointing": False,
        "max_length": 16,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = trl.SFTTrainer(
            model,
            trl.SFTConfig(
                output_dir=str(path),
                use_cpu=True,
                report_to=[],
                disable_tqdm=True,
                **(defaults | options),
            ),
            train_dataset=data,
            eval_dataset=data,
            processing_class=tokenizer,
            compute_metrics=compute_metrics,
        )
        if late:
            softprompt.patch(model, **patch)
        trainer.train()
    return trainer, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def assert_same_training(path, patch, *, late=False, bound=1e-4, **options):
    """The steps of PEFT: losses, what TRL measures, and the prompt at the end; none is left to PEFT."""
    stock, expected = trained(path, **options)
    fast, got = trained(path, patch={"on_unsupported": "error", **patch}, late=late, **options)
    assert len(got) == 3
    assert got == pytest.approx(expected, rel=bound)
    for name in ("mean_token_accuracy", "entropy", "num_tokens"):
        measured = [[e[name] for e in t.state.log_history if name in e] for t in (stock, fast)]
        assert len(measured[0]) == 3
        assert measured[1] == pytest.approx(measured[0], rel=max(bound, 1e-3)), name
    assert relative_error(prompt_of(fast.model).detach(), prompt_of(stock.model).detach()) < 10 * bound
    return fast


# name -> (options of the patch, of the SFTConfig)
SETTINGS = {
    "text": ({}, {}),
    "accumulated": ({"logits": "text"}, {"gradient_accumulation_steps": 2}),
    "completion only": ({}, {"rows": ANSWERS, "completion_only_loss": True}),
    "assistant only": ({}, {"rows": DIALOGUES, "assistant_only_loss": True}),
    "wrapped": ({}, {"packing": True, "packing_strategy": "wrapped"}),
    "dft, checkpointed": ({}, {"loss_type": "dft", "gradient_checkpointing": True}),
}


@pytest.mark.parametrize("patch, options", SETTINGS.values(), ids=SETTINGS)
def test_three_steps_give_the_losses_of_peft(patch, options, tmp_path):
    assert_same_training(tmp_path, patch, **options)


def test_three_steps_under_autocast_give_the_losses_of_peft(tmp_path):
    assert_same_training(tmp_path, {}, bf16=True, bound=2e-2)


def test_a_model_may_be_patched_when_the_trainer_has_it(tmp_path):
    trainer = assert_same_training(tmp_path, {}, late=True)
    report = softprompt.explain(trainer.model)
    assert report.route == "packed"
    assert not report.fallbacks


@pytest.mark.parametrize(
    "options",
    [{"packing": True}, {"padding_free": True, "max_length": None}],
    ids=["packing", "padding_free"],
)
def test_several_texts_in_one_row_are_refused(options, tmp_path):
    with pytest.raises(ValueError, match=r"hold several texts \(cu_seq_lens_q.*packing=False"):
        trained(tmp_path, patch={}, **options)


def test_a_collator_that_joins_texts_is_refused_by_its_positions():
    base = AutoModelForCausalLM.from_pretrained(model_path(), dtype="float32")
    model = softprompt.patch(
        get_peft_model(base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=8))
    )
    ids = torch.arange(3, 10)[None]
    with pytest.raises(ValueError, match="position_ids that begin again"):
        model(input_ids=ids, labels=ids, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2, 3]]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT says that it ignores them
        assert model(input_ids=ids, labels=ids, position_ids=torch.arange(7)[None]).loss > 0


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
    assert not softprompt.explain(trainer.model).fallbacks
    assert seen[0][0][:2] == seen[0][1]


def test_a_fused_head_that_fully_shard_has_sharded_is_left_to_peft(monkeypatch):
    model = softprompt.patch(prompted("llama"))
    monkeypatch.setattr(sharding, "by_fsdp", lambda base: True)
    ids = torch.zeros(2, 3, dtype=torch.long)
    arguments = {"input_ids": ids, "labels": ids, ASKED: True}
    reason = eligibility.reason_for_peft(model, plan_for(model.get_base_model()), ["default"], arguments)
    assert "TRL's fused head reads a weight that fully_shard gathers" in reason
