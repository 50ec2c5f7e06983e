"""FSDP2 (`fully_shard`) around a patched model: what one process makes of the joined batch with PEFT."""

import dataclasses
import tempfile
import warnings
from types import SimpleNamespace

import distributed_page as page
import pytest
import torch
from accelerate import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from batches_of_ranks import WORLD_SIZE, batches, half, joined_batch, mean_over_ranks, three
from parity import assert_close, prompt_of
from peft import PromptTuningConfig
from seq2seq_models import prompted as encoder_decoder
from seq2seq_models import seq2seq_batch
from tiny_models import pair, prompted
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

import softprompt
from softprompt.engine import plan_for, sharding


def shard(*modules, **options):
    mesh = init_device_mesh("cpu", (WORLD_SIZE,))
    for module in modules:
        fully_shard(module, mesh=mesh, **options)


def layers_of(base):
    return base.model.layers if hasattr(base, "model") else base.transformer.h


def whole(gradient):
    return gradient.full_tensor() if isinstance(gradient, DTensor) else gradient


def around_the_peft_model(model, **options):
    """The prompt is sharded with the embedding, the norm and the head."""
    shard(*layers_of(model.get_base_model()), model, **options)


def around_the_base(model):
    """The prompt is replicated: its gradient is the rank's own."""
    shard(*layers_of(model.get_base_model()), model.get_base_model())


def with_units_of_their_own(model):
    """As accelerate does it: the embedding apart, the norm and the head together."""
    base = model.get_base_model()
    shard(*layers_of(base), base.model.embed_tokens)
    shard([base.model.norm, base.lm_head], reshard_after_forward=False)
    shard(model)


def with_a_head_of_its_own(model):
    base = model.get_base_model()
    shard(*layers_of(base), base.lm_head, model)


