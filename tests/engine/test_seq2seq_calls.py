"""An encoder-decoder: what is refused or left to PEFT says why, and the Trainers notice nothing."""

import warnings

import pytest
import torch
from parity import assert_close, prompt_of
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from quantised_modules import FakeQuantizedLinear, Linear8bitLt, OneScale, replace_linears
from seq2seq_models import assert_same_answers, build, config_of, encoded, prompted, seq2seq_batch
from tiny_models import VOCABULARY, pair
from torch.utils.data import Dataset
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

import softprompt
from softprompt import ensemble, multitask
from softprompt.engine import plan_for
from softprompt.engine.lazy_logits import LazyLogits

BATCH = seq2seq_batch()


@pytest.fixture(scope="module")
def fast():
    return softprompt.patch(prompted("t5"), on_unsupported="error")


def test_explain_names_the_route_and_its_reason(fast):
    text = str(softprompt.explain(fast))
    assert (
        "route: padded (rows stay padded, since the encoder sees prompt and text of a row both ways" in text
    )
    assert "4 virtual tokens of 'default' (PROMPT_TUNING)" in text
    assert "columns that are pads in all rows: dropped at the end" in text
    assert "columns behind the last label: left out of the decoder where a call gives labels alone" in text
    assert "dropout" not in text
    assert "fused: the loss reads its weight on label rows" in text
    assert "PEFT's own: the encoder runs once for a call, prompt included" in text
    assert "rejected" not in text
    assert "prepend_prompt" in text


def test_explain_names_why_the_columns_behind_the_labels_are_kept():
    def said(model):
        return dict(softprompt.explain(model).details)["columns behind the last label"]

    trained = softprompt.patch(prompted("t5"))
    trained.get_base_model().get_decoder().final_layer_norm.weight.requires_grad_(True)
    assert said(trained) == "kept: weights of the decoder are trained"
    cached = "kept: a decoder of type t5gemma masks pads of its own accord, but where it keeps a cache"
    assert said(softprompt.patch(prompted("t5gemma"))) == cached
    padded = softprompt.patch(prompted("led", torch.float32))
    assert said(padded) == dict(softprompt.explain(padded).details)["columns that are pads in all rows"]


def test_explain_names_what_left_out_columns_mean_for_dropout():
    model = softprompt.patch(prompted("t5", dropout_rate=0.1))
    text = dict(softprompt.explain(model.train()).details)["dropout"]
    assert text == "columns that are left out draw no masks (same expectation, other numbers)"


@pytest.mark.parametrize(
    "make, reason",
    [
        (FakeQuantizedLinear, "round all tokens of the batch, pads included, with one scale"),
        (lambda linear: Linear8bitLt(linear, 4.0), "look for outliers among all tokens of the batch"),
        (OneScale, "numbers that stand out in pads change the other tokens (logits by "),
    ],
    ids=["one scale", "outliers", "one scale under another name"],
)
def test_layers_in_which_pads_change_the_tokens_keep_the_columns_of_pads(make, reason):
    stock, fast = pair(with_loud_pads(replace_linears(build("t5", torch.float32), make)))
    softprompt.patch(fast, on_unsupported="error")
    said = dict(softprompt.explain(fast).details)["columns that are pads in all rows"]
    assert said.startswith("kept: ")
    assert reason in said
    assert_same_answers(fast, stock, seq2seq_batch(width=20), 1e-5)


def with_loud_pads(base):
    """A PEFT model over a base whose first layer gets its largest number from a pad."""
    base.shared.weight[0] = 0
    base.shared.weight[0, 0] = 5.0
    return get_peft_model(base, config_of())


@pytest.mark.parametrize("logits", ["text", "labels"])
def test_every_choice_of_logits_gives_those_of_the_decoder(fast, logits):
    expected = fast(**BATCH).logits.detach() + 0
    with softprompt.patched(fast, logits=logits):
        assert_close(fast(**BATCH).logits.detach() + 0, expected, 1e-14, "logits")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"positions": "compact"}, r'positions="compact" needs the packed route: rows stay padded'),
        ({"placement": "after_bos"}, r'placement="after_bos" is for decoder-only models'),
    ],
)
def test_options_that_need_a_decoder_alone_are_refused_by_name(options, message):
    model = prompted("t5")
    with pytest.raises(softprompt.UnsupportedModelError, match=message):
        softprompt.patch(model, **options)
    assert not softprompt.explain(model).patched


def test_the_functional_form_refuses_an_encoder_decoder_by_name():
    ids = BATCH["input_ids"]
    with pytest.raises(
        softprompt.UnsupportedModelError, match=r"the encoder-decoder T5For.*softprompt\.patch"
    ):
        softprompt.forward(build("t5"), torch.zeros(4, 24), ids, labels=ids)


def test_what_shares_prompts_between_rows_refuses_an_encoder_decoder_by_name():
    model = softprompt.patch(prompted("t5"))
    model.add_adapter("other", config_of())
    ids = BATCH["input_ids"]
    for call in (
        lambda: multitask.losses(model, ids, labels=ids, adapter_names=["default"] * 3),
        lambda: ensemble.losses(model, ids, labels=ids),
    ):
        with pytest.raises(softprompt.UnsupportedModelError, match="encoder-decoder"):
            call()


