"""Wrong input is an exception that says what was given and what is expected, before the model runs."""

import contextlib

import pytest
import torch
from parity import make_batch
from tiny_models import VOCABULARY, build, prompt_config, prompted
from torch import nn

import softprompt
from softprompt.engine import model_spec

BATCH = make_batch(side="left", labels="everywhere")
# the table read, a dense mask, the embedding called, padded, padded with the embedding called
ROUTES = ["llama", "gptj", "gemma", "lfm2", "recurrent_gemma"]


@pytest.fixture(scope="module")
def models():
    made = {
        name: softprompt.patch(prompted(name), on_unsupported="error") for name in (*ROUTES, "gpt2", "opt")
    }
    for model in made.values():
        model(**BATCH)
    return made


@contextlib.contextmanager
def body_not_called(model):
    """Fails where the decoder is launched inside the block."""
    calls = []
    handle = model_spec.body_of(model.get_base_model()).register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        yield
    finally:
        handle.remove()
    assert calls == []


def changed(name, row, column, value):
    tensor = BATCH[name].clone()
    tensor[row, column] = value
    return {**BATCH, name: tensor}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("value", [VOCABULARY, -1, -100, 2**40])
def test_an_id_outside_the_vocabulary_is_named(models, route, value):
    model = models[route]
    with body_not_called(model), pytest.raises(IndexError) as error:
        model(**changed("input_ids", 1, 6, value))
    assert f"input_ids[1, 6] = {value} is outside the vocabulary 0 .. {VOCABULARY - 1}" in str(error.value)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("value", [VOCABULARY, -1, -101, 2**40])
def test_a_label_outside_the_vocabulary_is_named(models, route, value):
    model = models[route]
    with body_not_called(model), pytest.raises(IndexError) as error:
        model(**changed("labels", 2, 5, value))
    assert f"labels[2, 5] = {value} is outside the vocabulary 0 .. {VOCABULARY - 1}" in str(error.value)


def test_labels_are_checked_behind_embeddings_too(models):
    for route in ROUTES:
        model = models[route]
        embeds = torch.zeros(3, 8, 48, dtype=torch.float64)
        batch = changed("labels", 2, 5, VOCABULARY) | {"inputs_embeds": embeds, "input_ids": None}
        with body_not_called(model), pytest.raises(IndexError, match=r"labels\[2, 5\] = 97"):
            model(**batch)


def test_several_wrong_values_are_counted(models):
    batch = changed("input_ids", 0, 3, 500)
    batch["input_ids"][2, 1] = -7
    with pytest.raises(IndexError, match=r"input_ids\[0, 3\] = 500 .*\(2 such values\)"):
        models["llama"](**batch)


def test_a_pad_outside_the_vocabulary_is_an_error_as_in_peft(models):
    stock = prompted("llama")
    batch = changed("input_ids", 0, 0, VOCABULARY)
    assert batch["attention_mask"][0, 0] == 0
    with pytest.raises(IndexError):
        stock(**batch)
    with pytest.raises(IndexError, match=r"input_ids\[0, 0\] = 97"):
        models["llama"](**batch)


def test_a_model_works_after_an_error(models):
    model = models["llama"]
    before = model(**BATCH).loss
    with pytest.raises(IndexError):
        model(**changed("labels", 2, 5, VOCABULARY))
    assert torch.equal(model(**BATCH).loss, before)


EMPTY = {name: value[:0] for name, value in BATCH.items()}
WRONG = {
    "a mask with the prompt": (
        {"attention_mask": torch.ones(3, 12)},
        r"attention_mask must be \[B, L\] = \[3, 8\], without the prompt, got shape \[3, 12\]",
    ),
    "a mask of rank 4": (
        {"attention_mask": torch.ones(3, 1, 8, 8)},
        r"attention_mask must be .*\[3, 1, 8, 8\]",
    ),
    "a mask of rank 1": ({"attention_mask": torch.ones(8)}, r"attention_mask must be .* got shape \[8\]"),
    "a mask of other rows": (
        {"attention_mask": torch.ones(2, 8)},
        r"attention_mask must be .* got shape \[2, 8\]",
    ),
    "labels with the prompt": (
        {"labels": torch.ones(3, 12, dtype=torch.int64)},
        r"labels must be \[B, L\] = \[3, 8\], without the prompt, got shape \[3, 12\]",
    ),
    "float labels": ({"labels": torch.ones(3, 8)}, "labels must be integers, got torch.float32"),
    "float ids": ({"input_ids": torch.ones(3, 8)}, "input_ids must be integers, got torch.float32"),
    "ids of one row": (
        {"input_ids": torch.ones(8, dtype=torch.int64)},
        r"input_ids must be \[B, L\], got shape \[8\]",
    ),
    "no rows": (EMPTY, r"the batch is empty: expected at least one row, got shape \[0, 8\]"),
    "nothing": (dict.fromkeys(BATCH), "You have to provide either input_ids or inputs_embeds"),
    "embeddings of another width": (
        {"inputs_embeds": torch.zeros(3, 8, 7)},
        r"inputs_embeds must be \[B, L, 48\], got \[3, 8, 7\]",
    ),
    "too few adapter names": (
        {"adapter_names": ["default"] * 2},
        r"one adapter for each of the 3 rows, got \['default', 'default'\]",
    ),
    "one adapter name": ({"adapter_names": "default"}, "one adapter for each of the 3 rows, got 'default'"),
    "unknown adapters": (
        {"adapter_names": ["x", "default", "y"]},
        "adapter_names has unknown adapters x, y; the model has default",
    ),
}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("changes, message", WRONG.values(), ids=WRONG)
def test_what_does_not_fit_is_refused_before_the_model_runs(models, route, changes, message):
    model = models[route]
    with body_not_called(model), pytest.raises(ValueError, match=message):
        model(**(BATCH | changes))


