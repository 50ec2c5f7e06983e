"""A patched encoder-decoder gives PEFT's numbers, and computes the head for label rows only."""

import copy
import pickle
import warnings

import pytest
import torch
from marks import slow_unless
from parity import assert_close, prompt_of, step
from peft import PeftModel
from seq2seq_models import (
    ENCODERS,
    FAMILIES,
    KEEP_COLUMNS,
    QUICK_FAMILIES,
    assert_same_answers,
    build,
    config_of,
    encoded,
    prompted,
    seq2seq_batch,
)
from tiny_models import VOCABULARY, pair

import softprompt
from softprompt.engine import plan_for
from softprompt.engine.lazy_logits import LazyLogits
from softprompt.generation.call import CHUNKS_BEHIND_A_CACHE


@pytest.fixture(scope="module")
def models():
    stock, fast = pair(prompted("t5"))
    return stock, softprompt.patch(fast, on_unsupported="error")


@pytest.mark.parametrize("name", slow_unless(QUICK_FAMILIES, FAMILIES))
def test_every_family_takes_the_route_and_gives_the_numbers_of_peft(name):
    if name == "umt5" and not CHUNKS_BEHIND_A_CACHE:
        pytest.skip("transformers before 5.21: the self-check leaves it to PEFT")
    # LED's own gradient is NaN in fp64 where a row has pads.
    stock, fast = pair(prompted(name, torch.float32 if name == "led" else torch.float64))
    softprompt.patch(fast, on_unsupported="error")
    bound = {"t5gemma": 1e-6, "led": 1e-5}.get(name, 1e-12)  # t5gemma's rotary tables are fp32
    for side in ("right", "left"):
        assert_same_answers(fast, stock, seq2seq_batch(side), bound)
    plan = plan_for(fast.get_base_model(), encoder_decoder=True)
    assert plan.route == "padded"
    assert plan.fused_head
    assert plan.rejected == ()
    assert plan.trims == (name not in KEEP_COLUMNS)


def test_t5gemma_masks_pads_of_its_decoder_as_with_peft_in_training_too():
    stock, fast = pair(prompted("t5gemma").train())
    softprompt.patch(fast, on_unsupported="error")
    assert_same_answers(fast, stock, seq2seq_batch(), 1e-6)


@pytest.mark.parametrize("side", ["right", "left"])
def test_what_the_encoder_gives_is_given_too_with_zeros_where_nobody_looks(models, side):
    batch = seq2seq_batch(side)
    stock, fast = (model(**batch).encoder_last_hidden_state.detach() + 0 for model in models)
    assert fast.shape == stock.shape
    seen = torch.cat([torch.ones(3, 4), batch["attention_mask"]], 1).bool()
    assert_close(fast[seen], stock[seen], 1e-12, "encoder's hidden states")


def test_columns_that_no_row_uses_do_not_reach_the_encoder(models):
    _, fast = models
    lengths = []
    handle = (
        fast.get_base_model()
        .get_encoder()
        .register_forward_pre_hook(
            lambda module, args, kwargs: lengths.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
        )
    )
    for side in ("right", "left"):
        fast(**seq2seq_batch(side, width=20))
    handle.remove()
    assert lengths == [4 + 7, 4 + 20]


def test_the_head_computes_label_rows_only_until_someone_looks(models, monkeypatch):
    _, fast = models
    head = fast.get_base_model().get_output_embeddings()
    rows = []
    own = type(head).forward

    def counted(self, hidden):
        if self is head:
            rows.append(hidden.shape[:-1].numel())
        return own(self, hidden)

    monkeypatch.setattr(type(head), "forward", counted)
    fast(**seq2seq_batch())  # checks the route again, as code of the model has changed
    rows.clear()
    output = fast(**seq2seq_batch())
    output.loss.backward()
    assert isinstance(output.logits, LazyLogits)
    assert not output.logits.is_materialized
    assert sum(rows) == 0
    assert output.logits.argmax(-1).shape == (3, 5)
    assert sum(rows) == 15


def test_logits_carry_a_gradient_to_the_prompt(models):
    grads = []
    for model in models:
        model.zero_grad()
        logits = model(**seq2seq_batch()).logits
        torch.log_softmax(logits, -1)[:, :, 5].sum().backward()
        grads.append(prompt_of(model).grad.clone())
    assert_close(grads[1], grads[0], 1e-12, "gradient")


@pytest.mark.parametrize("submodules", [1, 2])
def test_the_half_of_the_prompt_that_peft_leaves_alone_has_no_gradient(submodules):
    stock, fast = pair(prompted("t5", config=config_of(num_transformer_submodules=submodules)))
    softprompt.patch(fast, on_unsupported="error")
    assert_same_answers(fast, stock, seq2seq_batch())
    grad = prompt_of(fast).grad
    assert grad.shape == (4 * submodules, 24)
    assert grad[:4].abs().sum() > 0
    assert grad[4:].abs().sum() == 0


def without(*names):
    return {name: value for name, value in seq2seq_batch().items() if name not in names}


def with_embeds(model):
    return {**without("input_ids"), "inputs_embeds": model.word_embeddings(seq2seq_batch()["input_ids"])}