STOCK = {
    "attentions": ({"output_attentions": True}, "output_attentions was asked for"),
    "a cache": ({"use_cache": True}, "use_cache=True was asked for"),
    "an encoder's output": ({"encoder_outputs": None}, "does not serve: encoder_outputs"),
    "no labels": (
        {"labels": None, "decoder_input_ids": BATCH["input_ids"]},
        "use_cache=False takes the fast",
    ),
}


@pytest.mark.parametrize("changes, reason", STOCK.values(), ids=STOCK)
def test_calls_that_peft_serves_say_why_once(changes, reason):
    stock, fast = pair(prompted("t5").eval())
    softprompt.patch(fast)
    if "encoder_outputs" in changes:
        embeds = torch.zeros(3, 13, 24, dtype=torch.float64)
        changes = {"encoder_outputs": stock.get_base_model().get_encoder()(inputs_embeds=embeds)}
    batch = BATCH | changes
    with pytest.warns(UserWarning, match=reason):
        got = fast(**batch)
    assert not isinstance(got.logits, LazyLogits)
    assert torch.equal(got.logits, stock(**batch).logits)
    assert reason in str(softprompt.explain(fast))
    with (
        softprompt.patched(fast, on_unsupported="error"),
        pytest.raises(softprompt.UnsupportedModelError, match=reason),
    ):
        fast(**batch)


@pytest.mark.parametrize("changes", [{"labels": None}, {"decoder_input_ids": BATCH["input_ids"]}], ids=list)
def test_multitask_prompts_of_the_decoder_need_labels_alone(changes):
    fast = softprompt.patch(encoded("multitask"), on_unsupported="error")
    with pytest.raises(softprompt.UnsupportedModelError, match="makes the decoder's inputs from the labels"):
        fast(**(BATCH | {"use_cache": False} | changes), task_ids=torch.tensor([0, 1, 2]))


@pytest.mark.parametrize("kind", [PrefixTuningConfig, LoraConfig])
def test_other_types_of_adapters_keep_pefts_forward(kind):
    options = {"target_modules": ["q"]} if kind is LoraConfig else {"num_virtual_tokens": 3}
    config = kind(task_type="SEQ_2_SEQ_LM", **options)
    fast = softprompt.patch(get_peft_model(build("t5"), config).double())
    with pytest.warns(UserWarning, match=f"is of type {config.peft_type.value}"):
        assert torch.isfinite(fast(**BATCH).loss)


def test_a_model_without_a_finite_loss_of_its_own_is_left_alone():
    model = prompted("t5")
    model.get_base_model().encoder.final_layer_norm.weight.fill_(float("nan"))
    with pytest.warns(UserWarning, match="own loss or prompt gradient is not finite"):
        softprompt.patch(model)
    assert softprompt.explain(model).route == "stock"


def test_without_its_adapters_the_model_is_the_base(fast):
    with fast.disable_adapter():
        got = fast(**BATCH)
    assert_close(got.logits, fast.get_base_model()(**BATCH).logits, 1e-14, "logits")


def changed(name, row, column, value):
    tensor = BATCH[name].clone()
    tensor[row, column] = value
    return {name: tensor}


WRONG = {
    "an id": (changed("input_ids", 1, 8, VOCABULARY), r"input_ids\[1, 8\] = 97 is outside", IndexError),
    "a label": (
        changed("labels", 2, 3, -5),
        r"labels\[2, 3\] = -5 is outside the vocabulary 0 .. 96",
        IndexError,
    ),
    "a decoder id": (
        {"decoder_input_ids": torch.full((3, 5), VOCABULARY)},
        r"decoder_input_ids\[0, 0\] = 97 is outside .*\(15 such values\)",
        IndexError,
    ),
    "labels of other rows": (
        {"labels": BATCH["labels"][:2]},
        r"labels must be \[3, T\] for 3 rows of text, got \[2, 5\]",
        ValueError,
    ),
    "labels of rank 1": ({"labels": BATCH["labels"][0]}, r"labels must be \[3, T\] .* got \[5\]", ValueError),
    "no column of labels": (
        {"labels": BATCH["labels"][:, :0]},
        r"labels must be .* got \[3, 0\]",
        ValueError,
    ),
    "float labels": ({"labels": torch.ones(3, 5)}, "labels must be integers, got torch.float32", ValueError),
    "labels in a list": ({"labels": [[1]]}, "labels must be a tensor, got list", ValueError),
    "decoder ids of another length": (
        {"decoder_input_ids": torch.ones(3, 4, dtype=torch.int64)},
        r"decoder_input_ids must be \[3, 5\] for 3 rows of text, got \[3, 4\]",
        ValueError,
    ),
    "both inputs of the decoder": (
        {"decoder_input_ids": BATCH["labels"], "decoder_inputs_embeds": torch.zeros(3, 5, 24)},
        "expected decoder_input_ids or decoder_inputs_embeds, got both",
        ValueError,
    ),
    "decoder embeddings of another width": (
        {"decoder_inputs_embeds": torch.zeros(3, 5, 7)},
        r"decoder_inputs_embeds must be \[3, 5, 24\] for 3 rows of text, got \[3, 5, 7\]",
        ValueError,
    ),
    "nothing for the decoder": (
        {"labels": None, "use_cache": False},
        "needs labels, decoder_input_ids or decoder_inputs_embeds; got none of them",
        ValueError,
    ),
    "a mask with the prompt": (
        {"attention_mask": torch.ones(3, 13)},
        r"attention_mask must be \[B, L\] = \[3, 9\], without the prompt",
        ValueError,
    ),
    "an unknown adapter": ({"adapter_names": ["x"] * 3}, "unknown adapters x", ValueError),
}


