"""DistributedDataParallel around a patched model: what one process makes of the joined batch with PEFT."""

import copy

import pytest
import torch
from batches_of_ranks import (
    WORLD_SIZE,
    assert_same_training,
    batches,
    half,
    joined_batch,
    mean_over_ranks,
    optimizer_of,
    three,
    train,
    wrapped,
)
from parity import assert_close, prompt_of
from peft import PromptTuningConfig
from tiny_models import prompted

import softprompt


def check_three_steps_equal_one_process(rank):
    alone, stock, fast = three()
    assert_same_training(wrapped(stock), stock, copy.deepcopy(alone), rank, steps=batches())
    assert_same_training(wrapped(fast), fast, alone, rank, steps=batches())


def check_unused_parameters_may_be_looked_for(rank):
    for options in (
        {"find_unused_parameters": True},
        {"static_graph": True},
        {"gradient_as_bucket_view": True},
    ):
        alone, _, fast = three()
        assert_same_training(wrapped(fast, **options), fast, alone, rank, steps=batches())


def check_a_model_may_be_patched_inside_of_the_wrapper(rank):
    alone, stock, _ = three()
    parallel = wrapped(stock)
    softprompt.patch(parallel.module, on_unsupported="error")
    assert_same_training(parallel, stock, alone, rank, steps=batches())


def check_logits_stay_lazy_and_have_their_gradient(rank):
    batch = joined_batch()
    for options in ({}, {"find_unused_parameters": True}, {"static_graph": True}):
        alone, _, fast = three()
        parallel = wrapped(fast, **options)
        output = parallel(**half(batch, rank))
        assert not output.logits.is_materialized
        real = half(batch, rank)["attention_mask"].bool()
        output.logits[:, 4:][real].square().sum().backward()
        alone(**batch).logits[:, 4:][batch["attention_mask"].bool()].square().sum().backward()
        assert_close(prompt_of(fast).grad * WORLD_SIZE, prompt_of(alone).grad, 2e-6, "gradient")


def check_an_architecture_without_an_attention_interface(rank):
    alone, _, fast = three("bloom")
    assert_same_training(wrapped(fast), fast, alone, rank, steps=batches())


def check_a_padded_route(rank):
    alone, _, fast = three("mamba")
    assert_same_training(wrapped(fast), fast, alone, rank, steps=batches())


def check_gradient_checkpointing(rank):
    alone, _, fast = three()
    for reentrant in (True, False):
        again, model = copy.deepcopy(alone), copy.deepcopy(fast).train()
        model.get_base_model().gradient_checkpointing_enable({"use_reentrant": reentrant})
        assert_same_training(wrapped(model), model, again, rank, steps=batches())


def _share(count):
    """A loss whose mean over ranks is the joined batch's (Trainer's average_tokens_across_devices)."""

    def loss_of(model, batch):
        return model(**batch, num_items_in_batch=count).loss * WORLD_SIZE

    return loss_of


def check_a_rank_without_labels_neither_waits_nor_disturbs(rank):
    batch = joined_batch()
    batch["labels"][2:] = -100
    count = int((batch["labels"] != -100).sum())
    for options in ({}, {"find_unused_parameters": True}):
        alone, _, fast = three()
        assert_same_training(
            wrapped(fast, **options), fast, alone, rank, steps=[batch] * 2, loss_of=_share(count)
        )


def check_a_rank_without_labels_has_a_zero_gradient(rank):
    _, _, fast = three()
    parallel = wrapped(fast)
    batch = half(joined_batch(), rank)
    batch["labels"] = torch.full_like(batch["labels"], -100)
    loss = parallel(**batch).loss
    loss.backward()
    assert loss.item() == 0
    assert torch.count_nonzero(prompt_of(fast).grad) == 0


def check_a_rank_with_empty_texts_only(rank):
    """No columns on one rank, and on the next step rows of pads only."""
    alone, _, fast = three()
    parallel = wrapped(fast)
    batch = joined_batch()
    optimizer = optimizer_of(fast)
    for empty in ("columns", "mask"):
        mine = half(batch, 0)
        count = int((mine["labels"] != -100).sum())
        if rank == 1:
            mine = {name: value[:, :0] if empty == "columns" else value * 0 for name, value in mine.items()}
            if empty == "mask":
                mine["labels"] = mine["labels"] - 100
        optimizer.zero_grad()
        _share(count)(parallel, mine).backward()
        alone.zero_grad()
        alone(**half(batch, 0)).loss.backward()
        assert_close(prompt_of(fast).grad, prompt_of(alone).grad, 2e-6, f"gradient beside empty {empty}")


