import pandas as pd
import pytest

from softprompt.tasks.metrics import exact_match


@pytest.fixture(scope="module")
def adapter(model_folder, tmp_path_factory):
    """An adapter that has learnt to write the labels x and y, whatever the text."""
    from softprompt.cli import main

    folder = tmp_path_factory.mktemp("adapter")
    rows = ["Tweet text,Label", *(f"text {i},x" for i in range(12)), *(f"text {i},y" for i in range(4))]
    (folder / "rows.csv").write_text("\n".join(rows) + "\n")
    arguments = [
        "train",
        "--no-patch",
        "--data",
        folder / "rows.csv",
        "--model",
        model_folder,
        "--epochs",
        15,
    ]
    arguments += ["--learning-rate", 0.3, "--output", folder / "out", "--eval-data", folder / "rows.csv"]
    assert main([str(argument) for argument in arguments]) == 0
    return folder / "out"


@pytest.fixture
def predict(run, adapter, make_table, tmp_path):
    def call(*more, data=None, output="labelled.csv"):
        data = (
            make_table([("one", "1"), ("two", "2")], header=("Tweet text", "Note")) if data is None else data
        )
        return run(
            "predict",
            "--no-patch",
            "--adapter",
            adapter,
            "--data",
            data,
            "--output",
            tmp_path / output,
            *more,
        )

    return call


@pytest.mark.parametrize(
    "suffix, read",
    [
        ("csv", pd.read_csv),
        ("jsonl", lambda path: pd.read_json(path, lines=True)),
        ("parquet", pd.read_parquet),
    ],
)
def test_rows_keep_their_columns_and_gain_the_label(predict, tmp_path, suffix, read):
    code, out, _ = predict(output=f"labelled.{suffix}")
    assert code == 0
    assert out.startswith("2 rows labelled in ")
    frame = read(tmp_path / f"labelled.{suffix}")
    assert frame.columns.tolist() == ["Tweet text", "Note", "prediction"]
    assert frame["Tweet text"].tolist() == ["one", "two"]
    assert frame["Note"].astype(str).tolist() == ["1", "2"]
    assert set(frame["prediction"]) <= {"x", "y"}


def test_prediction_agrees_with_the_evaluation_of_the_training(predict, adapter, tmp_path, read_json):
    rows = adapter.parent / "rows.csv"
    assert predict(data=rows)[0] == 0
    labelled = pd.read_csv(tmp_path / "labelled.csv")
    metrics = read_json(adapter / "metrics.json")
    accuracy = exact_match(labelled["prediction"].tolist(), labelled["Label"].tolist())
    assert accuracy == metrics["eval_exact_match"]
    assert accuracy >= 0.5


def test_the_batch_size_does_not_change_a_label(predict, adapter, tmp_path):
    for size in (1, 7):
        assert predict("--batch-size", size, data=adapter.parent / "rows.csv", output=f"{size}.csv")[0] == 0
    assert (tmp_path / "1.csv").read_text() == (tmp_path / "7.csv").read_text()


def test_the_texts_may_have_another_column_name_and_the_labels_one_of_choice(predict, make_table, tmp_path):
    data = make_table([("one",), ("two",)], "other.csv", header=("review",))
    assert predict("--text-column", "review", "--output-column", "kind", data=data)[0] == 0
    named = pd.read_csv(tmp_path / "labelled.csv")
    assert predict(output="usual.csv")[0] == 0
    assert named["kind"].tolist() == pd.read_csv(tmp_path / "usual.csv")["prediction"].tolist()


def test_the_model_may_have_moved(predict, model_folder, tmp_path):
    moved = tmp_path / "moved"
    moved.symlink_to(model_folder)
    assert predict("--model", moved)[0] == 0


def test_a_checkpoint_is_an_adapter_too(run, adapter, make_table, tmp_path):
    checkpoint = next(adapter.glob("checkpoint-*"))
    data = make_table([("one",)], header=("Tweet text",))
    code, *_ = run(
        "predict", "--no-patch", "--adapter", checkpoint, "--data", data, "--output", tmp_path / "o.csv"
    )
    assert code == 0


