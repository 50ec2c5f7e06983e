"""Things of a wrong kind given to the library: one sentence says what was given and what is expected."""

import re
import warnings

import pytest
import seq2seq_models
import torch
from parity import make_batch
from peft import PromptTuningConfig
from tiny_models import build, prompted
from torch import nn

import softprompt
from softprompt import ensemble, export, init, multitask

BATCH = make_batch(side="left", labels="everywhere")
IDS, LABELS, MASK = BATCH["input_ids"], BATCH["labels"], BATCH["attention_mask"]
PROMPT = torch.zeros(4, 48, dtype=torch.float64)
CONFIG = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)


def exactly(message):
    """The pattern of a whole message."""
    return f"^{re.escape(message)}$"


@pytest.fixture(scope="module")
def base():
    return build("llama")


@pytest.fixture(scope="module")
def model():
    return softprompt.patch(prompted("llama"), on_unsupported="error")


@pytest.mark.parametrize("thing", [nn.Linear(2, 2), "llama", None], ids=["module", "name", "None"])
def test_what_is_no_language_model_is_named(thing):
    expected = f"expected a transformers language model, got {type(thing).__name__}"
    for call in (
        lambda: softprompt.forward(thing, PROMPT, **BATCH),
        lambda: softprompt.score(thing, PROMPT, [[1]], IDS, MASK),
        lambda: init.random(thing, 3),
        lambda: export.save_peft(thing, PROMPT, "never"),
    ):
        with pytest.raises(TypeError, match=exactly(expected)):
            call()


@pytest.mark.filterwarnings("ignore:softprompt:UserWarning")
def test_a_model_without_a_head_is_named(base):
    message = "takes a causal language model, got LlamaModel, whose forward gives no loss and logits"
    with pytest.raises(TypeError, match=exactly(f"softprompt.forward {message}")):
        softprompt.forward(base.model, PROMPT, **BATCH)


@pytest.mark.parametrize("name", ["forward", "score"])
def test_a_model_with_a_prompt_of_its_own_is_not_given_another(model, name):
    arguments = BATCH if name == "forward" else {"candidates": [[1]], "input_ids": IDS}
    message = (
        f"softprompt.{name} takes a language model and prompts, got a PeftModelForCausalLM that has a prompt "
        "itself: give model.get_base_model(), or call the model after softprompt.patch(model)"
    )
    with pytest.raises(TypeError, match=exactly(message)):
        getattr(softprompt, name)(model, PROMPT, **arguments)


PROMPTS = {
    "a number": (3, "prompts must be a tensor [P, 48] or a list of them, got int"),
    "None": (None, "prompts must be a tensor [P, 48] or a list of them, got NoneType"),
    "lists": ([[1.0] * 48] * 4, "prompt 0 must be a tensor, got list"),
    "a dictionary": ({"a": PROMPT}, "prompt 0 must be a tensor, got str"),
    "whole numbers": (PROMPT.long(), "prompt 0 must be floating point, got torch.int64"),
    "sparse": (PROMPT.to_sparse(), "prompt 0 must be a dense tensor, got a sparse_coo one"),
}


@pytest.mark.parametrize("prompts, message", PROMPTS.values(), ids=PROMPTS)
def test_prompts_of_a_wrong_kind_are_refused(base, prompts, message):
    with pytest.raises(ValueError, match=exactly(message)):
        softprompt.forward(base, prompts, **BATCH)


def test_a_list_of_parameters_is_a_list_of_prompts(base):
    prompts = nn.ParameterList([PROMPT, PROMPT])
    got = softprompt.forward(base, prompts, **BATCH, prompt_of_row=[0, 1, 0]).loss
    assert torch.equal(got, softprompt.forward(base, PROMPT, **BATCH).loss)