IDS = torch.arange(3, 18).view(3, 5)
CALLS = {
    "no mask": lambda model: without("attention_mask"),
    "embeddings": with_embeds,
    "decoder ids beside labels": lambda model: seq2seq_batch() | {"decoder_input_ids": IDS},
    "decoder embeddings": lambda model: (
        seq2seq_batch() | {"decoder_inputs_embeds": model.word_embeddings(IDS)}
    ),
    "a mask of the decoder": lambda model: (
        seq2seq_batch() | {"decoder_attention_mask": (IDS % 3 != 1).long()}
    ),
    "a row of pads": lambda model: (
        seq2seq_batch() | {"attention_mask": torch.tensor([[1], [0], [1]]).expand(3, 9)}
    ),
    "pads alone": lambda model: seq2seq_batch() | {"attention_mask": torch.zeros(3, 9)},
    "one label": lambda model: seq2seq_batch(answers=(1, 1, 0)),
    "num_items_in_batch": lambda model: seq2seq_batch() | {"num_items_in_batch": torch.tensor(40)},
    "no cache": lambda model: seq2seq_batch() | {"use_cache": False},
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_the_arguments_of_the_decoder_and_of_the_encoder_are_served(models, call):
    stock, fast = models
    assert_same_answers(fast, stock, call(stock))


def test_the_denominator_of_a_loss_that_knows_it_is_kept():
    stock, fast = pair(prompted("t5gemma"))
    softprompt.patch(fast, on_unsupported="error")
    assert plan_for(fast.get_base_model(), encoder_decoder=True).counts_items
    assert_same_answers(fast, stock, seq2seq_batch() | {"num_items_in_batch": torch.tensor(40)}, 1e-6)


def test_a_call_without_labels_gives_logits(models):
    batch = without("labels") | {"decoder_input_ids": IDS, "use_cache": False}
    stock, fast = (model(**batch) for model in models)
    assert fast.loss is None
    assert isinstance(fast.logits, LazyLogits)
    assert_close(fast.logits.detach() + 0, stock.logits.detach(), 1e-12, "logits")


def test_tuples_hold_what_peft_gives_without_a_cache(models):
    batch = seq2seq_batch(side="left") | {"use_cache": False, "return_dict": False}
    stock, fast = (model(**batch) for model in models)
    assert len(fast) == len(stock) == 3
    for got, expected in zip(fast, stock, strict=True):
        assert_close(got.detach() + 0, expected.detach(), 1e-12, "item")


def test_a_configuration_that_asks_for_tuples_gets_them():
    stock, fast = pair(prompted("t5"))
    for model in (stock, fast):
        model.get_base_model().config.return_dict = False
    softprompt.patch(fast, on_unsupported="error")
    batch = seq2seq_batch(side="left")
    assert_close(fast(**batch)[0].detach(), stock(**batch, return_dict=True).loss.detach(), 1e-12, "loss")


def test_a_batch_without_labels_has_the_loss_0_and_one_warning(models):
    _, fast = models
    fast.zero_grad()
    with pytest.warns(UserWarning, match="every label of this batch is -100"):
        loss = fast(**seq2seq_batch(answers=(0, 0, 0))).loss
    assert float(loss.detach()) == 0
    loss.backward()
    assert prompt_of(fast).grad.abs().sum() == 0


def test_dropout_is_drawn_as_peft_draws_it_unless_columns_are_dropped():
    stock, fast = pair(prompted("t5", dropout_rate=0.3).train())
    softprompt.patch(fast, on_unsupported="error")
    losses = []
    for model in (stock, fast):
        torch.manual_seed(5)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            losses.append(model(**seq2seq_batch(width=7)).loss.detach())
    assert_close(losses[1], losses[0], 1e-12, "loss")
    with pytest.warns(UserWarning, match=r"pads that all rows have, .* are left out and draw no masks"):
        fast(**seq2seq_batch(width=9))


def test_gradient_checkpointing_changes_nothing():
    stock, fast = pair(prompted("t5").train())
    for model in (stock, fast):
        model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    softprompt.patch(fast, on_unsupported="error")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_same_answers(fast, stock, seq2seq_batch() | {"use_cache": False})


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_autocast_gives_the_dtypes_of_peft(name):
    stock, fast = pair(prompted(name, torch.float32))
    softprompt.patch(fast, on_unsupported="error")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, got = step(stock, seq2seq_batch()), step(fast, seq2seq_batch())
    assert got.logits.dtype == expected.logits.dtype
    assert_close(got.loss.float(), expected.loss.float(), 2e-2, "loss")
    assert_close(
        got.grads["prompt_encoder.default.embedding.weight"].float(), prompt_of(stock).grad, 0.1, "grad"
    )


@pytest.mark.parametrize("kind", ["adapter", "hook", "bias"])
def test_a_head_that_is_no_plain_weight_is_called_for_the_label_rows(kind):
    model = prompted("t5")
    base = model.get_base_model()
    if kind == "adapter":
        base.lm_head.register_forward_hook(lambda module, args, output: output * 1.5)
    elif kind == "hook":
        base.lm_head.register_forward_pre_hook(lambda module, args: (args[0] + 0.1,))
    else:
        bias = torch.nn.Parameter(torch.linspace(-1, 1, VOCABULARY, dtype=torch.float64), requires_grad=False)
        base.lm_head.bias = bias
    stock, fast = pair(model)
    softprompt.patch(fast, on_unsupported="error")
    assert not plan_for(fast.get_base_model(), encoder_decoder=True).fused_head
    assert_same_answers(fast, stock, seq2seq_batch())


def test_a_quantised_base_keeps_its_own_head():
    quantization = pytest.importorskip("torchao.quantization")
    stock = prompted("t5-1.1", torch.float32)
    quantization.quantize_(stock.get_base_model(), quantization.Int8WeightOnlyConfig())
    stock, fast = pair(stock)
    softprompt.patch(fast, on_unsupported="error")
    assert "Int8Tensor" in str(softprompt.explain(fast))
    assert_same_answers(fast, stock, seq2seq_batch(), 1e-5)


def test_rows_of_adapters_of_several_lengths_equal_each_adapter_alone():
    stock = prompted("t5")
    stock.add_adapter("long", config_of(num_virtual_tokens=6))
    stock.prompt_encoder.double()
    fast = softprompt.patch(copy.deepcopy(stock), on_unsupported="error")
    for side in ("right", "left"):
        batch = seq2seq_batch(side)
        stock.zero_grad()
        for row, name in ((0, "default"), (1, "long"), (2, "default")):
            stock.set_adapter(name)
            one = {key: value[row : row + 1] for key, value in batch.items()}
            counted = int((one["labels"] != -100).sum())
            (stock(**one).loss * counted).backward()
        fast.zero_grad()
        names = ["default", "long", "default"]
        (fast(**batch, adapter_names=names).loss * int((batch["labels"] != -100).sum())).backward()
        for name in ("default", "long"):
            assert_close(
                prompt_of(fast, name).grad, prompt_of(stock, name).grad, 1e-12, f"gradient of {name}"
            )


def tasks_of(kind):
    return {"task_ids": torch.tensor([2, 0, 2])} if "multitask" in kind else {}


@pytest.mark.parametrize("name", ["t5", "mbart"])
@pytest.mark.parametrize("kind", ENCODERS)
def test_p_tuning_and_multitask_prompt_tuning_reach_all_parameters(kind, name):
    stock, fast = pair(encoded(kind, name))
    softprompt.patch(fast, on_unsupported="error")
    assert_same_answers(fast, stock, seq2seq_batch(), **tasks_of(kind))


GENERATE = {"max_new_tokens": 5, "do_sample": False, "min_new_tokens": 5}


@pytest.mark.parametrize("kind", [None, *ENCODERS])
def test_generate_gives_the_tokens_of_peft(kind):
    stock, fast = pair(prompted("t5") if kind is None else encoded(kind))
    softprompt.patch(fast, on_unsupported="error")
    batch = without("labels")
    options = {**GENERATE, **({} if kind is None else tasks_of(kind))}
    assert torch.equal(fast.generate(**batch, **options), stock.generate(**batch, **options))
    assert "prepare_inputs_for_generation" not in fast.get_base_model().__dict__


def test_generate_serves_rows_of_several_adapters():
    stock = prompted("t5")
    stock.add_adapter("long", config_of(num_virtual_tokens=6))
    stock.prompt_encoder.double()
    fast = softprompt.patch(copy.deepcopy(stock))
    batch = without("labels")
    options = GENERATE | {"return_dict_in_generate": True, "output_logits": True}
    mixed = fast.generate(**batch, **options, adapter_names=["long", "default", "long"])
    for row, name in enumerate(("long", "default", "long")):
        stock.set_adapter(name)
        one = {key: value[row : row + 1] for key, value in batch.items()}
        alone = stock.generate(**one, **options)
        assert torch.equal(mixed.sequences[row], alone.sequences[0])
        assert_close(mixed.logits[0][row], alone.logits[0][0], 1e-12, "logits")


def test_adapter_files_go_both_ways(tmp_path):
    trained = softprompt.patch(prompted("t5"), on_unsupported="error")
    trained.save_pretrained(tmp_path)
    stock, fast = (PeftModel.from_pretrained(build("t5"), str(tmp_path)) for _ in range(2))
    for model in (stock, fast):
        model.prompt_encoder.double()
    softprompt.patch(fast, on_unsupported="error")
    assert_same_answers(fast, stock, seq2seq_batch())
    assert torch.equal(prompt_of(fast), prompt_of(trained))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_and_pickles_stay_patched(models, copied):
    stock, fast = models
    twin = copied(fast)
    assert type(twin) is type(fast)
    assert_same_answers(twin, stock, seq2seq_batch())


def test_unpatching_takes_everything_back():
    stock, fast = pair(prompted("t5"))
    softprompt.unpatch(softprompt.patch(fast))
    assert type(fast) is type(stock)
    assert fast.__dict__.keys() == stock.__dict__.keys()
    assert not isinstance(fast(**seq2seq_batch()).logits, LazyLogits)
