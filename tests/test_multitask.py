"""Rows of different adapters in one batch train each adapter as if it were alone."""

import copy

import pytest
import torch
from parity import assert_close, make_batch, prompt_of
from peft import MultitaskPromptTuningConfig, get_peft_model
from tiny_models import build, pair, prompt_config, prompted
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments, default_data_collator

import softprompt
from softprompt import multitask

LENGTHS = {"default": 4, "longer": 9, "third": 4}
NAMES = ["longer", "default", "longer", "default", "longer"]
BATCH_LENGTHS = (7, 3, 5, 6, 4)


def several(name="llama", dtype=torch.float64, lengths=LENGTHS):
    model = prompted(name, dtype)
    torch.manual_seed(5)
    for adapter, length in list(lengths.items())[1:]:
        model.add_adapter(adapter, prompt_config(model.get_base_model(), length))
    model.prompt_encoder.to(dtype)
    return model


def rows_of(batch, names, adapter):
    chosen = torch.tensor([name == adapter for name in names])
    return {key: value[chosen] for key, value in batch.items()}


@pytest.mark.parametrize("name", ["llama", "bloom", "gpt2", "gemma2", "mamba"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_each_adapter_gets_the_loss_and_the_gradient_of_its_rows_alone(name, side):
    same = {"default": 4, "longer": 4} if name == "mamba" else LENGTHS
    stock, fast = pair(several(name, lengths=same))
    softprompt.patch(fast, on_unsupported="error")
    batch = make_batch(BATCH_LENGTHS, side, "everywhere")
    got = multitask.losses(fast, **batch, adapter_names=NAMES)
    got.total.backward()
    assert list(got.each) == ["longer", "default"]
    for adapter, loss in got.each.items():
        stock.set_adapter(adapter)
        expected = stock(**rows_of(batch, NAMES, adapter)).loss
        expected.backward()
        assert_close(loss, expected.detach(), 2e-6, f"loss of {adapter}")
        assert_close(prompt_of(fast, adapter).grad, prompt_of(stock, adapter).grad, 2e-5, adapter)
    assert_close(got.total.detach(), sum(got.each.values()), 1e-12, "total")
    if "third" in same:
        assert prompt_of(fast, "third").grad is None


def test_recorded_steps_weigh_each_adapter_alike(tape):
    fast = softprompt.patch(several(), on_unsupported="error")
    eager = softprompt.patch(copy.deepcopy(fast), on_unsupported="error", cuda_graphs=False)
    for seed in range(4):
        batch = make_batch(BATCH_LENGTHS, "left", "everywhere", seed=seed)
        names = NAMES if seed < 2 else ["default", "longer", "longer", "longer", "longer"]
        results = []
        for model in (fast, eager):
            model.zero_grad(set_to_none=True)
            found = multitask.losses(model, **batch, adapter_names=names)
            found.total.backward()
            results.append(found)
        assert_close(results[0].total.detach(), results[1].total.detach(), 1e-12, "total")
        for adapter, loss in results[1].each.items():
            assert_close(results[0].each[adapter], loss, 1e-12, adapter)
            assert_close(prompt_of(fast, adapter).grad, prompt_of(eager, adapter).grad, 1e-6, adapter)
    assert fast._softprompt.runner.graphs.statistics.replayed >= 2
    assert eager._softprompt.runner.graphs.statistics.replayed == 0


@pytest.mark.parametrize("options", [{"positions": "compact"}, {"placement": "after_bos"}], ids=str)
def test_options_of_the_patch_hold(options):
    fast = several()
    fast.get_base_model().config.bos_token_id = 1
    softprompt.patch(fast, on_unsupported="error", **options)
    batch = make_batch(BATCH_LENGTHS, "left", "answer")
    first = (batch["attention_mask"] != 0).int().argmax(1, keepdim=True)
    batch["input_ids"] = batch["input_ids"].scatter(1, first, 1)
    got = multitask.losses(fast, **batch, adapter_names=NAMES)
    for adapter, loss in got.each.items():
        fast.set_adapter(adapter)
        assert_close(loss, fast(**rows_of(batch, NAMES, adapter)).loss.detach(), 2e-6, adapter)


def test_the_plain_loss_is_the_mean_over_all_labels():
    fast = softprompt.patch(several(), on_unsupported="error")
    batch = make_batch(BATCH_LENGTHS, "right", "everywhere")
    each = multitask.losses(fast, **batch, adapter_names=NAMES).each
    counts = {name: int((rows_of(batch, NAMES, name)["labels"] != -100).sum()) for name in each}
    expected = sum(each[name] * counts[name] for name in each) / sum(counts.values())
    loss = fast(**batch, adapter_names=NAMES).loss
    assert_close(loss.detach(), expected, 2e-6, "loss")
    assert abs(float(loss.detach() - sum(each.values()) / 2)) > 1e-3


def test_a_common_denominator_gives_each_adapter_its_gradient_with_that_denominator():
    fast = softprompt.patch(several(), on_unsupported="error")
    batch = make_batch(BATCH_LENGTHS, "right", "everywhere")
    fast(**batch, adapter_names=NAMES, num_items_in_batch=11).loss.backward()
    mixed = {name: prompt_of(fast, name).grad.clone() for name in ("longer", "default")}
    fast.zero_grad()
    for name, grad in mixed.items():
        fast.set_adapter(name)
        fast(**rows_of(batch, NAMES, name), num_items_in_batch=11).loss.backward()
        assert_close(prompt_of(fast, name).grad, grad, 2e-5, name)


def some_rows(count, seed):
    batch = make_batch(
        tuple(3 + (seed + n) % 5 for n in range(count)), "left", "everywhere", width=8, seed=seed
    )
    return [{key: value[n] for key, value in batch.items()} for n in range(count)]


def optimizer_of(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)


@pytest.mark.parametrize("recipe", ["adamw", "adafactor"])
def test_mixed_training_equals_the_training_of_each_task_alone(recipe):
    mixed, alone = pair(several(dtype=torch.float32))
    softprompt.patch(mixed, on_unsupported="error")
    tasks = {"default": some_rows(9, 1), "longer": some_rows(14, 2)}
    loader = DataLoader(
        multitask.mix(tasks),
        batch_size=4,
        shuffle=True,
        generator=torch.Generator().manual_seed(3),
        collate_fn=multitask.AdapterCollator(default_data_collator),
    )
    batches = [batch for _ in range(3) for batch in loader]
    # A batch of one task alone leaves the other one as it is.
    batches.insert(2, multitask.AdapterCollator(default_data_collator)([multitask.mix(tasks)[0]]))

    def optimizer(model):
        if recipe == "adamw":
            return optimizer_of(model)
        prompts = [p for p in model.parameters() if p.requires_grad]
        return torch.optim.Adafactor(prompts, lr=0.05, weight_decay=1e-5)

    steps, curves = optimizer(mixed), {name: [] for name in tasks}
    for batch in batches:
        found = multitask.losses(mixed, **batch)
        found.total.backward()
        steps.step()
        steps.zero_grad()
        for name, loss in found.each.items():
            curves[name].append(float(loss))
    for name in tasks:
        model = copy.deepcopy(alone)
        model.set_adapter(name)
        steps, curve = optimizer(model), []
        for batch in batches:
            names = batch["adapter_names"]
            if name not in names:
                continue
            own = rows_of({k: v for k, v in batch.items() if k != "adapter_names"}, names, name)
            loss = model(**own).loss
            loss.backward()
            steps.step()
            steps.zero_grad()
            curve.append(float(loss.detach()))
        assert curves[name] == pytest.approx(curve, rel=1e-4)
        assert_close(prompt_of(mixed, name), prompt_of(model, name), 1e-3, name)
        assert (prompt_of(model, name) - prompt_of(alone, name)).norm() > 0.1, "the prompt did not move"


class MixedTrainer(Trainer):
    """The Trainer with a mean for each adapter."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        total = multitask.losses(model, **inputs).total
        return (total, {"loss": total}) if return_outputs else total


def trainer_of(model, path, dataset, kind=Trainer, **options):
    arguments = TrainingArguments(
        output_dir=str(path),
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        learning_rate=2e-2,
        lr_scheduler_type="constant",
        max_grad_norm=0,
        max_steps=6,
        per_device_train_batch_size=4,
        logging_steps=1,
        save_strategy="no",
        seed=1,
        **({"remove_unused_columns": False} | options),
    )
    collate = multitask.AdapterCollator(default_data_collator)
    return kind(model, arguments, train_dataset=dataset, eval_dataset=dataset, data_collator=collate)


@pytest.mark.parametrize("kind", [Trainer, MixedTrainer])
@pytest.mark.parametrize("table", [False, True], ids=["dict rows", "datasets.Dataset"])
def test_the_trainer_trains_what_a_loop_trains(kind, table, tmp_path):
    by_hand, by_trainer = pair(several(dtype=torch.float32))
    for model in (by_hand, by_trainer):
        softprompt.patch(model, on_unsupported="error")
    rows = multitask.mix({"default": some_rows(9, 1), "longer": some_rows(7, 2)})
    if table:
        datasets = pytest.importorskip("datasets")
        plain = [{k: v if isinstance(v, str) else v.tolist() for k, v in row.items()} for row in rows]
        rows = datasets.Dataset.from_list(plain)
    trainer = trainer_of(by_trainer, tmp_path, rows, kind)
    batches = []
    collate = trainer.data_collator
    trainer.data_collator = lambda given: batches.append(collate(given)) or batches[-1]
    trainer.train()
    got = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    steps, expected = optimizer_of(by_hand), []
    steps.param_groups[0]["weight_decay"] = 0.0
    for batch in batches[:6]:
        if kind is Trainer:
            loss = by_hand(**batch).loss
        else:
            loss = multitask.losses(by_hand, **batch).total
        loss.backward()
        steps.step()
        steps.zero_grad()
        expected.append(float(loss.detach()))
    assert got == pytest.approx(expected, rel=1e-4)
    for name in ("default", "longer"):
        assert_close(prompt_of(by_trainer, name), prompt_of(by_hand, name), 1e-3, name)
    assert trainer.evaluate()["eval_loss"] > 0


def test_the_trainer_that_takes_the_column_away_is_told_so(tmp_path):
    model = softprompt.patch(several(dtype=torch.float32))
    rows = multitask.mix({"default": some_rows(4, 1), "longer": some_rows(4, 2)})
    with pytest.raises(ValueError, match=r"no column 'adapter'.*gets remove_unused_columns=False"):
        trainer_of(model, tmp_path, rows, remove_unused_columns=True).train()


def test_mixed_rows_are_those_of_the_data_sets_with_their_adapter():
    rows = multitask.mix({"a": [{"x": 1}, {"x": 2}], "b": ({"x": 3},)}, column="task")
    assert len(rows) == 3
    assert list(rows) == [{"x": 1, "task": "a"}, {"x": 2, "task": "a"}, {"x": 3, "task": "b"}]


def test_the_collator_carries_the_adapters_in_the_order_of_the_rows():
    rows = multitask.mix({"a": [{"x": 1}, {"x": 2}], "b": [{"x": 3}]}, column="task")
    collate = multitask.AdapterCollator(default_data_collator, column="task")
    batch = collate([rows[number] for number in (2, 0, 1)])
    assert batch["adapter_names"] == ["b", "a", "a"]
    assert batch["x"].tolist() == [3, 1, 2]
    assert set(batch) == {"x", "adapter_names"}


def test_tasks_and_adapters_go_together():
    base = build("llama")
    config = MultitaskPromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=4, num_tasks=3, token_dim=48, num_layers=1
    )
    torch.manual_seed(0)
    stock = get_peft_model(base, config)
    stock.add_adapter("other", config)
    stock.prompt_encoder.double()
    for parameter in stock.prompt_encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    stock, fast = pair(stock)
    softprompt.patch(fast, on_unsupported="error")
    batch, tasks = make_batch(BATCH_LENGTHS, labels="everywhere"), torch.tensor([0, 1, 2, 1, 0])
    names = ["other", "default", "other", "other", "default"]
    got = multitask.losses(fast, **batch, adapter_names=names, task_ids=tasks)
    got.total.backward()
    for adapter, loss in got.each.items():
        stock.set_adapter(adapter)
        expected = stock(**rows_of({**batch, "task_ids": tasks}, names, adapter)).loss
        expected.backward()
        assert_close(loss, expected.detach(), 2e-6, adapter)
    grads = {name: p.grad for name, p in fast.named_parameters()}
    for name, parameter in stock.named_parameters():
        if parameter.requires_grad:
            assert_close(grads[name], parameter.grad, 2e-5, name)


def test_an_adapter_without_labels_counts_nothing():
    fast = softprompt.patch(several(), on_unsupported="error")
    batch = make_batch(BATCH_LENGTHS, labels="everywhere")
    batch["labels"][torch.tensor([name == "default" for name in NAMES])] = -100
    found = multitask.losses(fast, **batch, adapter_names=NAMES)
    found.total.backward()
    assert float(found.each["default"]) == 0
    assert float(found.each["longer"]) > 0
    assert prompt_of(fast, "default").grad.norm() == 0


@pytest.mark.parametrize(
    "action, words",
    [
        (lambda: multitask.mix({}), "at least one data set, got none"),
        (lambda: multitask.mix({"a": []}), "data set of adapter 'a' is empty"),
        (lambda: multitask.mix({"a": [[1, 2]]}), "rows of adapter 'a' must be dicts, got list"),
        (lambda: multitask.mix({"a": [{"adapter": 1}]}), "have a column 'adapter' already"),
        (
            lambda: multitask.AdapterCollator(default_data_collator)([{"adapter": 3}]),
            "must hold names of adapters, got 3 in row 0",
        ),
        (
            lambda: multitask.losses(several(), **make_batch(), adapter_names=["default"] * 3),
            "takes a model that softprompt.patch has patched",
        ),
    ],
)
def test_bad_rows_are_refused(action, words):
    with pytest.raises(ValueError, match=words):
        action()


@pytest.mark.parametrize("recorded", [False, True])
def test_a_batch_without_labels_gives_a_warning_and_no_gradient(recorded, request):
    if recorded:
        request.getfixturevalue("tape")
    fast = softprompt.patch(several(), on_unsupported="error")
    batch = make_batch(labels="everywhere")
    names = ["longer", "default", "longer"]
    for _ in range(3):
        multitask.losses(fast, **batch, adapter_names=names)
    batch["labels"] = torch.full_like(batch["labels"], -100)
    for _ in range(3):
        with pytest.warns(UserWarning, match="every label of this batch is -100") as caught:
            found = multitask.losses(fast, **batch, adapter_names=names)
        assert caught[0].filename == __file__
        found.total.backward()
        assert float(found.total.detach()) == 0
        assert prompt_of(fast, "default").grad.norm() == 0


def test_bad_calls_are_refused():
    fast = softprompt.patch(several())
    batch = make_batch()
    with fast.disable_adapter(), pytest.raises(ValueError, match=r"inside of disable_adapter\(\)"):
        multitask.losses(fast, **batch, adapter_names=["default"] * 3)
    with pytest.raises(ValueError, match="one adapter for each of the 3 rows"):
        multitask.losses(fast, **batch, adapter_names=["default"])
    with pytest.raises(ValueError, match="unknown adapters other"):
        multitask.losses(fast, **batch, adapter_names=["default", "other", "default"])
    with pytest.raises(ValueError, match="needs labels, got none"):
        multitask.losses(fast, **{**batch, "labels": None}, adapter_names=["default"] * 3)
    batch["input_ids"][0, 1] = 97
    with pytest.raises(IndexError, match=r"input_ids\[0, 1\] = 97"):
        multitask.losses(fast, **batch, adapter_names=["default"] * 3)