@pytest.mark.parametrize("name", ["gpt2", "opt"])
@pytest.mark.parametrize("length", [60, 61])
def test_more_tokens_than_positions_are_refused_before_the_model_runs(models, name, length):
    """Four virtual tokens and 60 tokens of text fill the 64 positions."""
    model = models[name]
    batch = make_batch((length, 5), labels="everywhere", width=length)
    if length == 60:
        assert torch.isfinite(model(**batch).loss)
        return
    with (
        body_not_called(model),
        pytest.raises(ValueError, match="65 tokens long, but the model has 64 positions"),
    ):
        model(**batch)
    with pytest.raises(ValueError, match="65 tokens long"):
        softprompt.forward(model.get_base_model(), torch.zeros(5, 48), batch["input_ids"][:, :60])


def test_pads_beyond_the_positions_are_refused_where_they_count(models):
    batch = make_batch((5, 6), side="left", labels="everywhere", width=61)
    with pytest.raises(ValueError, match="65 tokens long"):
        models["gpt2"](**batch)
    assert torch.isfinite(models["opt"](**batch).loss)
    with softprompt.patched(models["gpt2"], positions="compact") as compact:
        assert torch.isfinite(compact(**batch).loss)


@pytest.mark.parametrize(
    "model", [nn.Linear(2, 2), build("llama"), "llama"], ids=["module", "transformers", "name"]
)
def test_only_peft_models_are_patched(model):
    with pytest.raises(TypeError, match=rf"takes a PEFT model .* got {type(model).__name__}"):
        softprompt.patch(model)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"positions": "slots"}, "positions must be one of 'padded', 'compact', got 'slots'"),
        ({"on_unsupported": "ignore"}, "on_unsupported must be one of 'fallback', 'error', got 'ignore'"),
        ({"cuda_graphs": "False"}, "cuda_graphs must be True or False, got 'False'"),
    ],
)
def test_unknown_option_values_are_named(models, options, message):
    before = type(models["llama"])
    with pytest.raises(ValueError, match=message):
        softprompt.patch(models["llama"], **options)
    assert type(models["llama"]) is before
    with pytest.raises(ValueError, match=message):
        softprompt.forward(build("llama"), torch.zeros(4, 48), BATCH["input_ids"], **options)


@pytest.mark.parametrize("value", ["reduce-overhead", 1, None])
def test_compile_is_no_mode_of_the_compiler(models, value):
    with pytest.raises(ValueError, match=f"^compile must be True or False, got {value!r}$"):
        softprompt.patch(models["llama"], compile=value)


def test_an_unknown_backend_is_named():
    with pytest.raises(ValueError, match=r"backend must be one of .*, got 'cutlass'"):
        softprompt.patch(prompted("llama"), backend="cutlass")(**BATCH)


@pytest.mark.parametrize(
    "prompts, message",
    [
        (torch.zeros(4, 47), r"prompt 0 must be \[P, 48\], got \[4, 47\]"),
        ([torch.zeros(4, 48), torch.zeros(2, 4, 48)], r"prompt 1 must be \[P, 48\], got \[2, 4, 48\]"),
        ([], "expected at least one prompt, got none"),
        (torch.zeros(0, 48), "prompt 0 has no virtual tokens"),
        ([torch.zeros(4, 48)] * 2, "2 prompts need prompt_of_row"),
    ],
)
def test_prompts_that_do_not_fit_are_refused(prompts, message):
    with pytest.raises(ValueError, match=message):
        softprompt.forward(build("llama"), prompts, **BATCH)


def test_prompts_of_rows_that_do_not_exist_are_refused():
    prompts = [torch.zeros(4, 48), torch.zeros(2, 48)]
    for rows in ([0, 1, 2], torch.tensor([0, 1, 2])):
        with pytest.raises(ValueError, match=r"prompt_of_row\[2\] = 2 is not one of the 2 prompts"):
            softprompt.forward(build("llama"), prompts, **BATCH, prompt_of_row=rows)
    with pytest.raises(ValueError, match="one entry for each of 3 rows, got 2"):
        softprompt.forward(build("llama"), prompts, **BATCH, prompt_of_row=[0, 1])


def test_prompts_of_several_lengths_on_the_padded_route_are_refused():
    prompts = [torch.zeros(4, 48), torch.zeros(2, 48)]
    with pytest.raises(ValueError, match=r"lfm2 takes the padded route.*one length; got \[4, 2\]"):
        softprompt.forward(build("lfm2"), prompts, **BATCH, prompt_of_row=[0, 1, 0])


def test_a_wrong_prompt_width_in_the_configuration_is_named_at_the_call():
    base = build("llama")
    config = prompt_config(base)
    config.token_dim = 40
    from peft import get_peft_model

    model = softprompt.patch(get_peft_model(base, config))
    with pytest.raises(ValueError, match=r"prompt 0 must be \[P, 48\], got \[4, 40\]"):
        model(**BATCH)
