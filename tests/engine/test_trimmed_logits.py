"""`logits="text"` and `logits="labels"`: logits of the texts alone, right wherever a label is predicted."""

import copy
import warnings

import pytest
import torch
from parity import assert_close, make_batch, prompt_of
from tiny_models import pair, prompt_config, prompted
from torch.nn import functional
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

import softprompt

P = 4


def models(name="llama", dtype=torch.float64, **options):
    stock, fast = pair(prompted(name, dtype, num_virtual_tokens=P))
    return stock, softprompt.patch(fast, on_unsupported="error", **options)


def without_labels(batch):
    return {name: value for name, value in batch.items() if name != "labels"} | {"use_cache": False}


def predicting(mask):
    """[B, L] bool: columns that are tokens, or stand before one."""
    real = mask.bool()
    following = torch.cat([real[:, 1:], torch.zeros_like(real[:, :1])], 1)
    return real | following


@pytest.mark.parametrize("name", ["llama", "bloom", "gpt2", "gemma2", "mamba"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("labelled", [True, False])
def test_text_logits_are_those_of_peft_behind_the_prompt(name, side, labelled):
    stock, fast = models(name, logits="text")
    batch = make_batch(side=side, labels="everywhere")
    given = batch if labelled else without_labels(batch)
    expected = stock(**given).logits[:, P:]
    got = fast(**given).logits
    assert got.shape == expected.shape == (3, 8, 97)
    columns = predicting(batch["attention_mask"])
    assert_close(got.detach()[columns] + 0, expected.detach()[columns], 2e-5, "logits")


@pytest.mark.parametrize("name", ["llama", "bloom", "mamba"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("holes", [False, True])
def test_label_logits_give_the_loss_and_its_gradient(name, side, labelled, holes):
    stock, fast = models(name, logits="labels")
    batch = make_batch(side=side, labels="everywhere", holes=holes)
    batch["labels"] = batch["labels"].masked_fill(batch["attention_mask"] == 0, -100)
    expected = stock(**batch).loss
    expected.backward()
    logits = fast(**(batch if labelled else without_labels(batch))).logits
    loss = functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())
    loss.backward()
    assert_close(loss.detach(), expected.detach(), 2e-6, "loss")
    assert_close(prompt_of(fast).grad, prompt_of(stock).grad, 2e-5, "gradient")


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize("labelled", [True, False])
def test_label_logits_give_the_loss_without_pads_in_the_positions(side, holes, labelled):
    _, fast = models(logits="labels", positions="compact")
    batch = make_batch(side=side, labels="everywhere", holes=holes)
    batch["labels"] = batch["labels"].masked_fill(batch["attention_mask"] == 0, -100)
    logits = fast(**(batch if labelled else without_labels(batch))).logits
    loss = functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())
    assert_close(loss.detach(), fast(**batch).loss.detach(), 2e-6, "loss")


def test_prompts_of_different_lengths_have_no_columns():
    stock = prompted("llama")
    torch.manual_seed(5)
    stock.add_adapter("longer", prompt_config(stock.get_base_model(), 9))
    stock.prompt_encoder.double()
    fast = softprompt.patch(copy.deepcopy(stock), on_unsupported="error", logits="labels")
    batch = make_batch(labels="everywhere")
    got = fast(**batch, adapter_names=["longer", "default", "longer"]).logits.detach() + 0
    for row, (name, length) in enumerate((("longer", 9), ("default", 4))):
        stock.set_adapter(name)
        expected = stock(**{k: v[row : row + 1] for k, v in batch.items()}).logits[0, length - 1 : length + 7]
        real = batch["attention_mask"][row].bool()
        assert_close(got[row][real], expected.detach()[real], 2e-5, f"logits of row {row}")


@pytest.mark.parametrize("which, first", [("text", P), ("labels", P - 1)])
def test_logits_of_the_forward_of_peft_are_cut_too(which, first):
    stock, fast = pair(prompted("llama"))
    softprompt.patch(fast, logits=which)
    batch = make_batch(labels="everywhere")
    options = {"output_hidden_states": True}
    for given in (batch, {k: v for k, v in batch.items() if k != "labels"}):
        expected = stock(**given, **options).logits[:, first : first + 8]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert torch.equal(fast(**given, **options).logits, expected)
            as_tuple = fast(**given, **options, return_dict=False)
        assert torch.equal(as_tuple["labels" in given], expected)


def test_replayed_steps_have_the_same_logits(tape):
    stock, fast = models(logits="text")
    for seed in range(4):
        batch = make_batch(side="left", labels="everywhere", seed=seed)
        columns = predicting(batch["attention_mask"])
        expected = stock(**batch).logits[:, P:]
        got = fast(**batch).logits
        assert_close(got.detach()[columns] + 0, expected.detach()[columns], 2e-5, "logits")
    assert fast._softprompt.runner.graphs.statistics.replayed >= 2


def test_an_unknown_value_is_refused():
    with pytest.raises(ValueError, match="logits must be one of 'full', 'text', 'labels', got 'trimmed'"):
        softprompt.patch(prompted("llama"), logits="trimmed")


def test_explain_says_which_logits_there_are():
    assert "[B, L, V], without the prompt's ('text')" in str(softprompt.explain(models(logits="text")[1]))


DATA = make_batch((7, 3, 5, 6, 4, 7), "left", "everywhere")


class Rows(Dataset):
    """The rows of one batch."""

    def __len__(self):
        return len(DATA["input_ids"])

    def __getitem__(self, index):
        return {name: value[index] for name, value in DATA.items()}


def trainer_of(model, path, **options):
    metrics = options.pop("compute_metrics", None)
    loss = options.pop("compute_loss_func", None)
    arguments = TrainingArguments(
        output_dir=str(path),
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        learning_rate=3e-2,
        max_steps=4,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=4,
        logging_steps=1,
        save_strategy="no",
        **options,
    )
    return Trainer(
        model,
        arguments,
        train_dataset=Rows(),
        eval_dataset=Rows(),
        compute_metrics=metrics,
        compute_loss_func=loss,
    )


def smoothed(outputs, labels, num_items_in_batch=None):
    """What label smoothing is, with logits that stand at their labels."""
    total = functional.cross_entropy(
        outputs.logits.flatten(0, 1), labels.flatten(), label_smoothing=0.2, reduction="sum"
    )
    return total / (num_items_in_batch if num_items_in_batch is not None else (labels != -100).sum())


def smoothed_by_hand(stock, batches):
    """The same training of PEFT's model in a loop, on its full logits."""
    optimizer = torch.optim.AdamW([prompt_of(stock)], lr=3e-2)
    losses = []
    for number, batch in enumerate(batches):
        optimizer.param_groups[0]["lr"] = 3e-2 * (1 - number / len(batches))
        logits = stock(**without_labels(batch)).logits[:, P - 1 : -1]
        count = (batch["labels"] != -100).sum()
        loss = functional.cross_entropy(
            logits.flatten(0, 1), batch["labels"].flatten(), label_smoothing=0.2, reduction="sum"
        )
        (loss / count).backward()
        torch.nn.utils.clip_grad_norm_([prompt_of(stock)], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach() / count))
    return losses


@pytest.mark.parametrize(
    "name, option", [("llama", "label_smoothing_factor"), ("llama", "function"), ("bloom", "function")]
)
def test_label_smoothing_of_the_trainer_trains_on_the_smoothed_loss(name, option, tmp_path):
    stock, fast = models(name, torch.float32, logits="labels")
    options = {"compute_loss_func": smoothed} if option == "function" else {option: 0.2}
    trainer = trainer_of(fast, tmp_path, **options)
    batches = []

    def seen(module, args, kwargs):
        batches.append({key: kwargs[key].clone() for key in ("input_ids", "attention_mask")})

    handle = fast.register_forward_pre_hook(seen, with_kwargs=True)
    trainer.train()
    handle.remove()
    for batch in batches:  # the Trainer takes the labels out before the forward
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    expected = smoothed_by_hand(stock, batches)
    got = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert got == pytest.approx(expected, rel=1e-3)
    assert_close(prompt_of(fast), prompt_of(stock), 1e-2, "prompt")
    assert trainer.evaluate()["eval_loss"] == pytest.approx(sum(got) / len(got), rel=0.3)


def accuracy(logits, labels, shift):
    predicted = logits.argmax(-1)
    if shift:
        predicted, labels = predicted[:, :-1], labels[:, 1:]
    return {"accuracy": float((predicted == labels)[labels != -100].mean())}


@pytest.mark.parametrize("which", ["text", "labels"])
def test_compute_metrics_gets_predictions_that_fit_the_labels(which, tmp_path):
    stock, fast = models("llama", torch.float32, logits=which)
    with torch.no_grad():
        full = stock(**DATA).logits
    first = P if which == "text" else P - 1
    expected = accuracy(full[:, first : first + 8].numpy(), DATA["labels"].numpy(), which == "text")

    def metrics(prediction):
        assert prediction.predictions.shape[:2] == prediction.label_ids.shape
        return accuracy(prediction.predictions, prediction.label_ids, which == "text")

    found = trainer_of(fast, tmp_path, compute_metrics=metrics).evaluate()
    assert found["eval_accuracy"] == pytest.approx(expected["accuracy"])
    with torch.no_grad():
        assert found["eval_loss"] == pytest.approx(float(stock(**DATA).loss), rel=0.05)


@pytest.mark.parametrize("name", ["llama", "lfm2"])
@pytest.mark.parametrize("which", ["text", "labels"])
def test_texts_without_columns_have_no_logits(name, which):
    _, fast = models(name, logits=which)
    output = fast(input_ids=torch.zeros(2, 0, dtype=torch.int64), use_cache=False)
    assert output.logits.shape == (output.logits + 0).shape == (2, 0, 97)