@pytest.mark.parametrize("changes, message, kind", WRONG.values(), ids=WRONG)
def test_what_does_not_fit_is_refused_before_the_model_runs(fast, changes, message, kind):
    calls = []
    handle = fast.get_base_model().get_encoder().register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(kind, match=message):
        fast(**(BATCH | changes))
    handle.remove()
    assert calls == []


def test_more_tokens_than_positions_are_refused_unless_they_are_dropped_pads():
    fast = softprompt.patch(prompted("bart"), on_unsupported="error")
    assert torch.isfinite(fast(**seq2seq_batch(width=80)).loss)
    with pytest.raises(
        ValueError, match="prompt and text are 84 tokens long, but the model has 64 positions"
    ):
        fast(**seq2seq_batch("left", width=80))
    with pytest.raises(ValueError, match="the decoder's input is 70 tokens long"):
        fast(**seq2seq_batch(answers=(70, 2, 3)))


class Rows(Dataset):
    """The rows of one batch."""

    def __len__(self):
        return len(BATCH["input_ids"])

    def __getitem__(self, index):
        return {name: value[index] for name, value in BATCH.items()}


@pytest.mark.parametrize("generates", [False, True])
def test_the_trainer_gives_the_losses_and_predictions_of_peft(generates, tmp_path):
    results = []
    for model in pair(prompted("t5", torch.float32)):
        if results:
            softprompt.patch(model, on_unsupported="error")
        model.generation_config.max_length = 6
        arguments = Seq2SeqTrainingArguments(
            str(tmp_path),
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            learning_rate=3e-2,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2 if generates else 1,
            max_steps=3,
            logging_steps=1,
            save_strategy="no",
            seed=1,
            predict_with_generate=generates,
        )
        trainer = Seq2SeqTrainer(model, arguments, train_dataset=Rows(), eval_dataset=Rows())
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        predicted = trainer.predict(Rows())
        results.append((losses, prompt_of(model).detach(), predicted))
    (expected, prompt, stock), (got, fast_prompt, fast) = results
    assert len(got) == 3
    assert got == pytest.approx(expected, rel=1e-4)
    assert_close(fast_prompt, prompt, 1e-3, "prompt")
    assert fast.metrics["test_loss"] == pytest.approx(stock.metrics["test_loss"], rel=1e-4)
    if generates:
        assert (fast.predictions == stock.predictions).all()
    else:
        for ours, theirs in zip(fast.predictions, stock.predictions, strict=True):
            assert ours.shape == theirs.shape
        assert_close(torch.tensor(fast.predictions[0]), torch.tensor(stock.predictions[0]), 1e-3, "logits")


@pytest.mark.slow
@pytest.mark.parametrize("fullgraph", [True, False])
def test_a_compiler_gets_the_forward_of_peft_only_where_the_graph_may_not_break(fullgraph):
    stock, fast = pair(prompted("bart", encoder_layers=1, decoder_layers=1))
    softprompt.patch(fast)
    losses, gradients = [], []
    for model in (stock, fast):
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=fullgraph, backend="eager")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            losses.append(compiled(**BATCH).loss)
        losses[-1].backward()
        gradients.append(prompt_of(model).grad)
    assert_close(losses[1], losses[0], 2e-6, "loss")
    assert_close(gradients[1], gradients[0], 2e-6, "gradient")
    reasons = [reason for reason, _ in softprompt.explain(fast).fallbacks]
    assert any("fullgraph=True" in reason for reason in reasons) == fullgraph


def test_weights_that_were_sharded_together_are_left_to_peft():
    plan = plan_for(build("t5"), encoder_decoder=True, sharded=True)
    assert plan.route == "stock"
    assert "sharded by fully_shard" in plan.reason


def test_what_tells_joined_texts_apart_is_left_out_as_pefts_forward_leaves_it(fast):
    ids = BATCH["input_ids"]
    again = (torch.arange(ids.shape[1]) % 3).expand(ids.shape)
    alone = {name: value for name, value in BATCH.items() if name != "attention_mask"}
    with pytest.warns(UserWarning, match="Position ids are not supported"):
        loss = fast(**alone, position_ids=again).loss
    assert torch.equal(loss, fast(**alone).loss)
