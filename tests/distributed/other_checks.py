"""Tensor parallel weights, FSDP1 and trainers of several prompts in two processes."""

import contextlib
import io
import tempfile
import warnings

import pytest
import torch
from batches_of_ranks import WORLD_SIZE, half, joined_batch, mean_over_ranks, three
from parity import assert_close, prompt_of
from peft import PromptTuningConfig, get_peft_model
from tiny_models import build
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers import AutoModelForCausalLM, TrainingArguments

import softprompt
from softprompt.cli import main
from softprompt.tasks.errors import TaskError
from softprompt.tasks.trainer import Member, PromptTrainer


def _cut(base, *, ends):
    """Megatron's way through the layers; with `ends` the embedding and the head, too."""
    mesh = init_device_mesh("cpu", (WORLD_SIZE,))
    for layer in base.model.layers:
        parallelize_module(
            layer,
            mesh,
            {
                "self_attn.q_proj": ColwiseParallel(),
                "self_attn.k_proj": ColwiseParallel(),
                "self_attn.v_proj": ColwiseParallel(),
                "self_attn.o_proj": RowwiseParallel(),
                "mlp.gate_proj": ColwiseParallel(),
                "mlp.up_proj": ColwiseParallel(),
                "mlp.down_proj": RowwiseParallel(),
            },
        )
    if ends:
        parallelize_module(
            base,
            mesh,
            {
                "model.embed_tokens": RowwiseParallel(input_layouts=Replicate()),
                "lm_head": ColwiseParallel(output_layouts=Replicate()),
            },
        )


def check_tensor_parallel_weights_equal_whole_ones(rank):
    batch = joined_batch("everywhere")
    routes = []
    for ends in (False, True):
        for patched_first in (False, True):
            alone, stock, _ = three()
            if patched_first:
                softprompt.patch(stock)
            _cut(stock.get_base_model(), ends=ends)
            softprompt.patch(stock, on_unsupported="error")
            output = stock(**batch)
            output.loss.backward()
            expected = alone(**batch)
            expected.loss.backward()
            assert_close(output.loss.detach(), expected.loss.detach(), 2e-6, "loss")
            assert_close(prompt_of(stock).grad, prompt_of(alone).grad, 2e-5, "gradient")
            real = batch["attention_mask"].bool()
            assert_close(
                output.logits[:, 4:][real].detach(), expected.logits[:, 4:][real].detach(), 2e-5, "logits"
            )
            routes.append(softprompt.explain(stock).route)
            assert softprompt.explain(stock).fallbacks == ()
    return routes


def check_the_tensor_parallel_plan_of_transformers(rank):
    if torch.cuda.is_available():  # transformers would take it
        return
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    with tempfile.TemporaryDirectory() as mine:
        if rank == 0:  # the only one that transformers lets save
            build("llama").save_pretrained(mine)
        folders = [mine]
        torch.distributed.broadcast_object_list(folders)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            cut = AutoModelForCausalLM.from_pretrained(folders[0], dtype=torch.float32, tp_plan="auto")
        alone = get_peft_model(AutoModelForCausalLM.from_pretrained(folders[0], dtype=torch.float32), config)
        torch.distributed.barrier()
    fast = get_peft_model(cut, config)
    with torch.no_grad():
        for model in (fast, alone):  # the same on both ranks
            prompt_of(model).copy_(torch.linspace(-1, 1, prompt_of(model).numel()).view_as(prompt_of(model)))
    assert isinstance(cut.model.layers[0].self_attn.q_proj.weight, DTensor)
    softprompt.patch(fast, on_unsupported="error")
    losses = [model(**joined_batch("everywhere")).loss for model in (fast, alone)]
    for loss in losses:
        loss.backward()
    assert_close(losses[0].detach(), losses[1].detach(), 2e-6, "loss")
    assert_close(prompt_of(fast).grad, prompt_of(alone).grad, 2e-5, "gradient")
    assert softprompt.explain(fast).route == "packed"


def check_fsdp1_is_refused_by_name(rank):
    alone, stock, _ = three()
    fast = softprompt.patch(stock)
    base = fast.get_base_model()
    for number, layer in enumerate(base.model.layers):
        base.model.layers[number] = FullyShardedDataParallel(
            layer, device_id=torch.device("cpu"), use_orig_params=True
        )
    parallel = FullyShardedDataParallel(fast, device_id=torch.device("cpu"), use_orig_params=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loss = parallel(**half(joined_batch(), rank)).loss
    loss.backward()
    assert any("FSDP1 (FullyShardedDataParallel)" in str(w.message) for w in caught)
    assert_close(mean_over_ranks(loss.detach()), alone(**joined_batch()).loss.detach(), 2e-6, "loss")
    with pytest.raises(softprompt.UnsupportedModelError, match="FSDP2"):
        softprompt.patch(fast, on_unsupported="error")


def check_fsdp1_around_the_whole_model(rank):
    """Its weights look whole in the forward, where each is cut out of the flat one."""
    alone, stock, _ = three()
    fast = softprompt.patch(stock)
    parallel = FullyShardedDataParallel(fast, device_id=torch.device("cpu"), use_orig_params=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loss = parallel(**half(joined_batch(), rank)).loss
    loss.backward()
    assert any("FSDP1 (FullyShardedDataParallel)" in str(w.message) for w in caught)
    assert [count for _, count in softprompt.explain(fast).fallbacks] == [1]
    assert_close(mean_over_ranks(loss.detach()), alone(**joined_batch()).loss.detach(), 2e-6, "loss")
    assert "FSDP1 (FullyShardedDataParallel)" in softprompt.explain(fast).reason


def check_the_command_line_is_refused_by_name(rank):
    shown = io.StringIO()
    with contextlib.redirect_stderr(shown):
        assert main(["train"]) == 2
    assert "the command line runs in one process, and WORLD_SIZE is 2" in shown.getvalue()


def check_trainers_of_tasks_are_refused_by_name(rank):
    arguments = TrainingArguments(output_dir="unused", use_cpu=True, report_to=[])
    assert arguments.world_size == WORLD_SIZE
    nothing = dict.fromkeys(
        ("model", "encoder", "train_table", "eval_table", "record", "callbacks", "evaluated")
    )
    for members in ((), [Member("run", 0, 0.1, 0.0)]):
        with pytest.raises(TaskError, match="PromptTrainer trains in one process, got 2"):
            PromptTrainer(args=arguments, **nothing, members=members)
