"""Trainer and accelerate with data parallel, behind `accelerate launch`."""

import copy
import os
import tempfile
from pathlib import Path

import distributed_page as page
import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.state import AcceleratorState, GradientState
from batches_of_ranks import mean_over_ranks, three
from parity import assert_close, prompt_of
from runs_of_ranks import all_rows, by_hand, loop, losses_of, train
from safetensors.torch import load_file
from torch.nn.parallel import DistributedDataParallel

import softprompt

FOLDER = Path(os.environ.get("SOFTPROMPT_TEST_FOLDER", tempfile.gettempdir()))


def check_trainer_equals_one_process(rank):
    """Also where a rank has no labels in a step, and the ranks have different numbers of them."""
    rows = all_rows()
    alone, stock, fast = three()
    expected = by_hand(alone, rows)
    for name, model in {"PEFT": stock, "softprompt": fast}.items():
        trainer = train(model, FOLDER, rows)
        assert isinstance(trainer.model_wrapped, DistributedDataParallel)
        assert_close(losses_of(trainer), expected, 2e-4, f"losses of {name}")  # logged with four digits
        assert_close(prompt_of(model), prompt_of(alone), 2e-5, f"prompt of {name}")
    assert softprompt.explain(fast).fallbacks == ()


def check_trainer_accumulates_and_saves_what_one_process_has(rank):
    rows = all_rows()
    alone, _, fast = three()
    by_hand(alone, rows, rows_of_a_step=8)
    trainer = train(
        fast, FOLDER / "saved", rows, gradient_accumulation_steps=2, save_strategy="steps", save_steps=2
    )
    assert_close(prompt_of(fast), prompt_of(alone), 2e-5, "prompt")
    trainer.accelerator.wait_for_everyone()
    saved = load_file(FOLDER / "saved" / "checkpoint-2" / "adapter_model.safetensors")["prompt_embeddings"]
    assert torch.equal(saved, prompt_of(fast))


def check_trainer_evaluates_five_rows_on_two_ranks(rank):
    rows = all_rows("answer")
    rows["labels"][2:4] = rows["input_ids"][2:4]  # no labels in a batch: PEFT's loss is no number
    _, stock, fast = three()
    found = [train(model, FOLDER, rows, steps=1).evaluate()["eval_loss"] for model in (stock, fast)]
    assert abs(found[1] / found[0] - 1) < 1e-6
    assert softprompt.explain(fast).fallbacks == ()


def _accelerator(**options):
    AcceleratorState._reset_state(reset_partial_state=False)
    GradientState._reset_state()
    return Accelerator(cpu=True, **options)


def check_the_loop_of_accelerate_equals_one_process(rank):
    rows = all_rows("answer")
    rows["labels"][2:4] = rows["input_ids"][2:4]
    rows["labels"][:, :-2] = -100  # as many labels in every row: a mean of means
    for configuration in ({}, {"dispatch_batches": True}):
        alone, _, fast = three()
        by_hand(alone, rows)
        loop(_accelerator(dataloader_config=DataLoaderConfiguration(**configuration)), fast, rows)
        assert_close(prompt_of(fast), prompt_of(alone), 2e-5, f"prompt with {configuration}")


def check_uneven_last_batches_end_as_with_peft(rank):
    rows = all_rows("answer")
    rows["labels"][2:4] = rows["input_ids"][2:4]
    for configuration in ({"even_batches": True}, {"dispatch_batches": True}):
        _, stock, fast = three()
        for model in (stock, fast):
            loop(
                _accelerator(dataloader_config=DataLoaderConfiguration(**configuration)), model, rows, count=5
            )
        assert_close(prompt_of(fast), prompt_of(stock), 2e-5, f"prompt with {configuration}")


def check_a_prepared_model_may_be_patched(rank):
    """Without mixed precision accelerate leaves the forward alone."""
    rows = all_rows("answer")
    rows["labels"][2:4] = rows["input_ids"][2:4]
    alone, stock, _ = three()
    again = copy.deepcopy(stock)
    parallel = _accelerator().prepare(stock)
    softprompt.patch(parallel.module, on_unsupported="error")
    batch = {name: value[:2] for name, value in rows.items()}
    parallel(**batch).loss.backward()
    alone(**batch).loss.backward()
    assert_close(prompt_of(stock).grad, prompt_of(alone).grad, 2e-6, "gradient")
    half = _accelerator(mixed_precision="bf16").prepare(softprompt.patch(again, on_unsupported="error"))
    half(**batch).loss.backward()
    assert_close(prompt_of(again).grad, prompt_of(alone).grad, 5e-2, "gradient in bf16")


def check_the_script_of_the_page_trains_one_prompt_on_all_ranks(rank):
    _accelerator()
    model = page.run("python", FOLDER)["model"]
    prompt = prompt_of(model).detach()
    assert torch.equal(mean_over_ranks(prompt), prompt)
    assert softprompt.explain(model).fallbacks == ()
    torch.distributed.barrier()
    saved = load_file(FOLDER / "trained" / "adapter" / "adapter_model.safetensors")["prompt_embeddings"]
    assert torch.equal(saved, prompt)