TEXTS = {
    "complex ids": (
        {"input_ids": IDS.to(torch.complex64)},
        "input_ids must be integers, got torch.complex64",
    ),
    "complex labels": (
        {"labels": LABELS.to(torch.complex64)},
        "labels must be integers, got torch.complex64",
    ),
    "a complex mask": (
        {"attention_mask": MASK.to(torch.complex64)},
        "attention_mask must be 1 and 0, got torch.complex64",
    ),
    "a sparse mask": (
        {"attention_mask": MASK.to_sparse()},
        "attention_mask must be a dense tensor, got a sparse_coo one",
    ),
    "ids in a list": ({"input_ids": IDS.tolist()}, "input_ids must be a tensor, got list"),
    "ids in an array": ({"input_ids": IDS.numpy()}, "input_ids must be a tensor, got ndarray"),
    "a number for ids": ({"input_ids": torch.tensor(3)}, "input_ids must be [B, L], got shape []"),
    "embeddings of whole numbers": (
        {"inputs_embeds": torch.ones(3, 8, 48, dtype=torch.int64)},
        "inputs_embeds must be floating point, got torch.int64",
    ),
    "num_items in words": (
        {"num_items_in_batch": "3"},
        "num_items must be a number of at least 0, got '3'",
    ),
    "num_items that is no number": (
        {"num_items_in_batch": float("nan")},
        "num_items must be a number of at least 0, got nan",
    ),
}


@pytest.mark.parametrize("changes, message", TEXTS.values(), ids=TEXTS)
def test_texts_of_a_wrong_kind_are_refused(base, model, changes, message):
    for call in (lambda batch: softprompt.forward(base, PROMPT, **batch), lambda batch: model(**batch)):
        with pytest.raises(ValueError, match=exactly(message)):
            call(BATCH | changes)


@pytest.mark.parametrize("rows", [[0.5, 1, 0], [[0], [1], [0]], 0, "abc", [True, False, True]], ids=repr)
def test_rows_that_are_no_numbers_of_prompts_are_refused(base, rows):
    message = f"prompt_of_row must be [B] integers, one for each row, got {rows!r}"
    with pytest.raises(ValueError, match=exactly(message)):
        softprompt.forward(base, [PROMPT, PROMPT], **BATCH, prompt_of_row=rows)


@pytest.mark.parametrize("backend", [3, None, "numpy"])
def test_a_back_end_that_there_is_not_is_named_before_the_model_changes(base, backend):
    message = f"backend must be one of 'auto', 'reference', 'triton', 'native', got {backend!r}"
    plain = prompted("llama")
    for call in (
        lambda: softprompt.patch(plain, backend=backend),
        lambda: softprompt.forward(base, PROMPT, **BATCH, backend=backend),
        lambda: softprompt.score(base, PROMPT, [[1]], IDS, MASK, backend=backend),
    ):
        with pytest.raises(ValueError, match=exactly(message)):
            call()
    assert not hasattr(plain, "_softprompt")


@pytest.mark.parametrize("names", [[1, 2, 3], 3, torch.tensor([0, 0, 0])], ids=["numbers", "one", "tensor"])
def test_adapter_names_that_are_no_names_are_refused(model, names):
    message = f"adapter_names must be a list of names of adapters, got {names!r}"
    for call in (
        lambda: model(**BATCH, adapter_names=names),
        lambda: model.generate(input_ids=IDS, adapter_names=names, max_new_tokens=1),
        lambda: multitask.losses(model, **BATCH, adapter_names=names),
    ):
        with pytest.raises(ValueError, match=exactly(message)):
            call()


DECODER = {
    "complex labels": (
        {"labels": torch.ones(3, 4, dtype=torch.complex64)},
        "labels must be integers, got torch.complex64",
    ),
    "sparse labels": (
        {"labels": torch.ones(3, 4, dtype=torch.int64).to_sparse()},
        "labels must be a dense tensor, got a sparse_coo one",
    ),
    "embeddings of whole numbers": (
        {"labels": None, "decoder_inputs_embeds": torch.ones(3, 4, 24, dtype=torch.int64)},
        "decoder_inputs_embeds must be floating point, got torch.int64",
    ),
}


@pytest.mark.parametrize("changes, message", DECODER.values(), ids=DECODER)
def test_what_a_decoder_cannot_read_is_refused(changes, message):
    model = softprompt.patch(seq2seq_models.prompted("t5"), on_unsupported="error")
    with pytest.raises(ValueError, match=exactly(message)):
        model(**(seq2seq_models.seq2seq_batch() | {"use_cache": False} | changes))


