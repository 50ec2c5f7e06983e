"""Statements 16, 23 and 24 of the contract: PEFT's own methods, copies, and Hugging Face's Trainer."""

import contextlib
import copy
import functools
import io
import pickle

import pytest
import torch
from parity import assert_close, assert_same_step, make_batch, prompt_of
from peft import PeftModel, PeftModelForCausalLM, PeftType
from tiny_models import pair, prompted
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import _is_peft_model

import softprompt

BATCH = make_batch(side="left", labels="everywhere")
P, D = 4, 48


@functools.cache
def built():
    return prompted("llama", torch.float32)


def models():
    stock, fast = pair(built())
    return stock, softprompt.patch(fast, on_unsupported="error")


def test_23_prompts_are_given_out_as_in_peft():
    stock, fast = models()
    expected, got = stock.get_prompt(3), fast.get_prompt(3)
    assert torch.equal(got, expected)
    assert (got.shape, got.dtype, got.requires_grad) == ((3, P, D), torch.float32, True)
    assert torch.equal(fast.get_prompt_embedding_to_save("default"), prompt_of(stock))
    assert fast.active_peft_config.num_virtual_tokens == P


def printed(model):
    with contextlib.redirect_stdout(io.StringIO()) as text:
        model.print_trainable_parameters()
    return text.getvalue()


def test_23_parameters_are_counted_and_printed_as_in_peft():
    stock, fast = models()
    assert fast.get_nb_trainable_parameters() == stock.get_nb_trainable_parameters()
    assert fast.get_nb_trainable_parameters()[0] == P * D
    assert printed(fast) == printed(stock)
    assert repr(fast) == repr(stock)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
}


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
def test_23_copies_compute_the_same_and_are_their_own(duplicate):
    stock, fast = models()
    twin, theirs = duplicate(fast), duplicate(stock)
    assert softprompt.explain(twin).patched
    assert_same_step(twin, theirs, BATCH, 2e-6)
    with torch.no_grad():
        prompt_of(twin).zero_()
    assert_same_step(fast, stock, BATCH, 2e-6)


class Rows(Dataset):
    """The rows of one batch."""

    data = make_batch((7, 3, 5, 6), "left", "everywhere")

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return {name: value[index] for name, value in self.data.items()}


def trained(model, folder, resume=None, **options):
    """A Trainer after three steps, and its losses."""
    arguments = TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        learning_rate=3e-2,
        per_device_train_batch_size=2,
        max_steps=3,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        save_steps=1,
        load_best_model_at_end=True,
        seed=1,
        **options,
    )
    trainer = Trainer(model, arguments, train_dataset=Rows(), eval_dataset=Rows())
    trainer.train(resume_from_checkpoint=resume)
    kept = ("loss", "eval_loss")
    return trainer, [entry[key] for entry in trainer.state.log_history for key in kept if key in entry]


def test_24_the_trainer_trains_evaluates_saves_resumes_and_loads_the_best(tmp_path):
    results = []
    for model in models():
        folder = tmp_path / str(len(results))
        again = copy.deepcopy(model)
        trainer, losses = trained(model, folder)
        best = prompt_of(trainer.model).detach().clone()
        resumed, later = trained(again, folder, str(folder / "checkpoint-2"))
        results.append((losses, later, best, prompt_of(resumed.model).detach(), folder))
    (losses, later, best, end, folder), (*got, got_folder) = results
    assert len(losses) == 6
    assert got[0] == pytest.approx(losses, rel=1e-5)
    assert got[1] == pytest.approx(later, rel=1e-5)
    assert_close(got[2], best, 1e-4, "the best prompt")
    assert_close(got[3], end, 1e-4, "the prompt after resuming")
    names = [{path.relative_to(f).as_posix() for path in f.rglob("*")} for f in (folder, got_folder)]
    assert names[0] == names[1]
    assert "checkpoint-3/adapter_model.safetensors" in names[1]


def test_16_the_trainer_with_torch_compile_trains_as_peft_does(tmp_path):
    stock, fast = models()
    torch._dynamo.reset()
    _, expected = trained(stock, tmp_path / "stock")
    _, got = trained(fast, tmp_path / "fast", torch_compile=True, torch_compile_backend="aot_eager")
    assert got == pytest.approx(expected, rel=1e-5)
    assert not softprompt.explain(fast).fallbacks


def test_24_libraries_recognise_the_model():
    for model in models():
        assert isinstance(model, PeftModel)
        assert isinstance(model, PeftModelForCausalLM)
        assert _is_peft_model(model)
        config = model.peft_config["default"]
        assert config.is_prompt_learning
        assert config.peft_type == PeftType.PROMPT_TUNING
        assert type(model).__name__ == "PeftModelForCausalLM"
