"""Statements 4 to 12 and 16 of the contract: what the forward of a patched model takes and gives."""

import functools
import warnings

import pytest
import torch
from parity import assert_close, assert_same_step, make_batch, outcome, prompt_of, real_columns, step
from tiny_models import VOCABULARY, pair, prompted

import softprompt

P = 4
# Positions that count pads, positions from the mask, none (ALiBi), and a recurrent state on the padded route.
MODELS = ["llama", "opt", "bloom", "mamba"]
BATCH = make_batch(side="left", labels="everywhere")


@functools.cache
def built(name, num_virtual_tokens=P):
    return prompted(name, num_virtual_tokens=num_virtual_tokens)


def models(name="llama", on_unsupported="error", num_virtual_tokens=P):
    stock, fast = pair(built(name, num_virtual_tokens))
    return stock, softprompt.patch(fast, on_unsupported=on_unsupported)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", MODELS)
def test_04_the_prompt_stands_before_padding_and_text_in_every_row(name, side):
    stock, fast = models(name)
    batch = make_batch(side=side, labels="everywhere")
    base = stock.get_base_model()
    prompt = prompt_of(stock).expand(3, -1, -1)
    columns = {
        "inputs_embeds": torch.cat([prompt, base.get_input_embeddings()(batch["input_ids"])], 1),
        "attention_mask": torch.cat([torch.ones(3, P, dtype=torch.int64), batch["attention_mask"]], 1),
        "labels": torch.cat([torch.full((3, P), -100), batch["labels"]], 1),
    }
    assert_close(fast(**batch).loss, base(**columns).loss, 2e-6, "loss of columns laid out by hand")
    assert_same_step(fast, stock, batch)


