import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

SETTINGS = ("--no-patch", "--epochs", "4", "--batch-size", "4", "--num-virtual-tokens", "4")


def prompt_in(folder):
    return load_file(folder / "adapter_model.safetensors")["prompt_embeddings"]


@pytest.fixture
def train(run, table, model_folder, tmp_path):
    def call(output, *more, data=table):
        return run(
            "train", *SETTINGS, "--data", data, "--model", model_folder, "--output", tmp_path / output, *more
        )

    return call


@pytest.fixture
def interrupted_after(monkeypatch):
    """Let Ctrl-C arrive while the step of this number runs."""

    def arrange(step):
        from softprompt.tasks.trainer import PromptTrainer

        training_step = PromptTrainer.training_step

        def with_signal(self, *args, **kwargs):
            if self.state.global_step == step - 1:
                os.kill(os.getpid(), signal.SIGINT)
            return training_step(self, *args, **kwargs)

        monkeypatch.setattr(PromptTrainer, "training_step", with_signal)

    return arrange


@pytest.mark.parametrize("step", [6, 8], ids=["within an epoch", "at the end of an epoch"])
def test_an_interrupted_and_resumed_run_ends_as_an_uninterrupted_one(
    train, tmp_path, interrupted_after, monkeypatch, read_json, step
):
    assert train("whole")[0] == 0
    interrupted_after(step)
    code, _, err = train("parts")
    monkeypatch.undo()
    assert code == 130
    assert f"interrupted after step {step} of 16; {tmp_path / 'parts'}/checkpoint-{step} is complete" in err
    assert "--output " + str(tmp_path / "parts") + " --resume\n" in err
    assert not (tmp_path / "parts" / "adapter_config.json").exists()
    assert train("parts", "--resume")[0] == 0
    torch.testing.assert_close(
        prompt_in(tmp_path / "parts"), prompt_in(tmp_path / "whole"), rtol=0, atol=1e-6
    )
    whole, parts = (read_json(tmp_path / name / "metrics.json") for name in ("whole", "parts"))
    assert parts["eval_loss"] == pytest.approx(whole["eval_loss"], abs=1e-6)
    for key in ("loss", "eval_loss"):
        curves = [{e["step"]: e[key] for e in m["history"] if key in e} for m in (whole, parts)]
        assert curves[0] == pytest.approx(curves[1], abs=1e-6)


def test_resume_without_a_checkpoint_is_one_line(train, tmp_path):
    code, _, err = train("out", "--resume")
    assert code == 2
    assert err == (
        f"softprompt: --resume: {tmp_path / 'out'} has no complete checkpoint: train without --resume\n"
    )


@pytest.mark.parametrize(
    "more",
    [
        ("--steps", "7", "--schedule", "constant"),
        ("--validation-share", "0.3", "--patience", "1", "--learning-rate", "300"),
    ],
    ids=["its last step lies within an epoch", "it had stopped early"],
)
def test_a_finished_run_that_is_resumed_stays_as_it_is(train, tmp_path, read_json, more):
    found = []
    for again in ((), ("--resume",)):
        assert train("out", *more, *again)[0] == 0
        found.append((prompt_in(tmp_path / "out"), read_json(tmp_path / "out" / "metrics.json")))
    (prompt, metrics), (resumed, later) = found
    assert torch.equal(prompt, resumed)
    assert metrics["steps"] == later["steps"] < 16
    for key in ("loss", "eval_validation_loss"):
        curves = [[(e["step"], e[key]) for e in m["history"] if key in e] for m in (metrics, later)]
        assert curves[0] == curves[1]