def _with_topics(model):
    torch.manual_seed(5)
    model.add_adapter("topics", PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    model.prompt_encoder.to(torch.float64)
    return model


def check_adapters_that_are_not_active_are_unused_parameters(rank):
    alone, _, fast = three()
    _with_topics(alone), _with_topics(fast)
    before = prompt_of(fast, "topics").detach().clone()
    parallel = wrapped(fast, find_unused_parameters=True)
    assert_same_training(parallel, fast, alone, rank, steps=batches())
    assert torch.equal(prompt_of(fast, "topics"), before)
    fast.set_adapter("topics"), alone.set_adapter("topics")
    joined, mine = joined_batch(seed=7), half(joined_batch(seed=7), rank)
    fast.zero_grad(), alone.zero_grad()
    parallel(**mine).loss.backward()
    alone(**joined).loss.backward()
    assert_close(prompt_of(fast, "topics").grad, prompt_of(alone, "topics").grad, 2e-6, "gradient")


def check_unused_parameters_that_nobody_looks_for_are_an_error_as_with_peft(rank):
    _, stock, fast = three()
    for model in (_with_topics(stock), _with_topics(fast)):
        parallel = wrapped(model)
        with pytest.raises(RuntimeError, match="find_unused_parameters=True"):
            train(parallel, [half(batch, rank) for batch in batches()], lambda m, b: m(**b).loss)


def check_rows_of_several_adapters_of_which_a_rank_lacks_one(rank):
    fast = _with_topics(three()[2])
    alone = copy.deepcopy(fast)  # PEFT does not know adapters of rows; one process is compared with
    parallel = wrapped(fast, find_unused_parameters=True)
    names = ["default", "topics", "default", "default"]
    joined = joined_batch()
    for number in range(2):
        fast.zero_grad(), alone.zero_grad()
        parallel(**half(joined, rank), adapter_names=names[2 * rank : 2 * rank + 2]).loss.backward()
        alone(**joined, adapter_names=names).loss.backward()
        for name in ("default", "topics"):
            got, expected = prompt_of(fast, name).grad, prompt_of(alone, name).grad
            assert_close(got, expected, 2e-6, f"gradient of {name} in step {number}")


def check_gradients_accumulate_without_being_reduced(rank):
    alone, _, fast = three()
    parallel = wrapped(fast)
    micro = batches()[:2]
    with parallel.no_sync():
        parallel(**half(micro[0], rank)).loss.backward()
    own = prompt_of(fast).grad.clone()
    assert not torch.allclose(mean_over_ranks(own), own)
    parallel(**half(micro[1], rank)).loss.backward()
    for batch in micro:
        alone(**batch).loss.backward()
    assert_close(prompt_of(fast).grad, prompt_of(alone).grad, 2e-6, "gradient")


def check_a_rank_may_run_out_of_batches(rank):
    """`join`: rank 1 has one batch less, and the gradient of the last step is divided by who is left."""
    alone, _, fast = three()
    parallel = wrapped(fast)
    optimizer, expected = optimizer_of(fast), optimizer_of(alone)
    with parallel.join(divide_by_initial_world_size=False):
        for batch in batches()[: 3 - rank]:
            optimizer.zero_grad()
            parallel(**half(batch, rank)).loss.backward()
            optimizer.step()
    for number, batch in enumerate(batches()):
        expected.zero_grad()
        alone(**(batch if number < 2 else half(batch, 0))).loss.backward()
        expected.step()
    if rank == 0:
        assert_close(prompt_of(fast), prompt_of(alone), 2e-6, "prompt")


def check_half_precision_autocast(rank):
    alone, _, fast = three(dtype=torch.float32)
    parallel = wrapped(fast)
    with torch.autocast("cpu", torch.bfloat16):
        parallel(**half(joined_batch(), rank)).loss.backward()
        alone(**joined_batch()).loss.backward()
    assert_close(prompt_of(fast).grad, prompt_of(alone).grad, 5e-2, "gradient")


def check_prompts_of_ranks_are_made_equal(rank):
    model = prompted("llama")
    with torch.no_grad():
        prompt_of(model).add_(rank)
    softprompt.patch(model, on_unsupported="error")
    wrapped(model)
    assert torch.equal(mean_over_ranks(prompt_of(model).detach()), prompt_of(model))
