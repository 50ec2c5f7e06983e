"""`placement="after_bos"`: the prompt behind the first token of each text, compared with the model itself on
`[BOS | prompt | text]`.
"""

import copy

import pytest
import torch
from parity import assert_close, make_batch, prompt_of, relative_error, step
from peft import MultitaskPromptTuningConfig, get_peft_model
from tiny_models import build, pair, prompt_config, prompted

import softprompt
from softprompt.eligibility import adapter_obstacle

BOS, P = 1, 4
NAMES = ["llama", "bloom", "gpt2", "opt", "gemma2", "mamba"]


def begun(batch):
    """The batch with BOS at the first real token of each row."""
    first = (batch["attention_mask"] != 0).int().argmax(1, keepdim=True)
    batch["input_ids"] = batch["input_ids"].scatter(1, first, BOS)
    if "labels" in batch:
        batch["labels"] = batch["labels"].scatter(1, first, -100)
    return batch


def models(name="llama", dtype=torch.float64, **options):
    stock = prompted(name, dtype, num_virtual_tokens=P)
    stock.get_base_model().config.bos_token_id = BOS
    stock, fast = pair(stock)
    return stock, softprompt.patch(fast, on_unsupported="error", placement="after_bos", **options)


def behind_bos(stock, batch, prompt=None):
    """Embeddings, mask and labels of `[BOS | prompt | everything else of the row in its order]`."""
    prompt = prompt_of(stock) if prompt is None else prompt
    embeds = stock.get_base_model().get_input_embeddings()(batch["input_ids"])
    rows = []
    for row, mask in enumerate(batch["attention_mask"]):
        first = int(mask.nonzero()[0])
        rest = [column for column in range(len(mask)) if column != first]
        labels = batch.get("labels", torch.full_like(batch["input_ids"], -100))
        rows.append(
            (
                torch.cat([embeds[row, first : first + 1], prompt, embeds[row, rest]]),
                torch.cat([torch.ones(1 + P, dtype=torch.int64), mask[rest]]),
                torch.cat([torch.full((1 + P,), -100), labels[row, rest]]),
            )
        )
    embeds, mask, labels = (torch.stack(parts) for parts in zip(*rows, strict=True))
    return {"inputs_embeds": embeds, "attention_mask": mask, "labels": labels, "use_cache": False}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_loss_logits_and_gradient_are_those_of_the_model_itself(name, side):
    stock, fast = models(name)
    batch = begun(make_batch(side=side, labels="everywhere"))
    given = behind_bos(stock, batch)
    expected = stock.get_base_model()(**given)
    expected.loss.backward()
    got = step(fast, batch)
    assert_close(got.loss, expected.loss.detach(), 2e-6, "loss")
    assert_close(prompt_of(fast).grad, prompt_of(stock).grad, 2e-5, "gradient")
    assert got.logits.shape == expected.logits.shape
    real = given["attention_mask"].bool()
    assert_close(got.logits[real], expected.logits.detach()[real], 2e-5, "logits")


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_compact_positions_give_the_rows_without_padding(name, side):
    stock, fast = models(name, positions="compact")
    batch = begun(make_batch(side=side, labels="everywhere"))
    count = int((batch["labels"] != -100).sum())
    loss = 0
    for row, mask in enumerate(batch["attention_mask"].bool()):
        alone = {key: value[row : row + 1, mask] for key, value in batch.items()}
        part = stock.get_base_model()(**behind_bos(stock, alone), num_items_in_batch=count).loss
        part.backward()
        loss = loss + part.detach()
    assert_close(step(fast, batch).loss, loss, 2e-6, "loss")
    assert_close(prompt_of(fast).grad, prompt_of(stock).grad, 2e-5, "gradient")


def test_it_is_another_place_than_in_front():
    stock, fast = models()
    batch = begun(make_batch(labels="everywhere"))
    in_front = step(stock, batch).loss
    assert relative_error(step(fast, batch).loss, in_front) > 1e-2
    softprompt.patch(fast, on_unsupported="error")
    assert_close(step(fast, batch).loss, in_front, 2e-6, "loss of the placement in front")


def test_a_label_on_bos_does_not_count():
    _, fast = models()
    batch = begun(make_batch(side="left", labels="everywhere"))
    expected = step(fast, batch).loss
    batch["labels"] = torch.where(batch["attention_mask"] == 1, batch["input_ids"], -100)
    assert torch.equal(step(fast, batch).loss, expected)


@pytest.mark.parametrize("which, first", [("text", P), ("labels", P - 1)])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("labelled", [True, False])
def test_logits_of_the_texts_stand_at_their_labels(which, first, side, labelled):
    stock, fast = models(logits=which)
    batch = begun(make_batch(side=side, labels="everywhere"))
    expected = stock.get_base_model()(**behind_bos(stock, batch)).logits.detach()[:, first : first + 8]
    given = batch if labelled else {**batch, "labels": None, "use_cache": False}
    got = fast(**given).logits.detach()
    assert got.shape == (3, 8, 97)
    predicted = batch["labels"] != -100
    if which == "text":
        predicted = torch.cat([predicted[:, 1:], torch.zeros_like(predicted[:, :1])], 1)
    assert_close(got[predicted], expected[predicted], 2e-5, "logits")