def test_an_existing_file_is_left_alone_without_overwrite(predict, tmp_path):
    path = tmp_path / "labelled.csv"
    path.write_text("precious")
    code, _, err = predict()
    assert code == 2
    assert err == f"softprompt: {path} exists already: name another --output or replace it with --overwrite\n"
    assert path.read_text() == "precious"
    assert predict("--overwrite")[0] == 0
    assert path.read_text().startswith("Tweet text,Note,prediction\n")


@pytest.mark.parametrize(
    "more, output, message",
    [
        (("--text-column", "body"), "o.csv", "has no column 'body'; its columns are 'Tweet text', 'Note'"),
        ((), "o.txt", "its type '.txt' is not one of .csv, .tsv, .jsonl, .json, .parquet"),
        (("--output-column", "Note"), "o.csv", "has a column 'Note' already: name another --output-column"),
        (("--model", "./nowhere"), "o.csv", "the model ./nowhere is not a folder"),
        (("--adapter", "nowhere"), "o.csv", "--adapter nowhere holds no adapter: give a folder that"),
    ],
)
def test_a_bad_value_is_one_line_and_writes_nothing(predict, tmp_path, more, output, message):
    code, out, err = predict(*more, output=output)
    assert code == 2
    assert out == ""
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / output).exists()


def test_a_model_of_another_width_is_one_line(predict, model_folder, tmp_path):
    from transformers import AutoTokenizer, BloomConfig, BloomForCausalLM

    AutoTokenizer.from_pretrained(model_folder).save_pretrained(tmp_path / "wide")
    BloomForCausalLM(BloomConfig(vocab_size=400, hidden_size=64, n_layer=1, n_head=4)).save_pretrained(
        tmp_path / "wide"
    )
    code, _, err = predict("--model", tmp_path / "wide")
    assert code == 2
    assert "does not fit the model" in err
    assert err.count("\n") == 1


def test_scoring_writes_the_likeliest_label_and_the_probability_of_each(predict, tmp_path):
    code, out, _ = predict("--score")
    assert code == 0
    assert out.startswith("2 rows labelled in ")
    frame = pd.read_csv(tmp_path / "labelled.csv")
    assert frame.columns.tolist() == ["Tweet text", "Note", "prediction", "p(x)", "p(y)"]
    assert (frame["p(x)"] + frame["p(y)"]).tolist() == pytest.approx([1, 1])
    likeliest = ["x" if p > 0.5 else "y" for p in frame["p(x)"]]
    assert frame["prediction"].tolist() == likeliest
    assert sorted(path.name for path in tmp_path.glob("labelled*")) == ["labelled.csv"]


def test_scoring_gives_the_probabilities_of_peft(predict, adapter, model_folder, tmp_path):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from softprompt.tasks.classification import Encoder, load_task

    rows = adapter.parent / "rows.csv"
    assert predict("--score", data=rows)[0] == 0
    frame = pd.read_csv(tmp_path / "labelled.csv")
    task, *_ = load_task(adapter)
    encoder = Encoder(task, AutoTokenizer.from_pretrained(model_folder))
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_folder), adapter)
    for number in (0, 13):
        logs = []
        for label in task.labels:
            row = encoder.example(frame["Tweet text"][number], label)
            with torch.no_grad():
                loss = model(**{name: torch.tensor([value]) for name, value in row.items()}).loss
            logs.append(-loss * len(encoder.targets[label]))
        expected = torch.stack(logs).softmax(0)[0].item()
        assert frame["p(x)"][number] == pytest.approx(expected, abs=1e-5)