CALLS = {
    "unpatch of None": (
        lambda _: softprompt.unpatch(None),
        TypeError,
        "softprompt.unpatch takes a model, got NoneType",
    ),
    "losses of None": (
        lambda _: multitask.losses(None, **BATCH, adapter_names=["default"] * 3),
        ValueError,
        "multitask.losses takes a model that softprompt.patch has patched",
    ),
    "losses of labels in a list": (
        lambda model: multitask.losses(model, IDS, MASK, LABELS.tolist(), adapter_names=["default"] * 3),
        ValueError,
        "labels must be a tensor, got list",
    ),
    "a mixture of a list": (
        lambda _: multitask.mix([1, 2]),
        ValueError,
        "mix expects adapter -> rows, got list",
    ),
    "an ensemble of one configuration": (
        lambda _: ensemble.create(build("llama"), CONFIG),
        TypeError,
        "expected a list of PromptTuningConfig, got PromptTuningConfig",
    ),
    "an ensemble of names": (
        lambda _: ensemble.create(build("llama"), ["a", "b"]),
        TypeError,
        "expected a list of PromptTuningConfig, got str in it",
    ),
    "probabilities that are none": (
        lambda _: ensemble.combine(torch.tensor([[[0.5, torch.nan]]])),
        ValueError,
        "probabilities must be numbers of at least 0, got some that are not",
    ),
    "probabilities of no prompt": (
        lambda _: ensemble.combine(torch.ones(0, 2, 2)),
        ValueError,
        "probabilities must be [K, N, C], got [0, 2, 2]",
    ),
    "probabilities of whole numbers": (
        lambda _: ensemble.combine(torch.ones(1, 2, 2, dtype=torch.int64)),
        ValueError,
        "probabilities must be a floating-point tensor, got torch.int64",
    ),
    "half a virtual token": (
        lambda model: init.random(model, 2.5),
        ValueError,
        "num_virtual_tokens must be at least 1, got 2.5",
    ),
    "a count that is no number": (
        lambda model: init.common_tokens(model, 2, counts=torch.tensor([1.0] * 96 + [torch.nan])),
        ValueError,
        "counts must be [97] numbers of at least 0, some of them above, got shape [97] with the sum nan",
    ),
    "a prompt that fp32 cannot hold": (
        lambda model: init.from_tensor(model, PROMPT + 1e300),
        ValueError,
        "the prompt has values that are not finite in float32",
    ),
    "a prompt that the parameter cannot hold": (
        lambda _: init.set_prompt(prompted("llama").half(), PROMPT + 1e6),
        ValueError,
        "the prompt has values that are not finite in float16",
    ),
    "vectors that fp16 cannot hold": (
        lambda model: export.prompt_embeds(model, [1], PROMPT + 1e6, dtype=torch.float16),
        ValueError,
        "the prompt has values that are not finite in float16",
    ),
    "ids with fractions": (
        lambda model: export.prompt_embeds(model, [1.5]),
        ValueError,
        "input_ids must be integers, got torch.float32",
    ),
    "a text for ids": (
        lambda model: export.prompt_embeds(model, "text"),
        ValueError,
        "input_ids must be integers [L], got 'text'",
    ),
    "an array of one number": (
        lambda _: export.save_npy(torch.tensor(1.0), "never.npy"),
        ValueError,
        "the prompt must be floating-point numbers of shape [P, 0], got torch.float32 of shape []",
    ),
    "a request of a list": (
        lambda _: export.encode([[1.0]]),
        ValueError,
        "expected a tensor [P+L, H], got list",
    ),
}


@pytest.mark.parametrize("call, kind, message", CALLS.values(), ids=CALLS)
def test_a_wrong_kind_is_named(model, call, kind, message):
    with pytest.raises(kind, match=exactly(message)):
        call(model)


@pytest.mark.filterwarnings("default")
def test_a_warning_points_at_the_line_that_called(base, model):
    nothing = {**BATCH, "labels": torch.full_like(LABELS, -100)}
    other = softprompt.patch(prompted("llama"))
    for call in (
        lambda: softprompt.forward(base, PROMPT, **nothing),
        lambda: model(**nothing),
        lambda: multitask.losses(model, **nothing, adapter_names=["default"] * 3),
        lambda: other(**BATCH, output_attentions=True),
    ):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call()
        said = [warning for warning in caught if str(warning.message).startswith("softprompt: ")]
        assert [warning.filename for warning in said] == [__file__]
