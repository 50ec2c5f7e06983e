"""Checks that run in two processes: started once for all checks of a module, reported one by one.

`python ranks.py MODULES FOLDER` runs in each process, behind torchrun or `accelerate launch`. It calls the
functions `check_*` of the modules (divided by commas) in their order and writes what became of each into
`FOLDER/rank-N.json`.
"""

import importlib
import json
import os
import signal
import subprocess
import sys
import traceback
from datetime import timedelta
from pathlib import Path

WORLD_SIZE = 2
TESTS = Path(__file__).parents[1]
TORCHRUN = (
    "-m",
    "torch.distributed.run",
    "--standalone",
    "--local-addr=127.0.0.1",
    f"--nproc-per-node={WORLD_SIZE}",
)
ACCELERATE = (
    "-m",
    "accelerate.commands.launch",
    "--multi_gpu",  # two processes; ACCELERATE_USE_CPU puts both on the CPU
    f"--num_processes={WORLD_SIZE}",
    "--num_machines=1",
    "--mixed_precision=no",
    "--dynamo_backend=no",
    "--main_process_port=0",
)
_BACKEND_TIMEOUT = timedelta(seconds=20)  # what waits longer hangs


def checks_of(module):
    """Names of the checks of a module, as in the file."""
    return [name for name in vars(module) if name.startswith("check_")]


def launch(modules, folder, *, launcher=TORCHRUN, seconds=120, environment=()):
    """Runs the checks of some modules in two processes.

    Args:
        modules: their names.
        folder: an empty one, for the reports.
        launcher: arguments of the interpreter that start the processes.
        seconds: after which they are killed.
        environment: more variables.

    Returns:
        For each check that both ranks ended, what rank 0 returned, or a dictionary with `error`.
    """
    command = [sys.executable, *launcher, str(Path(__file__)), ",".join(modules), str(folder)]
    folders = (TESTS.parent, TESTS, TESTS / "helpers", TESTS / "distributed")
    paths = [*map(str, folders), os.environ.get("PYTHONPATH", "")]
    variables = os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": "1",
        **dict(environment),
    }
    for name in ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK"):
        variables.pop(name, None)
    with open(folder / "output.txt", "w") as output:
        process = subprocess.Popen(
            command, env=variables, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            process.wait(seconds)
            ending = f"exit code {process.returncode}"
        except subprocess.TimeoutExpired:
            ending = f"killed after {seconds} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    reports = [_report(folder, rank) for rank in range(WORLD_SIZE)]
    tail = (folder / "output.txt").read_text()[-3000:]
    names = {name: None for report in reports for name in report}
    found = {}
    for name in names:
        missing = {"error": f"it did not end ({ending}); the last lines of the output:\n{tail}"}
        both = [report.get(name, missing) for report in reports]
        found[name] = next((one for one in both if "error" in one), both[0])
    return found, f"{ending}; the last lines of the output:\n{tail}"


def outcome(launched, name):
    """What a check returned on rank 0; an AssertionError where it failed on any rank or did not run."""
    found, ending = launched
    failed = next((other for other, one in found.items() if "error" in one), None)
    assert name in found, f"it was not reached: {ending if failed is None else failed + ' failed'}"
    assert "error" not in found[name], found[name]["error"]
    return found[name]["value"]


def _report(folder, rank):
    path = folder / f"rank-{rank}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def _in_step():
    """Whether the other rank comes here, too; after a failure on one alone it would wait for ever."""
    import torch

    try:
        torch.distributed.monitored_barrier(timeout=timedelta(seconds=5))
    except RuntimeError:
        return False
    return True


def main(modules, folder):
    """Runs the checks of some modules in this process."""
    import torch

    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    loaded = [importlib.import_module(name) for name in modules.split(",")]
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", timeout=_BACKEND_TIMEOUT)
    report = {}
    for checks, name in [(module, name) for module in loaded for name in checks_of(module)]:
        key = f"{checks.__name__}.{name}"
        print(f"rank {rank}: {key}", flush=True)
        try:
            report[key] = {"value": getattr(checks, name)(rank)}
        except BaseException:
            report[key] = {"error": f"rank {rank}: {traceback.format_exc()}"}
        unfinished = Path(folder) / f"rank-{rank}.unfinished"
        unfinished.write_text(json.dumps(report))
        unfinished.replace(Path(folder) / f"rank-{rank}.json")
        if "error" in report[key] and not _in_step():
            break
    sys.stdout.flush()
    os._exit(0)  # a rank that failed would let the other one wait for it


if __name__ == "__main__":
    main(*sys.argv[1:])