@pytest.mark.usefixtures("rendered")
def test_scoring_measures_a_table_with_labels(predict, adapter, tmp_path, read_json):
    code, out, _ = predict("--score", data=adapter.parent / "rows.csv")
    assert code == 0
    frame = pd.read_csv(tmp_path / "labelled.csv")
    metrics = read_json(tmp_path / "labelled.metrics.json")
    assert metrics["accuracy"] == exact_match(frame["prediction"].tolist(), frame["Label"].tolist())
    assert f"accuracy {metrics['accuracy']:.1%}, macro-F1 {metrics['macro_f1']:.3f}" in out
    assert sum(map(sum, metrics["confusion"])) == 16
    assert (tmp_path / "labelled.confusion.png").read_bytes().startswith(b"\x89PNG")


def test_calibration_and_length_change_the_probabilities(predict, tmp_path):
    columns = []
    for name, more in (("a", ()), ("b", ("--calibrate",)), ("c", ("--length-normalise",))):
        assert predict("--score", *more, output=f"{name}.csv")[0] == 0
        columns.append(tuple(pd.read_csv(tmp_path / f"{name}.csv")["p(x)"]))
    assert len(set(columns)) == 3


def test_labels_that_training_did_not_know_are_measured_only_where_asked(predict, make_table, tmp_path):
    data = make_table([("one", "x"), ("two", "z")], "foreign.csv")
    code, out, _ = predict("--score", data=data)
    assert code == 0
    assert out.startswith("nothing is measured: ")
    assert "row 2 has the label 'z'" in out
    code, _, err = predict("--score", "--label-column", "Label", data=data, output="other.csv")
    assert code == 2
    assert "row 2 has the label 'z', which no training row has" in err
    assert not (tmp_path / "other.csv").exists()


@pytest.mark.parametrize(
    "more, header, message",
    [
        (("--generate", "--calibrate"), ("Tweet text", "Note"), "by their likelihood: leave --generate out"),
        (("--combine", "mean"), ("Tweet text", "Note"), "out holds one prompt: leave it out"),
        (("--score", "--combine", "vote"), ("Tweet text", "Note"), "--combine says how the prompts of an"),
        (("--score",), ("Tweet text", "p(x)"), "has a column 'p(x)' already: rename it"),
        (
            ("--score", "--output-column", "p(y)"),
            ("Tweet text", "Note"),
            "p(y) is the column of a probability",
        ),
        (("--score", "--label-column", "Kind"), ("Tweet text", "Note"), "has no column 'Kind'"),
    ],
)
def test_a_wrong_use_of_scoring_is_one_line(predict, make_table, tmp_path, more, header, message):
    code, _, err = predict(*more, data=make_table([("one", "x")], header=header))
    assert code == 2
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "labelled.csv").exists()


def test_measurements_are_not_replaced_without_overwrite(predict, tmp_path):
    (tmp_path / "labelled.metrics.json").write_text("precious")
    code, _, err = predict("--score")
    assert code == 2
    assert "labelled.metrics.json exists already" in err


@pytest.mark.parametrize("way", ["--score", "--generate"])
def test_measurements_of_a_replaced_table_go_with_it(predict, adapter, tmp_path, way):
    assert predict("--score", data=adapter.parent / "rows.csv")[0] == 0
    assert predict(way, "--overwrite")[0] == 0
    assert len(pd.read_csv(tmp_path / "labelled.csv")) == 2
    assert not list(tmp_path.glob("labelled.metrics.json")) + list(tmp_path.glob("labelled.confusion.png"))


def test_rows_longer_than_the_model_are_one_line(predict, model_folder, tmp_path):
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    AutoTokenizer.from_pretrained(model_folder).save_pretrained(tmp_path / "short")
    GPT2LMHeadModel(
        GPT2Config(vocab_size=400, n_embd=32, n_layer=1, n_head=2, n_positions=24)
    ).save_pretrained(tmp_path / "short")
    code, _, err = predict("--score", "--model", tmp_path / "short")
    assert code == 2
    assert "the 50 virtual tokens of" in err
    assert "exceed the 24 positions of the model" in err