def test_rows_may_differ_in_their_prompt():
    stock, fast = models()
    for model in (stock, fast):
        torch.manual_seed(5)
        model.add_adapter("other", prompt_config(model.get_base_model(), P))
        model.prompt_encoder.double()
    batch = begun(make_batch(labels="everywhere"))
    names = ["other", "default", "other"]
    got = step(fast, batch, adapter_names=names, num_items_in_batch=7)
    loss = 0
    for row, name in enumerate(names):
        one = {key: value[row : row + 1] for key, value in batch.items()}
        given = behind_bos(stock, one, prompt_of(stock, name))
        part = stock.get_base_model()(**given, num_items_in_batch=7).loss
        part.backward()
        loss = loss + part.detach()
    assert_close(got.loss, loss, 2e-6, "loss")
    for name in ("default", "other"):
        assert_close(prompt_of(fast, name).grad, prompt_of(stock, name).grad, 2e-5, name)


def test_tasks_of_an_encoder_stand_there_too():
    base = build("llama")
    config = MultitaskPromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=P, num_tasks=3, token_dim=48, num_layers=1
    )
    torch.manual_seed(0)
    stock = get_peft_model(base, config).double()
    for parameter in stock.prompt_encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    stock, fast = pair(stock)
    softprompt.patch(fast, on_unsupported="error", placement="after_bos")
    batch, tasks = begun(make_batch(labels="everywhere")), torch.tensor([2, 0, 2])
    prompts = stock.get_prompt(3, task_ids=tasks)
    loss = 0
    for row in range(3):
        one = {key: value[row : row + 1] for key, value in batch.items()}
        loss = (
            loss + stock.get_base_model()(**behind_bos(stock, one, prompts[row]), num_items_in_batch=5).loss
        )
    loss.backward()
    got = step(fast, batch, task_ids=tasks, num_items_in_batch=5)
    assert_close(got.loss, loss.detach(), 2e-6, "loss")
    for name, parameter in stock.named_parameters():
        if parameter.requires_grad:
            assert_close(got.grads[name], parameter.grad, 2e-5, name)


def test_recorded_steps_hold_the_bos_token(tape):
    stock, fast = models()
    for seed in range(4):
        batch = begun(make_batch(side="left", labels="everywhere", seed=seed))
        stock.zero_grad(set_to_none=True)
        expected = stock.get_base_model()(**behind_bos(stock, batch)).loss
        expected.backward()
        assert_close(step(fast, batch).loss, expected.detach(), 2e-6, "loss")
        assert_close(prompt_of(fast).grad, prompt_of(stock).grad, 2e-5, "gradient")
    assert fast._softprompt.runner.graphs.statistics.replayed >= 2


def test_a_trainable_embedding_gets_the_gradient_of_the_bos_token():
    stock, fast = models()
    for model in (stock, fast):
        model.get_base_model().get_input_embeddings().weight.requires_grad_(True)
    batch = begun(make_batch(labels="everywhere"))
    stock.get_base_model()(**behind_bos(stock, batch)).loss.backward()
    step(fast, batch)
    grads = [model.get_base_model().get_input_embeddings().weight.grad for model in (stock, fast)]
    assert grads[0][BOS].norm() > 0
    assert_close(grads[1], grads[0], 2e-5, "gradient of the embedding")


def test_texts_of_nothing_but_bos_have_a_loss_of_zero():
    _, fast = models()
    batch = {"input_ids": torch.tensor([[BOS], [BOS]]), "labels": torch.tensor([[5], [6]])}
    with pytest.warns(UserWarning, match="every label of this batch is -100"):
        output = fast(**batch)
    assert float(output.loss) == 0
    assert output.logits.shape == (2, P + 1, 97)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_generate_puts_the_prompt_there_too(name, side):
    stock, fast = models(name, torch.float32)
    batch = begun(make_batch((5, 5) if side == "right" else (7, 3, 5), side, None))
    got = fast.generate(**batch, max_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=None)
    with torch.no_grad():
        ids, mask = batch["input_ids"], batch["attention_mask"]
        if side == "right":
            ids, mask = ids[:, :5], mask[:, :5]
            got = fast.generate(input_ids=ids, max_new_tokens=5, do_sample=False, eos_token_id=None)
        for _ in range(5):
            given = behind_bos(stock, {"input_ids": ids, "attention_mask": mask})
            following = stock.get_base_model()(**given).logits[:, -1:].argmax(-1)
            ids, mask = torch.cat([ids, following], 1), torch.cat([mask, torch.ones_like(following)], 1)
    assert torch.equal(got, ids)


