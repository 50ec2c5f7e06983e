"""Layers that accelerate's `device_map` keeps elsewhere and brings when they are called."""

import warnings

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from parity import assert_same_step, make_batch
from tiny_models import pair, prompted

import softprompt

BATCH = make_batch(side="left", labels="everywhere")


def first_layer_elsewhere(base, folder):
    """Everything on the CPU, the first layer on the disk."""
    names = [name for name, _ in base.named_children()]
    body = base.base_model
    inner = [f"{base.base_model_prefix}.{name}" for name, _ in body.named_children()]
    device_map = {name: "cpu" for name in (*names, *inner) if name != base.base_model_prefix}
    layers = next(name for name, child in body.named_children() if isinstance(child, torch.nn.ModuleList))
    del device_map[f"{base.base_model_prefix}.{layers}"]
    device_map |= {f"{base.base_model_prefix}.{layers}.{n}": ("disk", "cpu")[n] for n in range(2)}
    dispatch_model(base, device_map, main_device="cpu", offload_dir=str(folder), force_hooks=True)


WAYS = {
    "all on the cpu": lambda base, folder: cpu_offload(base, execution_device=torch.device("cpu")),
    "all on the disk": lambda base, folder: disk_offload(base, str(folder), torch.device("cpu")),
    "a layer on the disk": first_layer_elsewhere,
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("name", ["llama", "bloom"])
def test_weights_that_are_brought_when_a_module_is_called(name, way, tmp_path):
    stock, fast = pair(prompted(name))
    way(fast.get_base_model(), tmp_path)
    softprompt.patch(fast, on_unsupported="error")
    # The attention modules of BLOOM cannot be answered where accelerate has replaced their forward.
    assert softprompt.explain(fast).route in ("packed", "packed" if name == "llama" else "padded")
    assert_same_step(fast, stock, BATCH)
    assert softprompt.explain(fast).fallbacks == ()


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_a_model_that_was_patched_before(way, tmp_path):
    stock, fast = pair(prompted("llama"))
    softprompt.patch(fast, on_unsupported="error")
    assert_same_step(fast, stock, BATCH)
    way(fast.get_base_model(), tmp_path)
    assert_same_step(fast, stock, BATCH)


def test_generate_gives_the_tokens_of_peft(tmp_path):
    stock, fast = pair(prompted("llama"))
    cpu_offload(fast.get_base_model(), execution_device=torch.device("cpu"))
    softprompt.patch(fast)
    inputs = {"input_ids": BATCH["input_ids"], "attention_mask": BATCH["attention_mask"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got, expected = (
            m.eval().generate(**inputs, max_new_tokens=3, do_sample=False) for m in (fast, stock)
        )
    assert torch.equal(got, expected)


def test_weights_that_nobody_brings_are_named(tmp_path):
    model = prompted("llama")
    model.get_base_model().lm_head.to("meta")
    with pytest.raises(softprompt.UnsupportedModelError, match="on the meta device"):
        softprompt.patch(model, on_unsupported="error")
