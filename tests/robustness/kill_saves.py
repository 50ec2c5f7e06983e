"""Kills training runs with SIGKILL while they save, resumes them, and compares them with whole runs.

    python tests/robustness/kill_saves.py --kills 50 --record tests/robustness/kill_saves.json

A run is killed before a file operation of a save (the n-th one, in its own process), or from outside after a
random time; with `--torn` it also dies inside of a write, at the limit of a file's size, which leaves half a
file. After each kill everything that may be read is whole; the run is started again as a user would, and its
losses and prompts have to be those of the run that nobody killed, bit for bit.

Everything is imported once, and each run is a fork.
"""

import argparse
import json
import os
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from peft import PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import softprompt
from softprompt.cli import build, models, progress, resume, train  # noqa: F401 (before the forks)
from softprompt.cli import main as softprompt_command
from softprompt.prompts.adapters import read_adapter
from softprompt.tasks import plot, trainer
from softprompt.tasks.classification import load_task
from softprompt.tasks.errors import TaskError
from softprompt.tasks.folders import adapter_folders, latest_checkpoint
from softprompt.tiny import model_path

# What touches a folder; reading counts too, since it lies between two changes.
OPERATIONS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree")
TORN_BYTES = (1, 64, 700)
EXITED_WELL = 0


@dataclass
class Kill:
    """One kill, and what became of the run."""

    program: str
    kind: str  # "before an operation", "at a random time", "inside of a write"
    moment: str
    signal: str
    died: bool = False
    checkpoints: int = 0  # whole ones that were left
    resumed_from: int | None = None  # step; None: from the start
    resumed: bool = False
    equal: bool = False
    problem: str = ""


# ------------------------------------------------------------------------------------------------ programs
def train_command(*more):
    """`softprompt train`, with --resume where there is a checkpoint."""

    def run(folder, table):
        plot.draw_training = lambda history, path: path.write_bytes(b"")  # slower than the training
        arguments = ["train", "--data", table, "--output", folder, "--eval-share", 0, "--epochs", 3]
        arguments += ["--batch-size", 4, "--num-virtual-tokens", 4, "--threads", 1, *more]
        if latest_checkpoint(folder) is not None:
            arguments.append("--resume")
        return softprompt_command([str(argument) for argument in arguments])

    return run


class Rows(Dataset):
    """Some texts of equal length."""

    def __len__(self):
        return 12

    def __getitem__(self, index):
        ids = torch.arange(5, 12) + 7 * index
        return {"input_ids": ids, "labels": ids}