def test_generate_without_a_cache_and_with_beams_agree_with_themselves():
    _, fast = models(dtype=torch.float32)
    batch = begun(make_batch(side="left", labels=None))
    options = {"max_new_tokens": 5, "do_sample": False, "num_beams": 3, "eos_token_id": None}
    assert torch.equal(fast.generate(**batch, **options), fast.generate(**batch, **options, use_cache=False))


@pytest.mark.parametrize(
    "ids, mask, words",
    [
        ([[1, 5, 6], [4, 5, 6]], None, r"BOS token 1, but row 1 begins with token 4 \(1 of 2 rows\)"),
        ([[9, 5, 6], [1, 5, 6]], [[1, 1, 1], [0, 1, 1]], r"row 0 begins with token 9 \(2 of 2 rows\)"),
        ([[1, 5, 6], [1, 5, 6]], [[1, 1, 1], [0, 0, 0]], r"row 1 begins with no token at all"),
        ([[], []], None, r"every row must begin with the BOS token 1, got no tokens"),
    ],
)
def test_rows_that_do_not_begin_with_bos_are_refused(ids, mask, words):
    _, fast = models()
    mask = None if mask is None else torch.tensor(mask)
    with pytest.raises(ValueError, match=words):
        fast(input_ids=torch.tensor(ids, dtype=torch.int64), attention_mask=mask, use_cache=False)
    if mask is None and len(ids[0]):
        with pytest.raises(ValueError, match=words):
            fast.generate(input_ids=torch.tensor(ids), max_new_tokens=2)


def test_embeddings_in_place_of_ids_are_refused():
    _, fast = models()
    with pytest.raises(ValueError, match="looks for the BOS token and needs input_ids, not inputs_embeds"):
        fast(inputs_embeds=torch.randn(2, 3, 48, dtype=torch.float64), use_cache=False)


def test_ids_out_of_range_are_named_in_the_column_that_was_given():
    _, fast = models()
    batch = begun(make_batch(labels="everywhere"))
    batch["input_ids"][1, 2] = 97
    with pytest.raises(IndexError, match=r"input_ids\[1, 2\] = 97 is outside the vocabulary"):
        fast(**batch)


def test_a_model_without_bos_is_refused():
    model = prompted("qwen2")
    model.get_base_model().config.bos_token_id = None
    with pytest.raises(ValueError, match="needs a model whose configuration has a bos_token_id, got None"):
        softprompt.patch(model, placement="after_bos")
    with pytest.raises(ValueError, match="placement must be one of 'prefix', 'after_bos', got 'suffix'"):
        softprompt.patch(model, placement="suffix")


def test_calls_that_only_peft_serves_are_refused():
    stock, _ = models()
    fast = softprompt.patch(copy.deepcopy(stock), placement="after_bos")
    words = r'placement="after_bos" has no stock forward to fall back to: output_hidden_states'
    with pytest.raises(softprompt.UnsupportedModelError, match=words):
        fast(**begun(make_batch()), output_hidden_states=True)


def test_pads_on_the_left_are_refused_where_generate_would_count_them():
    _, fast = models(dtype=torch.float32, positions="compact")
    batch = begun(make_batch(side="left", labels=None))
    with pytest.raises(ValueError, match="generates from texts without pads on the left"):
        fast.generate(**batch, max_new_tokens=2)


def test_unpatch_and_disable_adapter_take_it_back():
    stock, fast = models()
    batch = begun(make_batch(labels="everywhere"))
    with fast.disable_adapter(), stock.disable_adapter():
        assert torch.equal(fast(**batch).loss, stock(**batch).loss)
    softprompt.unpatch(fast)
    options = {"max_new_tokens": 3, "do_sample": False}
    ids = batch["input_ids"][:, :3]
    assert torch.equal(fast.generate(input_ids=ids, **options), stock.generate(input_ids=ids, **options))
    assert torch.equal(step(fast, batch).loss, step(stock, batch).loss)


def test_what_serves_no_placement_is_told_so():
    obstacle = adapter_obstacle(models()[1], ["default"])
    assert obstacle == 'the model is patched with placement="after_bos", which only forward serves'


def test_explain_says_where_the_prompt_stands():
    assert "behind the BOS token of each text" in str(softprompt.explain(models()[1]))


@pytest.mark.parametrize(
    "options, what",
    [
        ({"prompt_lookup_num_tokens": 2}, "assisted decoding"),
        ({"prefill_chunk_size": 4}, "prefill_chunk_size"),
        ({"cache_implementation": "static"}, "a static cache"),
    ],
)
def test_generate_refuses_what_would_give_wrong_tokens(options, what):
    _, fast = models()
    batch = begun(make_batch(side="right", labels=None))
    with pytest.raises(softprompt.UnsupportedModelError, match=f"{what} needs a prompt .* behind the first"):
        fast.generate(**batch, max_new_tokens=3, do_sample=False, **options)