def as_accelerate_does(model):
    """The code behind `--use_fsdp --fsdp_version 2`, which accelerate itself only calls on accelerators."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=[type(layers_of(model.get_base_model())[0]).__name__],
        cpu_ram_efficient_loading=False,
    )
    fsdp2_prepare_model(
        SimpleNamespace(
            state=SimpleNamespace(fsdp_plugin=plugin),
            torch_device_mesh=None,
            mixed_precision="no",
            device=torch.device("cpu"),
            is_main_process=False,
        ),
        model,
    )


WAYS = (around_the_peft_model, around_the_base, with_units_of_their_own, with_a_head_of_its_own)


def train(model, rank, steps, *, replicated):
    """Losses [steps] and the last gradient."""
    optimizer = torch.optim.AdamW([prompt_of(model)], lr=0.05)
    losses = []
    for batch in steps:
        optimizer.zero_grad()
        loss = model(**half(batch, rank)).loss
        loss.backward()
        if replicated:
            prompt_of(model).grad = mean_over_ranks(prompt_of(model).grad)
        optimizer.step()
        losses.append(loss.detach())
    return mean_over_ranks(torch.stack(losses)), whole(prompt_of(model).grad)


def expected_of(alone, steps):
    optimizer = torch.optim.AdamW([prompt_of(alone)], lr=0.05)
    losses = []
    for batch in steps:
        optimizer.zero_grad()
        loss = alone(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses), prompt_of(alone).grad


def check_three_steps_equal_one_process(rank):
    for name in ("llama", "bloom", "gemma2"):
        for way in (*WAYS, as_accelerate_does) if name == "llama" else WAYS[:2]:
            alone, _, fast = three(name)
            way(fast)
            expected = expected_of(alone, batches())
            with warnings.catch_warnings():
                warnings.simplefilter("error", UserWarning)
                got = train(fast, rank, batches(), replicated=way is around_the_base)
            what = f"of {name}, {way.__name__}"
            assert_close(got[0], expected[0], 5e-6, f"losses {what}")
            assert_close(got[1], expected[1], 2e-5, f"gradient {what}")
            assert_close(whole(prompt_of(fast).detach()), prompt_of(alone).detach(), 2e-5, f"prompt {what}")
            assert softprompt.explain(fast).route == "packed"
            assert softprompt.explain(fast).fallbacks == ()


def _gathers(model, rank, way):
    """How often weights are gathered in the second step."""
    way(model)
    batch = half(joined_batch(), rank)
    model(**batch).loss.backward()
    with CommDebugMode() as counted:
        output = model(**batch)
        output.loss.backward()
    assert not getattr(output.logits, "is_materialized", False)
    return sum(
        count
        for op, count in counted.get_comm_counts().items()
        if "all_gather" in str(op) or "allgather" in str(op)
    )


def check_the_head_is_gathered_once_in_a_step(rank):
    """Two layers, forth and back, and the root; then a head of its own, which PEFT gathers twice."""
    counts = {way.__name__: _gathers(three()[2], rank, way) for way in WAYS}
    stock = _gathers(three()[1], rank, with_a_head_of_its_own)
    assert counts["around_the_peft_model"] == counts["around_the_base"] == 5, counts
    assert (counts["with_a_head_of_its_own"], stock) == (6, 7), (counts, stock)
    assert counts["with_units_of_their_own"] == _gathers(three()[1], rank, with_units_of_their_own)


def check_logits_are_those_of_peft_and_wait_for_nobody(rank):
    batch = joined_batch()
    real = half(batch, rank)["attention_mask"].bool()
    for way in WAYS:
        alone, _, fast = three()
        way(fast)
        expected = alone(**half(batch, rank)).logits[:, 4:][real].detach()
        output = fast(**half(batch, rank))
        if way is not with_a_head_of_its_own and rank == 0:  # alone
            assert_close(output.logits[:, 4:][real].detach(), expected, 2e-6, "logits")
        output.loss.backward()
        with torch.no_grad():
            output = fast(**half(batch, rank))
        if rank == 1:
            assert_close(output.logits[:, 4:][real], expected, 2e-6, "logits without a gradient")


def check_logits_have_their_gradient(rank):
    batch = joined_batch()
    for way in WAYS:
        alone, _, fast = three()
        way(fast)
        real = half(batch, rank)["attention_mask"].bool()
        fast(**half(batch, rank)).logits[:, 4:][real].square().sum().backward()
        alone(**batch).logits[:, 4:][batch["attention_mask"].bool()].square().sum().backward()
        got = whole(prompt_of(fast).grad)
        got = mean_over_ranks(got) if way is around_the_base else got
        assert_close(got * WORLD_SIZE, prompt_of(alone).grad, 2e-6, f"gradient {way.__name__}")


def check_logits_after_the_backward_are_a_clear_error(rank):
    for way in WAYS[:2]:
        fast = three()[2]
        way(fast)
        output = fast(**half(joined_batch(), rank))
        output.loss.backward()
        with pytest.raises(RuntimeError, match="before backward"):
            output.logits.argmax(-1)


def check_a_rank_without_labels(rank):
    for way in WAYS:
        alone, _, fast = three()
        way(fast)
        batch = joined_batch()
        batch["labels"][2:] = -100
        count = int((batch["labels"] != -100).sum())
        (fast(**half(batch, rank), num_items_in_batch=count).loss * WORLD_SIZE).backward()
        got = whole(prompt_of(fast).grad)
        got = mean_over_ranks(got) if way is around_the_base else got
        alone(**batch).loss.backward()
        assert_close(got, prompt_of(alone).grad, 2e-6, f"gradient {way.__name__}")


def check_gradients_accumulate_without_being_reduced(rank):
    alone, _, fast = three()
    around_the_peft_model(fast)
    first, second = batches()[:2]
    fast.set_requires_gradient_sync(False)
    fast(**half(first, rank)).loss.backward()
    fast.set_requires_gradient_sync(True)
    fast(**half(second, rank)).loss.backward()
    for batch in (first, second):
        alone(**batch).loss.backward()
    assert_close(whole(prompt_of(fast).grad), prompt_of(alone).grad, 2e-6, "gradient")


def check_gradient_checkpointing(rank):
    alone, _, fast = three()
    fast.train().get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    around_the_peft_model(fast)
    fast(**half(joined_batch(), rank)).loss.backward()
    alone(**joined_batch()).loss.backward()
    assert_close(whole(prompt_of(fast).grad), prompt_of(alone).grad, 2e-6, "gradient")


def check_mixed_precision_gives_what_peft_gives(rank):
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    alone, stock, fast = three(dtype=torch.float32)
    grads = []
    for model in (stock, fast):
        around_the_peft_model(model, mp_policy=policy)
        output = model(**half(joined_batch(), rank))
        assert output.logits.dtype == (output.logits + 0).dtype == torch.bfloat16
        output.loss.backward()
        grads.append(whole(prompt_of(model).grad))
    alone(**joined_batch()).loss.backward()
    for grad in grads:
        assert_close(grad, prompt_of(alone).grad, 5e-2, "gradient")
    assert softprompt.explain(fast).fallbacks == ()


def _with_topics(model):
    torch.manual_seed(5)
    model.add_adapter("topics", PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    model.prompt_encoder.to(torch.float64)
    return model


def check_rows_of_several_adapters(rank):
    alone, _, fast = map(_with_topics, three())
    softprompt.patch(alone)
    around_the_base(fast)
    names = ["default", "topics", "default", "default"]
    fast(**half(joined_batch(), rank), adapter_names=names[2 * rank : 2 * rank + 2]).loss.backward()
    alone(**joined_batch(), adapter_names=names).loss.backward()
    for name in ("default", "topics"):
        prompt = prompt_of(fast, name)
        got = mean_over_ranks(torch.zeros_like(prompt) if prompt.grad is None else prompt.grad)
        assert_close(got, prompt_of(alone, name).grad, 2e-6, f"gradient of {name}")


def check_rows_of_several_adapters_whose_prompts_are_sharded_are_refused(rank):
    fast = _with_topics(three()[2])
    around_the_peft_model(fast)
    with pytest.raises(softprompt.UnsupportedModelError, match="leaves the prompts whole"):
        fast(**half(joined_batch(), rank), adapter_names=["default", "topics"])


def check_adapters_that_are_not_active(rank):
    alone, _, fast = map(_with_topics, three())
    around_the_peft_model(fast)
    fast(**half(joined_batch(), rank)).loss.backward()
    alone(**joined_batch()).loss.backward()
    assert_close(whole(prompt_of(fast).grad), prompt_of(alone).grad, 2e-6, "gradient")
    assert prompt_of(fast, "topics").grad is None


def check_the_functional_form(rank):
    """`softprompt.forward` on a sharded base, behind a prompt that is no part of it."""
    alone, _, fast = three()
    base = fast.get_base_model()
    shard(*layers_of(base), base)
    prompt = prompt_of(fast).detach().clone().requires_grad_()
    softprompt.forward(base, prompt, **half(joined_batch(), rank)).loss.backward()
    alone(**joined_batch()).loss.backward()
    assert_close(mean_over_ranks(prompt.grad), prompt_of(alone).grad, 2e-6, "gradient")
    base.config._attn_implementation = "eager"  # another model than the one that was checked
    with pytest.raises(softprompt.UnsupportedModelError, match="before fully_shard"):
        softprompt.forward(base, prompt, **half(joined_batch(), rank))


def check_a_forward_that_was_set_on_a_sharded_model_stays_there(rank):
    """TRL sets one."""
    base = three()[2].get_base_model()
    shard(*layers_of(base), base)
    base.forward = forward = lambda **kwargs: None
    assert sharding.inside(base, lambda: 3) == 3
    assert base.forward is forward


def check_a_model_that_was_sharded_before_stays_on_pefts_forward(rank):
    alone, stock, _ = three()
    around_the_peft_model(stock)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        softprompt.patch(stock)
    assert any("call softprompt.patch before fully_shard" in str(w.message) for w in caught)
    assert isinstance(stock, FSDPModule)
    report = softprompt.explain(stock)
    assert report.route == "stock"
    assert "call softprompt.patch before fully_shard" in report.reason
    stock(**half(joined_batch(), rank)).loss.backward()
    alone(**joined_batch()).loss.backward()
    assert_close(whole(prompt_of(stock).grad), prompt_of(alone).grad, 2e-6, "gradient")


def check_an_encoder_decoder_stays_on_pefts_forward(rank):
    batch, sentence = seq2seq_batch(), "fully_shard, which is served for decoder-only models"
    for patched_first in (True, False):
        alone, fast = pair(encoder_decoder("t5"))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if patched_first:
                softprompt.patch(fast)
            shard(fast)
            if not patched_first:
                softprompt.patch(fast)
            fast(**batch).loss.backward()
        assert len([w for w in caught if sentence in str(w.message)]) == 1
        report = softprompt.explain(fast)
        assert report.route == "stock"
        assert sentence in report.reason
        alone(**batch).loss.backward()
        assert_close(whole(prompt_of(fast).grad), prompt_of(alone).grad, 2e-6, "gradient")


def check_what_is_not_forward_is_refused_by_name(rank):
    fast = three()[2]
    fast.add_adapter("topics", PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    around_the_peft_model(fast)
    for call in (
        lambda: softprompt.ensemble.losses(fast, **joined_batch()),
        lambda: softprompt.multitask.losses(fast, **joined_batch(), adapter_names=["default"] * 4),
        lambda: fast.generate(input_ids=joined_batch()["input_ids"], max_new_tokens=1),
    ):
        with pytest.raises(softprompt.UnsupportedModelError, match="only forward gathers them"):
            call()


def check_what_is_left_to_peft_where_only_the_base_is_sharded_is_refused_by_name(rank):
    """PEFT embeds outside of the base, where the weight is not whole."""
    batch = half(joined_batch(), rank)
    _, stock, fast = three()
    around_the_base(stock)
    with pytest.raises(RuntimeError, match=r"mixed torch\.Tensor and DTensor"):
        stock(**batch)
    softprompt.patch(fast)
    around_the_base(fast)
    ids = {"input_ids": batch["input_ids"], "max_new_tokens": 1}
    for call in (lambda: fast(**batch, output_hidden_states=True), lambda: fast.generate(**ids)):
        with pytest.raises(softprompt.UnsupportedModelError, match="embeds the texts outside of the model"):
            call()
    fast(**batch).loss.backward()


def _padded(model):
    """The route of a model whose layer has a hook; the hook is gone afterwards."""
    handle = model.get_base_model().model.layers[0].register_forward_hook(lambda m, a, o: o.cumsum(1))
    softprompt.patch(model)
    assert softprompt.explain(model).route == "padded"
    handle.remove()


def _stock(model):
    """As on a rank that got no weights yet (RAM-efficient loading)."""
    head = model.get_base_model().lm_head
    weight = head.weight
    head.weight = torch.nn.Parameter(torch.empty_like(weight, device="meta"), requires_grad=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        softprompt.patch(model)
    assert softprompt.explain(model).route == "stock"
    head.weight = weight


def check_ranks_that_chose_different_routes_all_take_pefts_forward(rank):
    for other in (_padded, _stock):
        alone, stock, fast = three()
        model = softprompt.patch(fast)
        if rank == 1:
            model = stock
            other(model)
        around_the_peft_model(model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for _ in range(2):
                model(**half(joined_batch(), rank)).loss.backward()
        alone(**joined_batch()).loss.backward()
        assert_close(whole(prompt_of(model).grad) / 2, prompt_of(alone).grad, 2e-6, "gradient")
        ((reason, count),) = softprompt.explain(model).fallbacks
        assert count == 2
        expected = "meta device" if rank == 1 and other is _stock else "not the same on all ranks"
        assert expected in reason


def check_self_checks_that_differ_in_the_last_digits_are_the_same_route(rank):
    fast = three()[2]
    plan = plan_for(fast.get_base_model())
    assert sharding.all_agree(fast, dataclasses.replace(plan, loss_error=1e-9 * (1 + rank)).choice)


def check_unpatching_a_sharded_model_is_a_clear_error(rank):
    fast = three()[2]
    around_the_peft_model(fast)
    assert softprompt.patch(fast, logits="text") is fast  # options may change
    assert isinstance(fast, FSDPModule)
    with pytest.raises(RuntimeError, match="unpatch before"):
        softprompt.unpatch(fast)
    fast(**half(joined_batch(), rank)).loss.backward()


def check_prompts_of_another_model_stay_untouched(rank):
    """A second model, not sharded, in the same process."""
    model = softprompt.patch(prompted("llama"), on_unsupported="error")
    model(**joined_batch()).loss.backward()
    assert softprompt.explain(model).route == "packed"


def check_the_script_of_the_page_trains_one_prompt_on_all_ranks(rank):
    model = page.run("py", tempfile.mkdtemp())["model"]
    prompt = prompt_of(model).detach()
    assert torch.equal(mean_over_ranks(prompt), prompt)
    assert isinstance(model.get_base_model(), FSDPModule)
    assert softprompt.explain(model).fallbacks == ()
