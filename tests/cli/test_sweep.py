"""`softprompt sweep` against `softprompt train`, run by run."""

import statistics

import numpy as np
import pandas as pd
import pytest
import torch
from marks import slow_unless
from safetensors.torch import load_file


def prompt_in(folder):
    return load_file(folder / "adapter_model.safetensors")["prompt_embeddings"]


@pytest.fixture
def usual(table, model_folder):
    data = ("--batch-size", 8, "--data", table, "--eval-data", table)
    return (*data, "--model", model_folder, "--num-virtual-tokens", 3)


@pytest.fixture
def sweep(run, usual, tmp_path):
    """Run a sweep of 3 virtual tokens and 2 epochs; returns (exit code, stdout, stderr)."""

    def call(*more, output="out", given=usual):
        if "num-virtual-tokens" in more and given is usual:
            given = usual[:-2]
        epochs = () if "epochs" in more or "steps" in more or "--epochs" in more else ("--epochs", 2)
        return run("sweep", *given, *epochs, "--output", tmp_path / output, *more)

    return call


@pytest.fixture
def trained_together(monkeypatch):
    """The numbers of runs of the trainers that were started."""
    from softprompt.tasks.trainer import PromptTrainer

    counts = []
    train = PromptTrainer.train

    def counting(self, **options):
        if self.members:
            counts.append(len(self.members))
        return train(self, **options)

    monkeypatch.setattr(PromptTrainer, "train", counting)
    return counts


def runs_in(folder):
    frame = pd.read_csv(folder / "sweep.csv")
    return [(row, folder / "runs" / row["run"]) for row in frame.to_dict("records")]


@pytest.mark.parametrize("positions", slow_unless(["compact"], ["compact", "padded"]))
def test_every_run_of_a_batch_is_a_run_of_train(
    run, sweep, usual, trained_together, tmp_path, read_json, positions
):
    more = ("--positions", positions, "--epochs", 2)
    over = ("--over", "num-virtual-tokens", 2, 5, "--over", "learning-rate", 0.02, 0.3)
    given = (*usual[:-2], "--positions", positions)
    assert sweep(*over, "--seeds", 2, given=given)[0] == 0
    assert trained_together == [8]
    runs = runs_in(tmp_path / "out")
    for row, folder in (runs[0], runs[3], runs[6]):
        alone = tmp_path / "alone"
        settings = ("--num-virtual-tokens", row["num_virtual_tokens"], "--seed", row["seed"])
        settings += ("--learning-rate", row["learning_rate"], "--overwrite", "--output", alone)
        assert run("train", *usual[:-2], *more, *settings)[0] == 0
        torch.testing.assert_close(prompt_in(folder), prompt_in(alone), rtol=1e-4, atol=1e-4)
        metrics, record = read_json(alone / "metrics.json"), read_json(folder / "run.json")
        losses = [entry["loss"] for entry in metrics["history"] if "loss" in entry]
        assert record["losses"] == pytest.approx(losses, abs=1e-4)
        assert row["eval_loss"] == pytest.approx(metrics["eval_loss"], abs=1e-4)
        assert row["eval_exact_match"] == metrics["eval_exact_match"]
        assert row["steps"] == metrics["steps"] == 6
        assert np.array_equal(np.load(folder / "initial_prompt.npy"), np.load(alone / "initial_prompt.npy"))


@pytest.mark.slow
def test_initialisers_optimizers_and_steps_are_those_of_train(run, sweep, usual, trained_together, tmp_path):
    over = ("--over", "init", "random", "vocab", "labels", "--over", "optimizer", "adamw", "adafactor")
    assert sweep(*over, "--over", "steps", 2, 4, "--seeds", 1)[0] == 0
    assert trained_together == [3, 3, 3, 3]
    runs = runs_in(tmp_path / "out")
    for row, folder in (runs[0], runs[3], runs[5], runs[10]):
        settings = ("--init", row["init"], "--optimizer", row["optimizer"], "--steps", row["steps"])
        alone = ("--overwrite", "--output", tmp_path / "alone", "--eval-share", 0)
        assert run("train", *usual, *settings, *alone)[0] == 0
        torch.testing.assert_close(prompt_in(folder), prompt_in(tmp_path / "alone"), rtol=1e-4, atol=1e-4)


PADDED, COMPACT = ("--positions", "padded"), ("--positions", "compact")


