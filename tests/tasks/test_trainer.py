import pytest
import torch
from peft import PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

import softprompt
from softprompt.tasks.classification import Encoder, TextTask
from softprompt.tasks.table import Table
from softprompt.tasks.trainer import PromptTrainer
from softprompt.tiny import model_path

TEXTS = ["the app crashed", "lovely weather", "where is it", "thanks", "broken", "hi"]
LABELS = ["complaint", "no complaint at all"] * 3  # of different lengths


@pytest.fixture
def train(tmp_path):
    """Train without a step of evaluation; returns what was logged and the prompts."""
    task = TextTask(
        "Tweet text",
        "Label",
        tuple(sorted(set(LABELS))),
        padding="longest",
        end_token="eos",
        positions="compact",
    )
    table = Table("made", "Tweet text", "Label", TEXTS, LABELS, frame=None)

    def call(model, accumulated):
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=4,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=accumulated,
            learning_rate=0.05,
            logging_steps=2,
            max_grad_norm=0.0,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            remove_unused_columns=False,
            label_names=["labels"],
        )
        made = PromptTrainer(
            model=softprompt.patch(model, positions="compact"),
            args=arguments,
            encoder=Encoder(task, AutoTokenizer.from_pretrained(model_path())),
            train_table=table,
            eval_table=None,
            record={"model": "made", "training": {}},
            callbacks=[],
            evaluated=lambda rows, total: None,
        )
        made.train()
        logs = [entry for entry in made.state.log_history if "loss" in entry]
        return logs, [prompt.detach() for prompt in made.prompts().values()]

    return call


@pytest.mark.parametrize("accumulated", [1, 4])
def test_prompts_are_trained_as_alone_however_many_batches_make_a_step(train, accumulated):
    def base():
        return AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32)

    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    together, prompts = train(softprompt.ensemble.create(base(), [config, config], seeds=[3, 4]), accumulated)
    for number, seed in enumerate([3, 4]):
        torch.manual_seed(seed)
        alone, (prompt,) = train(get_peft_model(base(), config), accumulated)
        torch.testing.assert_close(prompts[number], prompt, rtol=1e-4, atol=1e-5)
        losses = [entry["prompt_losses"][number] for entry in together]
        assert losses == pytest.approx([entry["loss"] for entry in alone], abs=1e-4)
    means = [sum(entry["prompt_losses"]) / 2 for entry in together]
    assert [entry["loss"] for entry in together] == pytest.approx(means, abs=1e-4)