def test_resume_passes_over_a_checkpoint_that_was_cut_short(train, tmp_path):
    assert train("out")[0] == 0
    finished = prompt_in(tmp_path / "out")
    (tmp_path / "out" / "checkpoint-16" / "trainer_state.json").unlink()
    assert train("out", "--resume")[0] == 0
    torch.testing.assert_close(prompt_in(tmp_path / "out"), finished, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "more, message",
    [
        (("--seed", "3"), "--resume: --seed is 3, but the checkpoint was trained with 42"),
        (
            ("--num-virtual-tokens", "5"),
            "--resume: --num-virtual-tokens is 5, but the checkpoint was trained with 4",
        ),
        (
            ("--template", "{text} = "),
            "--resume: --template is '{text} =', but the checkpoint was trained with",
        ),
        (("--eval-share", "0.5"), "--resume: the training rows are not those of the checkpoint"),
    ],
)
def test_resume_with_other_settings_is_one_line(train, tmp_path, more, message):
    folder = tmp_path / "out"
    assert train("out", "--epochs", "1")[0] == 0
    before = sorted((path.name, path.stat().st_mtime_ns) for path in folder.iterdir())
    code, _, err = train("out", "--epochs", "1", "--resume", *more)
    assert code == 2
    assert message in err
    assert err.count("\n") == 1
    assert sorted((path.name, path.stat().st_mtime_ns) for path in folder.iterdir()) == before


def test_a_crash_while_a_checkpoint_is_written_leaves_none_under_its_name(train, tmp_path, monkeypatch):
    from softprompt.tasks.trainer import PromptTrainer

    def crash(self, folder):
        raise OSError("disk full")

    monkeypatch.setattr(PromptTrainer, "_save_rng_state", crash)
    with pytest.raises(OSError, match="disk full"):
        train("out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".lock"]


@pytest.mark.slow
def test_ctrl_c_leaves_a_checkpoint_to_resume_from(table, model_folder, tmp_path):
    output = tmp_path / "out"
    command = [
        sys.executable,
        "-m",
        "softprompt",
        "train",
        "--no-patch",
        "--eval-share",
        "0",
        "--epochs",
        "5000",
        "--batch-size",
        "8",
    ]
    command += ["--data", table, "--model", model_folder, "--output", output, "--threads", "1"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 60
        while not list(output.glob("checkpoint-*")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert f"--output {output} --threads 1 --resume" in err
    steps = max(int(path.name.split("-")[1]) for path in output.glob("checkpoint-*"))
    assert f"interrupted after step {steps} of 15000" in err
    saved = {path.name for path in (output / f"checkpoint-{steps}").iterdir()}
    assert saved >= {"adapter_model.safetensors", "optimizer.pt", "trainer_state.json", "softprompt.json"}


# file -> (what is left of its bytes, None: no file; what is said)
DAMAGE = {
    "no optimizer": ("optimizer.pt", None, "optimizer.pt is missing or not what torch wrote"),
    "half an optimizer": ("optimizer.pt", 0.5, "optimizer.pt is missing or not what torch wrote"),
    "no random state": ("rng_state.pth", None, "rng_state.pth is missing or not what torch wrote"),
    "an empty schedule": ("scheduler.pt", 0, "scheduler.pt is missing or not what torch wrote"),
    "half a prompt": ("adapter_model.safetensors", 0.5, "cannot be read: "),
    "no configuration": (
        "adapter_config.json",
        None,
        "holds no adapter: expected a folder with adapter_config.json",
    ),
}


def test_resume_from_a_damaged_checkpoint_is_one_line(train, tmp_path, interrupted_after, monkeypatch):
    """Trainer would go on with a new optimizer, without a word, or end in a traceback."""
    interrupted_after(2)
    assert train("out")[0] == 130
    monkeypatch.undo()
    checkpoint = tmp_path / "out" / "checkpoint-2"
    for name, share, said in DAMAGE.values():
        whole = (checkpoint / name).read_bytes()
        if share is None:
            (checkpoint / name).unlink()
        else:
            (checkpoint / name).write_bytes(whole[: int(share * len(whole))])
        code, out, err = train("out", "--resume")
        assert (code, out) == (2, "")
        assert err.startswith(f"softprompt: --resume: {checkpoint} is damaged (")
        assert said in err
        assert err.endswith("): remove it to go on from the checkpoint before, or train without --resume\n")
        (checkpoint / name).write_bytes(whole)
    assert train("out", "--resume")[0] == 0