def plain_trainer(folder, table):
    """The Trainer of transformers on a patched model, as docs/trainer.md has it."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(model_path(), dtype="float32")
    model = get_peft_model(base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    softprompt.patch(model, on_unsupported="error")
    arguments = TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        learning_rate=0.1,
        per_device_train_batch_size=4,
        max_steps=6,
        logging_steps=1,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=2,
    )
    run = Trainer(model, arguments, train_dataset=Rows())
    checkpoint = latest_checkpoint(folder)
    run.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    results = folder.with_suffix(".results")
    results.mkdir(exist_ok=True)
    prompt = model.prompt_encoder["default"].embedding.weight.detach()
    save_file({"prompt_embeddings": prompt}, results / "prompt.safetensors")
    (results / "history.json").write_text(json.dumps(run.state.log_history))
    return 0


PROGRAMS = {
    "softprompt train": train_command(),
    "softprompt train --ensemble": train_command("--ensemble", 2),
    "softprompt train --steps": train_command("--steps", 7, "--schedule", "constant"),  # ends within an epoch
    "softprompt train --patience": train_command(
        "--validation-share", 0.3, "--patience", 1, "--epochs", 6, "--learning-rate", 300
    ),
    "Trainer": plain_trainer,
}


# ------------------------------------------------------------------------------------------------ processes
def start(program, folder, table, before=lambda: None):
    """A fork that runs a program; returns its process id."""
    process = os.fork()
    if process:
        return process
    code = 70
    try:
        log = os.open(folder.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        torch.set_num_threads(1)
        transformers.logging.set_verbosity_error()
        before()
        code = PROGRAMS[program](folder, table)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def finish(process):
    """The signal that ended a process (0: none) and its exit code."""
    status = os.waitpid(process, 0)[1]
    if os.WIFSIGNALED(status):
        return os.WTERMSIG(status), -1
    return 0, os.WEXITSTATUS(status)


def watch_operations(folder, act):
    """Calls `act(number, text)` before every file operation below a folder, from now on."""
    count, busy, root = 0, False, str(folder)

    def hook(event, args):
        nonlocal count, busy
        if busy or event not in OPERATIONS or not args:
            return
        named = any(isinstance(a, str | bytes | os.PathLike) and root in os.fsdecode(a) for a in args)
        # shutil.rmtree names what it removes relative to an open folder.
        relative = event in ("os.remove", "os.rmdir") and isinstance(args[-1], int) and args[-1] >= 0
        if not (named or relative):
            return
        busy = True
        count += 1
        act(count, f"{event} {os.path.basename(os.fsdecode(args[0]))}")
        busy = False

    sys.addaudithook(hook)


def kill_before(folder, number):
    """Ends this process before the n-th operation."""

    def act(count, text):
        if count == number:
            folder.with_suffix(".moment").write_text(text)
            os.kill(os.getpid(), signal.SIGKILL)

    watch_operations(folder, act)


def tear_after(folder, number, size):
    """Ends this process inside of the first write after the n-th operation that makes a file so long."""

    def act(count, text):
        if count == number:
            folder.with_suffix(".moment").write_text(text)
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    watch_operations(folder, act)


def tell_saves(writer):
    """Writes a byte into a pipe whenever a save begins."""
    for kind in (trainer.PromptTrainer, Trainer):
        save = kind._save_checkpoint

        def told(self, *args, save=save):
            os.write(writer, b"s")
            return save(self, *args)

        kind._save_checkpoint = told
    save_adapter = trainer.PromptTrainer.save_adapter

    def told_too(self, folder):
        os.write(writer, b"s")
        return save_adapter(self, folder)

    trainer.PromptTrainer.save_adapter = told_too


# ------------------------------------------------------------------------------------------------- results
def losses(program, folder):
    """The curve: (step, name, value) of everything that was measured."""
    if program == "Trainer":
        history = json.loads((folder.with_suffix(".results") / "history.json").read_text())
    else:
        history = json.loads((folder / "metrics.json").read_text())["history"]
    return sorted(
        (entry["step"], name, value)
        for entry in history
        for name, value in entry.items()
        if name.endswith("loss") and name != "train_loss"  # of this process alone
    )


def prompts(program, folder):
    """The trained prompts, as bytes."""
    if program == "Trainer":
        return [(folder.with_suffix(".results") / "prompt.safetensors").read_bytes()]
    return [read_adapter(path)[1].numpy().tobytes() for path in adapter_folders(folder)]


def check_folder(program, folder, expected):
    """Raises unless all that would be read after a kill is whole; returns the number of checkpoints."""
    checkpoints = list(folder.glob("checkpoint-*"))
    if program == "Trainer":  # leaves halves under a checkpoint's name, which are passed over
        latest = latest_checkpoint(folder)
        checkpoints = [] if latest is None else [latest]
    for checkpoint in checkpoints:
        json.loads((checkpoint / "trainer_state.json").read_text())
        for name in ("optimizer.pt", "scheduler.pt"):
            torch.load(checkpoint / name, weights_only=True)
        assert (checkpoint / "rng_state.pth").stat().st_size > 0
        for path in adapter_folders(checkpoint) or [checkpoint]:
            assert torch.isfinite(load_file(path / "adapter_model.safetensors")["prompt_embeddings"]).all()
    if program != "Trainer":
        try:
            load_task(folder)
        except TaskError:  # `softprompt predict` refuses it
            assert not (folder / "adapter_config.json").exists()
        else:
            if adapter_folders(folder):
                assert prompts(program, folder) == expected, "a half adapter"
    return len(checkpoints)


@dataclass
class Whole:
    """A run that nobody killed."""

    operations: int
    saving: float  # seconds between the first save and the end
    losses: list
    prompts: list


def run_whole(program, folder, table):
    """Runs a program to its end, and counts its operations."""
    count = folder.with_suffix(".count")
    reader, writer = os.pipe()

    def before():
        tell_saves(writer)
        watch_operations(folder, lambda number, text: count.write_text(str(number)))

    process = start(program, folder, table, before)
    os.close(writer)
    os.read(reader, 1)
    began = time.monotonic()
    code = finish(process)
    os.close(reader)
    assert code == (0, EXITED_WELL), (program, code, folder.with_suffix(".log").read_text())
    seconds = time.monotonic() - began
    return Whole(int(count.read_text()), seconds, losses(program, folder), prompts(program, folder))


def run_killed(kill, how, whole, folder, table):
    """Kills a run, looks at what it left, resumes it and compares; fills in `kill`."""
    folder.mkdir()
    if kill.kind == "at a random time":
        reader, writer = os.pipe()
        process = start(kill.program, folder, table, lambda: tell_saves(writer))
        os.close(writer)
        os.read(reader, 1)
        time.sleep(how)
        os.kill(process, signal.SIGKILL)
        ended = finish(process)
        os.close(reader)
    else:
        ended = finish(start(kill.program, folder, table, lambda: how(folder)))
        moment = folder.with_suffix(".moment")
        kill.moment += f" ({moment.read_text()})" if moment.exists() else ""
    kill.died = ended[0] == getattr(signal, kill.signal)
    if not kill.died:
        kill.problem = f"ended by itself: {ended}"
        return
    kill.checkpoints = check_folder(kill.program, folder, whole.prompts)
    latest = latest_checkpoint(folder)
    kill.resumed_from = None if latest is None else int(latest.name.split("-")[1])
    kill.resumed = finish(start(kill.program, folder, table)) == (0, EXITED_WELL)
    if not kill.resumed:
        kill.problem = folder.with_suffix(".log").read_text()[-1500:]
        return
    same_losses = losses(kill.program, folder) == whole.losses
    same_prompts = prompts(kill.program, folder) == whole.prompts
    kill.equal = same_losses and same_prompts
    if not kill.equal:
        kill.problem = f"losses equal: {same_losses}, prompts equal: {same_prompts}"


def draw_kill(number, again, torn, program, whole, random_source):
    """A kill and how it is done; every third one comes at a random time.

    The time is drawn from half as much at each further attempt: the run that was measured may have been slow.
    """
    if torn:
        operation, size = random_source.randint(1, whole.operations), random_source.choice(TORN_BYTES)
        kill = Kill(program, "inside of a write", f"{size} bytes, after operation {operation}", "SIGXFSZ")
        return kill, lambda folder: tear_after(folder, operation, size)
    if number % 3 == 2:
        seconds = random_source.uniform(0, whole.saving * 0.9 / 2**again)
        kill = Kill(program, "at a random time", f"{seconds:.3f} s after the first save began", "SIGKILL")
        return kill, seconds
    operation = random_source.randint(1, whole.operations)
    kill = Kill(program, "before an operation", f"operation {operation} of {whole.operations}", "SIGKILL")
    return kill, lambda folder: kill_before(folder, operation)


def attempts(arguments, wholes, work, table):
    """The kills, each done. A run that was faster than its kill is started again with another moment."""
    random_source = random.Random(arguments.seed)
    done = []
    for number in range(arguments.kills + arguments.torn):
        program = list(PROGRAMS)[number % len(PROGRAMS)]
        for again in range(20):
            torn = number >= arguments.kills
            kill, how = draw_kill(number, again, torn, program, wholes[program], random_source)
            try:
                run_killed(kill, how, wholes[program], work / f"killed-{number}-{again}", table)
            except Exception as error:
                kill.problem = f"{type(error).__name__}: {error}"
            if kill.died:
                break
        done.append(kill)
        print(number, asdict(kill), flush=True)
    return done


def main(arguments):
    """Runs the kills, writes the record, and returns 0 where all runs ended as if nobody had killed them."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        table = work / "table.csv"
        rows = [f"my order never came {n},complaint\nlovely day {n},no complaint" for n in range(6)]
        table.write_text("\n".join(["Tweet text,Label", *rows]))
        wholes = {
            program: run_whole(program, work / f"whole-{number}", table)
            for number, program in enumerate(PROGRAMS)
        }
        done = attempts(arguments, wholes, work, table)
    ends = {"kills": done[: arguments.kills], "torn": done[arguments.kills :]}
    record = {
        kind: {
            "runs": len(kills),
            "died": sum(kill.died for kill in kills),
            "resumed": sum(kill.resumed for kill in kills),
            "from a checkpoint": sum(kill.resumed_from is not None for kill in kills),
            "equal": sum(kill.equal for kill in kills),
        }
        for kind, kills in ends.items()
    }
    record |= {
        "operations": {program: whole.operations for program, whole in wholes.items()},
        "seed": arguments.seed,
        "seconds": round(time.monotonic() - began),
        "moments": [asdict(kill) for kill in done],
    }
    if arguments.record is not None:
        arguments.record.parent.mkdir(parents=True, exist_ok=True)
        arguments.record.write_text(json.dumps(record, indent=1) + "\n")
    print({name: value for name, value in record.items() if name != "moments"})
    return 0 if all(kill.equal for kill in done) else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50, help="runs to kill with SIGKILL")
    parser.add_argument("--torn", type=int, default=0, help="runs to end inside of a write")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--record", type=Path, help="file for the figures")
    sys.exit(main(parser.parse_args()))