@pytest.mark.parametrize(
    "more, together",
    [
        ((*PADDED, "--together", 3), [3, 1]),
        pytest.param((*PADDED, "--no-patch"), [1, 1, 1, 1], marks=pytest.mark.slow),
        pytest.param((*PADDED, "--padding", "longest"), [2, 2], marks=pytest.mark.slow),
        pytest.param((*COMPACT, "--padding", "longest"), [4], marks=pytest.mark.slow),
    ],
)
def test_runs_that_do_not_fit_together_give_the_same_table(sweep, trained_together, tmp_path, more, together):
    over = ("--over", "num-virtual-tokens", 1, 4, "--seeds", 2)
    assert sweep(*over, *more)[0] == 0
    assert trained_together == together
    assert sweep(*over, *more, "--together", 1, output="one")[0] == 0
    ours, alone = (pd.read_csv(tmp_path / name / "sweep.csv") for name in ("out", "one"))
    pd.testing.assert_frame_equal(ours, alone, rtol=1e-4, atol=1e-4)


def test_a_model_that_cannot_be_packed_is_trained_run_by_run(
    sweep, trained_together, usual, unpacked_folder, tmp_path
):
    given = (*usual[:4], "--model", unpacked_folder, "--positions", "padded", "--init", "vocab")
    code, _, err = sweep("--over", "num-virtual-tokens", 1, 2, "--seeds", 1, "--epochs", 1, given=given)
    assert code == 0, err
    assert trained_together == [1, 1]


def test_a_finished_run_is_not_done_again(sweep, trained_together, tmp_path):
    first = ("--over", "learning-rate", 0.02, "--seeds", 2)
    assert sweep(*first)[0] == 0
    before = pd.read_csv(tmp_path / "out" / "sweep.csv")
    assert "2 runs, 2 of them done before" in sweep(*first)[1]
    assert trained_together == [2]
    assert sweep("--over", "learning-rate", 0.02, 0.1, "--seeds", 2)[0] == 0
    assert trained_together == [2, 2]
    after = pd.read_csv(tmp_path / "out" / "sweep.csv")
    pd.testing.assert_frame_equal(after[after["learning_rate"] == 0.02], before)
    assert sweep(*first, "--weight-decay", 0.1)[0] == 0
    assert trained_together == [2, 2, 2]


