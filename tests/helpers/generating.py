"""Models and batches for generate, and what PEFT makes of them."""

import contextlib
import inspect
import sys

import pytest
import torch
from parity import make_batch
from peft import PeftModel
from tiny_models import VOCABULARY, build, prompt_config, with_prompt
from torch import nn

import softprompt
from softprompt.engine import model_spec
from softprompt.generation.stock import PEFT_KNOWS_CACHE
from softprompt.state import state_of

NEW = 8
PEFTS_CACHE = pytest.mark.skipif(not PEFT_KNOWS_CACHE, reason="PEFT is too old for this transformers")
BATCH = make_batch(side="left", labels=None)


def speaker(name, num_virtual_tokens=4, dtype=torch.float64, **overrides):
    """A PEFT model whose continuations vary: tied random embeddings would repeat their last token."""
    base = build(name, dtype, **overrides)
    head = base.get_output_embeddings()
    weight = torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(9)) * 0.4
    head.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    base.generation_config.eos_token_id = None
    base.generation_config.pad_token_id = 0
    return with_prompt(base, num_virtual_tokens)


def two_adapters(name):
    """A `speaker` with a second adapter "long", which has another number of virtual tokens."""
    model = speaker(name)
    torch.manual_seed(5)
    model.add_adapter("long", prompt_config(model.get_base_model(), 7))
    model.prompt_encoder.to(torch.float64)
    return model


def patched(model, **options):
    """The model patched so that nothing falls back to PEFT's generate unseen."""
    return softprompt.patch(model, **({"on_unsupported": "error"} | options))


def tokens(model, batch=BATCH, seed=0, **kwargs):
    """What generate gives. A PEFT that does not find the cache of this transformers gets none."""
    if state_of(model) is None and isinstance(model, PeftModel) and not PEFT_KNOWS_CACHE:
        kwargs.setdefault("use_cache", False)
    torch.manual_seed(seed)
    return model.generate(**batch, **({"max_new_tokens": NEW} | kwargs))


def reason_given(model, batch=BATCH, **kwargs):
    """The warning with which PEFT's own generate was used, and its tokens."""
    with pytest.warns(UserWarning, match="PEFT's own generate was used") as caught:
        got = tokens(model, batch, **kwargs)
    return str(caught[0].message), got


def row_of(batch, row):
    """One row of a batch without its pads."""
    ids = batch["input_ids"][row][batch["attention_mask"][row] != 0][None]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@contextlib.contextmanager
def counted_tokens(model):
    """Yields a list that gets the number of tokens of each call of the model's decoder."""
    counts = []
    body = model_spec.body_of(model.get_base_model())
    code = inspect.unwrap(type(body).forward).__code__

    def watch(frame, event, argument):
        """A forward that was replaced would be noticed, and the prompt computed again."""
        if event == "call" and frame.f_code is code and frame.f_locals["self"] is body:
            ids, embeds = frame.f_locals.get("input_ids"), frame.f_locals["inputs_embeds"]
            given = embeds if ids is None else ids
            counts.append(given.shape[0] * given.shape[1])

    before = sys.getprofile()
    sys.setprofile(watch)
    try:
        yield counts
    finally:
        sys.setprofile(before)


def random_ids(rows, columns, seed=0):
    """[rows, columns] token ids."""
    return torch.randint(3, VOCABULARY, (rows, columns), generator=torch.Generator().manual_seed(seed))