@pytest.mark.parametrize("mask", [None, torch.bool, torch.int32, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["llama", "mamba"])
def test_05_masks_of_two_dimensions_get_ones_in_front_and_none_stays_none(name, mask):
    stock, fast = models(name)
    mask = None if mask is None else BATCH["attention_mask"].to(mask)
    assert_same_step(fast, stock, BATCH | {"attention_mask": mask})


BAD_MASKS = {
    "rank 1": torch.ones(8),
    "rank 3": torch.ones(3, 1, 8),
    "rank 4": torch.ones(3, 1, 8, 8),
    "without columns": torch.ones(3, 0),
    "with the prompt": torch.ones(3, P + 8),
    "other rows": torch.ones(2, 8),
}


@pytest.mark.parametrize("mask", BAD_MASKS.values(), ids=BAD_MASKS)
def test_05_other_masks_are_a_clear_error_where_peft_errs_or_misbehaves(mask):
    stock, fast = models(on_unsupported="fallback")
    right = stock(**BATCH).loss
    theirs = outcome(stock, **(BATCH | {"attention_mask": mask}))
    assert theirs.error is not None or not torch.allclose(theirs.value.loss, right)
    for served in ({}, {"output_hidden_states": True}):
        with pytest.raises(ValueError, match=r"attention_mask must be \[B, L\] = \[3, 8\]"):
            fast(**(BATCH | {"attention_mask": mask}), **served)


@pytest.mark.parametrize("argument", ["position_ids", "token_type_ids"])
@pytest.mark.parametrize("name", ["llama", "opt", "bloom"])
def test_06_positions_and_token_types_are_ignored_with_the_same_warning(name, argument):
    stock, fast = models(name)
    call = BATCH | {argument: torch.ones_like(BATCH["input_ids"])}
    expected, got = outcome(stock, **call), outcome(fast, **call)
    assert expected.warnings
    assert got.warnings == expected.warnings
    assert_close(got.value.loss, stock(**BATCH).loss, 2e-6, "loss at the model's own positions")


@pytest.mark.parametrize("labels", ["first", "answer", "everywhere", "pads"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_07_the_first_label_counts_and_the_loss_is_the_models(labels, side):
    stock, fast = models()
    assert_same_step(fast, stock, make_batch(side=side, labels=labels))


@pytest.mark.parametrize("count", [3, torch.tensor(11)], ids=str)
def test_07_num_items_in_batch_divides_the_summed_loss(count):
    stock, fast = models()
    assert_same_step(fast, stock, BATCH, num_items_in_batch=count)
    assert step(fast, BATCH, num_items_in_batch=count).loss != step(fast, BATCH).loss


def test_07_labels_of_other_integers_mean_the_same():
    stock, fast = models()
    labels = BATCH["labels"].int()
    assert_close(fast(**(BATCH | {"labels": labels})).loss, stock(**BATCH).loss, 2e-6, "loss")


@pytest.mark.parametrize("name", ["llama", "bloom"])
def test_08_what_is_returned_has_the_columns_of_the_prompt(name):
    stock, fast = models(name, on_unsupported="fallback")
    asked = {"output_hidden_states": True, "output_attentions": True, "use_cache": True}
    for model in (stock, fast):
        model.get_base_model().set_attn_implementation("eager")
    expected, got = stock(**BATCH, **asked), fast(**BATCH, **asked)
    assert got.keys() == expected.keys()
    assert torch.equal(got.logits, expected.logits)
    assert got.logits.shape == (3, P + 8, VOCABULARY)
    for kind in ("hidden_states", "attentions"):
        assert all(torch.equal(*both) for both in zip(got[kind], expected[kind], strict=True)), kind
    assert got.hidden_states[0].shape[1] == P + 8
    assert got.past_key_values.get_seq_length() == expected.past_key_values.get_seq_length() == P + 8


def test_08_logits_of_the_fast_route_are_complete_and_of_one_type():
    stock, fast = models()
    expected, got = stock(**BATCH), fast(**BATCH)
    assert (got.logits.shape, got.logits.dtype) == (expected.logits.shape, expected.logits.dtype)
    real = real_columns(BATCH, P)
    assert_close(got.logits[real], expected.logits[real], 2e-5, "logits")


@pytest.mark.parametrize("wanted", [2, torch.tensor([0, 5])], ids=str)
def test_08_logits_to_keep_passes_through(wanted):
    stock, fast = models(on_unsupported="fallback")
    call = {"input_ids": BATCH["input_ids"], "logits_to_keep": wanted}
    assert torch.equal(fast(**call).logits, stock(**call).logits)


def test_08_return_dict_false_gives_a_tuple():
    stock, fast = models()
    expected, got = stock(**BATCH, return_dict=False), fast(**BATCH, return_dict=False)
    assert isinstance(got, tuple)
    assert isinstance(expected, tuple)
    real = real_columns(BATCH, P)
    assert_close(got[0], expected[0], 2e-6, "loss")
    assert_close(got[1][real], expected[1][real], 2e-5, "logits")


@pytest.mark.parametrize("name", ["llama", "mamba"])
def test_09_no_label_at_all_gives_zero_where_peft_gives_nan(name):
    """A deviation on purpose: NaN destroys the prompt at the next optimizer step."""
    stock, fast = models(name)
    batch = BATCH | {"labels": torch.full_like(BATCH["labels"], -100)}
    expected = step(stock, batch)
    assert torch.isnan(expected.loss)
    with pytest.warns(UserWarning, match="every label of this batch is -100") as caught:
        got = step(fast, batch)
    assert sum("every label" in str(w.message) for w in caught) == 1
    assert got.loss == 0
    assert got.grads.keys() == expected.grads.keys()
    assert all(not grad.any() for step in (got, expected) for grad in step.grads.values())


def test_09_texts_of_no_and_of_one_token_and_a_prompt_of_none_are_as_in_peft():
    stock, fast = models(on_unsupported="fallback")
    for length in (0, 1):
        ids = BATCH["input_ids"][:, :length]
        got, expected = fast(input_ids=ids).logits, stock(input_ids=ids).logits
        assert_close(got, expected, 2e-5, f"logits of {length} tokens")
        assert got.shape == (3, P + length, VOCABULARY)
    assert_same_step(fast, stock, {"input_ids": ids, "labels": ids})
    stock, fast = models(on_unsupported="fallback", num_virtual_tokens=0)
    assert torch.equal(fast(**BATCH).logits, stock(**BATCH).logits)


def test_09_labels_of_texts_without_tokens_are_no_labels():
    stock, fast = models()
    ids = BATCH["input_ids"][:, :0]
    assert torch.isnan(stock(input_ids=ids, labels=ids).loss)
    with pytest.warns(UserWarning, match="every label of this batch is -100"):
        assert fast(input_ids=ids, labels=ids).loss == 0


def test_10_embeddings_are_taken_and_win_over_ids():
    stock, fast = models()
    embeds = torch.randn(3, 8, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    alone = {name: BATCH[name] for name in ("attention_mask", "labels")} | {"inputs_embeds": embeds}
    assert_same_step(fast, stock, alone)
    assert_same_step(fast, stock, BATCH | alone)
    assert_close(step(fast, BATCH | alone).loss, step(stock, alone).loss, 2e-6, "loss")


def test_10_neither_ids_nor_embeddings_is_the_same_error():
    stock, fast = models()
    expected, got = outcome(stock, labels=BATCH["labels"]), outcome(fast, labels=BATCH["labels"])
    assert got.error == expected.error
    assert got.error[1].startswith("You have to provide either input_ids or inputs_embeds")


@pytest.mark.parametrize("name", ["llama", "mamba"])
@pytest.mark.parametrize("where", ["input_ids", "labels"])
@pytest.mark.parametrize("value", [VOCABULARY, -1])
def test_11_what_is_outside_of_the_vocabulary_fails_loudly(name, where, value):
    stock, fast = models(name)
    wrong = BATCH[where].clone()
    wrong[1, 6] = value
    expected, got = outcome(stock, **(BATCH | {where: wrong})), outcome(fast, **(BATCH | {where: wrong}))
    assert expected.error[0] is got.error[0] is IndexError
    assert f"{where}[1, 6] = {value}" in got.error[1]


@pytest.mark.parametrize("name", ["llama", "bloom", "mamba"])
@pytest.mark.parametrize("rows", [[1], [0, 1, 2]], ids=["one row", "all rows"])
def test_12_a_row_that_is_masked_out_is_finite(name, rows):
    stock, fast = models(name)
    mask = BATCH["attention_mask"].clone()
    mask[rows] = 0
    batch = BATCH | {"attention_mask": mask}
    assert torch.isfinite(fast(**batch).logits).all()
    assert_same_step(fast, stock, batch)


def compiled(model, *, fullgraph):
    """The model behind a compiler that makes no code, and the graphs that it was given."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    torch._dynamo.reset()
    return torch.compile(model, fullgraph=fullgraph, backend=backend), graphs


def compiled_step(model, **options):
    """One step of the compiled model, with the names that its parameters have without a compiler."""
    whole, graphs = compiled(model, **options)
    got = step(whole, BATCH)
    got.grads = {name.removeprefix("_orig_mod."): grad for name, grad in got.grads.items()}
    return got, graphs


def assert_is_step(got, expected):
    assert_close(got.loss, expected.loss, 2e-6, "loss")
    real = real_columns(BATCH, P)
    assert_close(got.logits[real], expected.logits[real], 2e-5, "logits")
    assert got.grads.keys() == expected.grads.keys()
    for name, grad in expected.grads.items():
        assert_close(got.grads[name], grad, 2e-5, f"gradient of {name}")


def shallow(on_unsupported):
    """Models of one layer, which compile quickly."""
    stock, fast = pair(one_layer())
    return stock, softprompt.patch(fast, on_unsupported=on_unsupported)


@functools.cache
def one_layer():
    return prompted("llama", num_hidden_layers=1)


def test_16_one_graph_without_breaks_is_that_of_peft():
    """The packed step cannot be part of a graph, so PEFT's forward is, with the usual warning."""
    stock, fast = shallow("fallback")
    expected, graphs = compiled_step(stock, fullgraph=True)
    assert len(graphs) == 1
    with pytest.warns(UserWarning, match="PEFT's own forward was used: torch.compile"):
        got, graphs = compiled_step(fast, fullgraph=True)
    assert len(graphs) == 1
    assert_is_step(got, expected)
    ((reason, count),) = softprompt.explain(fast).fallbacks
    assert count == 1
    assert "fullgraph=True" in reason


def test_16_a_plain_compile_leaves_the_packed_step_outside_of_graphs():
    stock, fast = shallow("error")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="softprompt")
        got, graphs = compiled_step(fast, fullgraph=False)
    assert graphs == []
    assert_is_step(got, step(stock, BATCH))
    assert not softprompt.explain(fast).fallbacks


def test_16_calls_that_peft_serves_are_compiled_as_without_the_patch():
    stock, fast = (model.eval() for model in shallow("fallback"))
    texts = {name: BATCH[name] for name in ("input_ids", "attention_mask")}
    whole, graphs = compiled(fast, fullgraph=False)
    with torch.no_grad():
        assert_close(whole(**texts).logits, stock(**texts).logits, 2e-5, "logits")
    assert len(graphs) == 1
    assert "the output holds a cache" in softprompt.explain(fast).fallbacks[0][0]


@pytest.mark.parametrize(
    "options, call",
    [
        ({"on_unsupported": "error"}, {}),
        ({"positions": "compact"}, {}),
        ({}, {"adapter_names": ["default"] * 3}),
    ],
    ids=["errors", "compact", "adapter_names"],
)
def test_16_one_graph_of_what_peft_cannot_do_is_an_error(options, call):
    _, fast = shallow("error")
    softprompt.patch(fast, **options)
    whole, graphs = compiled(fast, fullgraph=True)
    with pytest.raises(Exception, match="fullgraph=True") as raised:
        whole(**BATCH, **call)
    assert "UnsupportedModelError" in str(raised.value)
    assert graphs == []