@pytest.mark.slow
def test_a_sweep_that_was_stopped_goes_on_and_ends_as_one_that_was_not(
    sweep, trained_together, tmp_path, monkeypatch, read_json
):
    from softprompt.tasks.trainer import PromptTrainer

    over = ("--over", "num-virtual-tokens", 1, 2, 4, "--seeds", 1, "--together", 1)
    step, save, runs = PromptTrainer.training_step, PromptTrainer.measure_run, tmp_path / "out" / "runs"

    def stops(self, *args, **kwargs):
        if len(trained_together) == 2 and self.state.global_step == 3:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(PromptTrainer, "training_step", stops)
        code, out, err = sweep(*over)
    assert (code, out) == (130, "")
    assert "interrupted; 1 of 3 runs are done and kept in" in err
    assert not (tmp_path / "out" / "sweep.csv").exists()
    (finished,) = runs.iterdir()
    assert read_json(finished / "run.json")["settings"]["num_virtual_tokens"] == 1

    def breaks_while_writing(self, *args, **kwargs):
        result = save(self, *args, **kwargs)
        patch.setattr("softprompt.tasks.trainer.write_npy", interrupt)
        return result

    def interrupt(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(PromptTrainer, "measure_run", breaks_while_writing)
        assert sweep(*over)[0] == 130
    assert list(runs.iterdir()) == [finished]
    code, out, _ = sweep(*over)
    assert code == 0
    assert "3 runs, 1 of them done before" in out
    assert sweep(*over, output="whole")[0] == 0
    pd.testing.assert_frame_equal(*(pd.read_csv(tmp_path / name / "sweep.csv") for name in ("out", "whole")))


def test_a_run_whose_record_is_broken_is_done_again(sweep, trained_together, tmp_path):
    over = ("--over", "learning-rate", 0.02, "--seeds", 2)
    assert sweep(*over)[0] == 0
    _, folder = runs_in(tmp_path / "out")[1]
    (folder / "run.json").write_text('{"settings": {')
    assert sweep(*over)[0] == 0
    assert trained_together == [2, 1]


def test_what_a_killed_sweep_left_unfinished_is_no_run(sweep, trained_together, tmp_path):
    left = tmp_path / "out" / "runs" / ".partial" / "run-0123456789ab"
    left.mkdir(parents=True)
    (left / "adapter_config.json").write_text("{")
    assert sweep("--over", "learning-rate", 0.02, "--seeds", 2)[0] == 0
    assert trained_together == [2]
    assert sorted(path.name for path in left.parents[1].iterdir()) == sorted(
        row["run"] for row, _ in runs_in(tmp_path / "out")
    )


def test_a_run_that_diverges_leaves_the_others_as_they_are(
    run, sweep, trained_together, usual, tmp_path, read_json
):
    code, out, _ = sweep("--over", "learning-rate", 1e30, 0.05, "--seeds", 2)
    assert code == 0
    assert trained_together == [4]
    assert "2 (2 diverged)" in out
    rows = runs_in(tmp_path / "out")
    assert [row["diverged"] for row, _ in rows] == [True, True, False, False]
    (lost, kept) = read_json(tmp_path / "out" / "sweep.json")["settings"]
    assert (lost["runs"], lost["diverged"], lost["eval_loss"]) == (2, 2, None)
    assert kept["diverged"] == 0
    alone = ("--learning-rate", 0.05, "--seed", 43, "--epochs", 2, "--output", tmp_path / "alone")
    assert run("train", *usual, *alone)[0] == 0
    torch.testing.assert_close(prompt_in(rows[3][1]), prompt_in(tmp_path / "alone"), rtol=1e-4, atol=1e-4)


def test_a_sweep_in_which_every_run_diverges_says_so(sweep, read_json, tmp_path):
    code, out, _ = sweep("--over", "learning-rate", 1e30, 1e31, "--seeds", 1)
    assert code == 0
    assert out.count("1 (1 diverged)") == 2
    assert read_json(tmp_path / "out" / "sweep.json")["runs"][0]["eval_loss"] is None


def test_the_table_has_mean_and_spread_of_each_setting(sweep, usual, tmp_path, read_json):
    code, out, _ = sweep(
        "--over", "num-virtual-tokens", 2, 4, "--over", "init", "vocab", "labels", given=usual[:-2]
    )
    assert code == 0
    content, frame = read_json(tmp_path / "out" / "sweep.json"), pd.read_csv(tmp_path / "out" / "sweep.csv")
    pd.testing.assert_frame_equal(pd.DataFrame(content["runs"]), frame)
    assert content["over"] == ["num_virtual_tokens", "init"]
    assert content["seeds"] == [42, 43, 44]
    assert [(s["num_virtual_tokens"], s["init"]) for s in content["settings"]] == [
        (2, "vocab"),
        (2, "labels"),
        (4, "vocab"),
        (4, "labels"),
    ]
    for setting in content["settings"]:
        chosen = (frame["num_virtual_tokens"] == setting["num_virtual_tokens"]) & (
            frame["init"] == setting["init"]
        )
        for score in ("eval_exact_match", "eval_loss", "train_loss"):
            values = frame[chosen][score].tolist()
            assert setting[score] == pytest.approx(
                {
                    "mean": sum(values) / 3,
                    "std": statistics.stdev(values),
                    "min": min(values),
                    "max": max(values),
                }
            )
        assert f"{setting['eval_loss']['mean']:.4f} ± {setting['eval_loss']['std']:.4f}" in out


def test_a_run_is_an_adapter_that_other_commands_take(run, sweep, table, tmp_path):
    assert sweep("--over", "num-virtual-tokens", 2, "--seeds", 1)[0] == 0
    ((row, folder),) = runs_in(tmp_path / "out")
    labelled = tmp_path / "labelled.csv"
    assert run("predict", "--adapter", folder, "--data", table, "--output", labelled)[0] == 0
    frame = pd.read_csv(labelled)
    assert (frame["prediction"] == frame["Label"]).mean() == row["eval_exact_match"]


def test_a_sweep_over_starts_takes_a_saved_one_among_them(sweep, tmp_path):
    np.save(tmp_path / "start.npy", np.full((3, 32), 0.1))
    over = ("--over", "init", "saved", "vocab", "--seeds", 1, "--init-from", tmp_path / "start.npy")
    assert sweep(*over)[0] == 0
    (_, saved), (_, vocab) = runs_in(tmp_path / "out")
    assert np.array_equal(np.load(saved / "initial_prompt.npy"), np.full((3, 32), 0.1, np.float32))
    assert not np.allclose(np.load(vocab / "initial_prompt.npy"), 0.1)


@pytest.mark.parametrize(
    "more, message",
    [
        ((), "the following arguments are required: --over"),
        (
            ("--over", "depth", 1),
            "--over depth: no such field; expected one of num-virtual-tokens, init, init-",
        ),
        (("--over", "learning-rate"), "--over learning-rate: name the values behind it"),
        (("--over", "learning-rate", 0.1, "fast"), "argument --learning-rate: expected a number, got 'fast'"),
        (("--over", "init", "vocab", "other"), "argument --init: invalid choice: 'other'"),
        (("--over", "epochs", 1, 1), "--over epochs: a value is there twice: 1 1"),
        (("--over", "epochs", 1, "--over", "epochs", 2), "--over epochs is given twice"),
        (
            ("--over", "learning-rate", 0.1, "--learning-rate", 0.2),
            "--learning-rate is what --over varies: leave the option out",
        ),
        (("--over", "epochs", 1, "--steps", 2), "--over epochs means nothing beside steps"),
        (("--over", "init", "vocab", "saved"), "--init saved needs a prompt to start from: give --init-from"),
        (
            ("--over", "init", "labels", "--num-virtual-tokens", 1),
            "2 labels do not fit into 1 virtual tokens",
        ),
        (("--over", "steps", 1, "--seeds", 0), "argument --seeds: must be at least 1, got 0"),
    ],
)
def test_a_sweep_that_cannot_be_made_is_one_line_and_writes_nothing(sweep, tmp_path, usual, more, message):
    code, out, err = sweep(*more, given=usual[:-2])
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_sweep_without_rows_to_measure_on_is_one_line(run, table, model_folder, tmp_path):
    code, _, err = run(
        *("sweep", "--data", table, "--model", model_folder, "--eval-share", 0, "--over", "steps", 1),
        *("--output", tmp_path / "out"),
    )
    assert code == 2
    assert "a sweep compares accuracies: give --eval-data" in err


def test_files_that_changed_under_their_name_are_new_runs(sweep, tmp_path):
    start = tmp_path / "start.npy"
    names = []
    for value in (0.1, 0.1, 0.4):
        np.save(start, np.full((3, 32), value, dtype=np.float32))
        code, _, error = sweep("--over", "learning-rate", 0.1, "--init", "saved", "--init-from", start)
        assert code == 0, error
        names.append([row["run"] for row, _ in runs_in(tmp_path / "out")])
    assert names[0] == names[1] != names[2]


def test_a_sweep_over_words_that_no_run_starts_from_is_refused(sweep):
    code, _, error = sweep("--over", "init-text", "one word", "other words", "--init", "vocab")
    assert code == 2
    assert "--over init-text varies the words of --init text, which no run starts from" in error


def test_the_table_of_other_fields_is_not_replaced(sweep, tmp_path):
    assert sweep("--over", "learning-rate", 0.1, "--seeds", 1)[0] == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("sweep.*")}
    code, out, error = sweep("--over", "learning-rate", 0.1, "--over", "weight-decay", 0, 0.1, "--seeds", 1)
    assert (code, out) == (2, "")
    assert "has the table of a sweep over learning-rate, which one over learning-rate, weight-decay" in error
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "out").glob("sweep.*")}


def test_two_sweeps_do_not_write_to_one_folder_and_a_killed_one_holds_nothing(
    sweep, tmp_path, trained_together, held_by_another
):
    with held_by_another(tmp_path / "out"):
        code, out, error = sweep("--over", "learning-rate", 0.1, "--seeds", 1)
        assert (code, out) == (2, "")
        assert "another run or sweep is already writing to" in error
        assert trained_together == []
    assert sweep("--over", "learning-rate", 0.1, "--seeds", 1)[0] == 0


def test_runs_in_fp16_have_a_loss_scale_of_their_own(usual, monkeypatch):
    from softprompt.cli import build_parser, models, sweep_runs
    from softprompt.cli.options import read_options
    from softprompt.cli.sweep_config import SweepConfig

    monkeypatch.setattr(models, "choose_dtype", lambda *asked, **more: torch.float32)
    sizes = {}
    for precision in ((), ("--fp16",)):
        line = ["sweep", *map(str, usual), "--over", "learning-rate", "0.1", "0.2", *precision]
        config = read_options(SweepConfig, build_parser().parse_args(line))
        sweep = sweep_runs.Sweep(config.training, config, {"learning_rate": [0.1, 0.2]})
        sizes[precision] = [len(batch) for batch in sweep.batches(sweep.runs)]
    assert sizes == {(): [6], ("--fp16",): [1] * 6}


def test_an_incomplete_record_is_not_a_finished_run(tmp_path):
    from softprompt.tasks.sweep import RECORD, read_record

    (tmp_path / RECORD).write_text('{"eval_loss": 1.0}')
    assert read_record(tmp_path) is None
