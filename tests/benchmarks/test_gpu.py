"""The passes of `python -m benchmarks gpu`: their parts, and how they keep to their time."""

import json
import sys
import time

import pytest

from benchmarks import gpu
from benchmarks.__main__ import _parser, main
from benchmarks.records import newest_by_case, read_devices, records_since
from benchmarks.rehearsal import has_gpu


def python(code, seconds=30.0, **options):
    """A part that runs a few lines of Python, without torch."""
    return gpu.Part(seconds, lambda settings, limit: [sys.executable, "-c", code], **options)


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs parts as a pass of so many seconds; its exit code and its timeline by part."""
    monkeypatch.setattr(gpu, "GRACE", 0.5)

    def run(seconds=60.0, **parts):
        monkeypatch.setattr(gpu, "PARTS", parts)
        code = gpu.run_pass("trial", gpu.Pass(seconds, tuple(parts)), gpu.Settings(tmp_path, "abc"))
        timeline = json.loads((tmp_path / "pass-trial.json").read_text())
        assert (timeline["commit"], timeline["seconds"]) == ("abc", seconds)
        assert [entry["part"] for entry in timeline["parts"]] == list(parts)
        return code, {entry["part"]: entry for entry in timeline["parts"]}

    return run


def alive(pid):
    """Whether a process runs; one that has ended and was not waited for does not."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_part_that_hangs_is_stopped_at_its_limit_with_what_it_began(run, tmp_path, capsys):
    file = tmp_path / "pid"
    hangs = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"open({str(file)!r}, 'w').write(str(child.pid))\n"
        "print('it hangs', flush=True)\n"
        "time.sleep(60)"
    )
    code, parts = run(hangs=python(hangs, seconds=6), after=python("print('it goes on')"))
    assert code == 1
    assert parts["hangs"]["outcome"] == "stopped at its limit of 6 s"
    assert 5.9 < parts["hangs"]["ended"] - parts["hangs"]["began"] < 30
    assert parts["after"]["outcome"] == "done"
    assert not alive(int(file.read_text()))
    said = capsys.readouterr().out
    assert "    it hangs" in said
    assert "KeyboardInterrupt" in said
    log = (tmp_path / "pass-trial.log").read_text()
    assert log.index("== hangs") < log.index("it hangs") < log.index("== after") < log.index("it goes on")


def test_a_part_that_does_not_hear_the_interrupt_is_killed(run):
    deaf = "import signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nwhile True: time.sleep(1)"
    began = time.monotonic()
    code, parts = run(deaf=python(deaf, seconds=1))
    assert code == 1
    assert parts["deaf"]["outcome"].startswith("stopped")
    assert time.monotonic() - began < 30


@pytest.fixture
def clock(monkeypatch):
    """What a pass takes for the seconds since it began: those that its parts say they took."""
    clock = [0.0]
    monkeypatch.setattr(gpu.Timeline, "now", lambda self: clock[0])
    return clock


def taking(taken, clock, seconds, limits):
    """A part that takes some seconds by the clock, and notes how many it was given."""

    def command(settings, limit):
        clock[0] += taken
        limits.append(limit)
        return [sys.executable, "-c", ""]

    return gpu.Part(seconds, command)


def test_a_pass_of_few_seconds_leaves_the_rest_out_and_names_it(run, clock, capsys):
    limits = []
    code, parts = run(
        seconds=60.5,
        first=taking(41, clock, 50, limits),
        long=taking(1, clock, 60, limits),
        half=taking(1, clock, 38, limits),
        short=taking(1, clock, 15, limits),
    )
    assert code == 0
    assert [entry["outcome"].split(":")[0] for entry in parts.values()] == [
        "done",
        "left out",
        "done",
        "done",
    ]
    # The second finds less than half of its time; the third takes what is left, the grace aside.
    assert "long: left out: 19 s are left, it may take 60 s" in capsys.readouterr().out
    assert limits == [50, 19, 15]


def test_all_parts_run_even_where_one_fails(run, capsys):
    code, parts = run(
        fails=python("import sys; print('why it failed'); sys.exit(3)"),
        missing=gpu.Part(5.0, lambda settings, seconds: ["no-such-program"]),
        after=python(""),
    )
    assert code == 1
    assert [entry["outcome"] for entry in parts.values()] == [
        "failed: 3",
        "failed: it could not be begun",
        "done",
    ]
    said = capsys.readouterr().out
    assert "    why it failed" in said
    assert "no-such-program" in said


def test_a_part_on_the_cpu_runs_beside_the_next_and_ends_before_the_third(run):
    code, parts = run(
        beside=python("import time; time.sleep(4)", beside_next=True),
        second=python("import time; time.sleep(0.2)"),
        third=python(""),
    )
    assert code == 0
    assert parts["second"]["ended"] < parts["beside"]["ended"] <= parts["third"]["began"]
    code, parts = run(alone=python("import time; time.sleep(0.2)", beside_next=True))
    assert (code, parts["alone"]["outcome"]) == (0, "done")


def test_a_pass_that_is_interrupted_leaves_no_process(run, tmp_path, monkeypatch):
    file = tmp_path / "pid"

    def interrupted(seconds):
        if file.exists() and file.read_text().isdigit():
            monkeypatch.undo()
            raise KeyboardInterrupt
        sleep(seconds)

    sleep = time.sleep
    monkeypatch.setattr(gpu.time, "sleep", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(part=python(f"import os, time; open({str(file)!r}, 'w').write(str(os.getpid())); time.sleep(60)"))
    assert not alive(int(file.read_text()))
    (entry,) = json.loads((tmp_path / "pass-trial.json").read_text())["parts"]
    assert entry["outcome"] == "running"


# The second record that it writes comes with its death.
_KILLED = """
import os, signal
from benchmarks.__main__ import main
replaced, replace = [], os.replace
def killing(source, target):
    if replaced:
        os.kill(os.getpid(), signal.SIGKILL)
    replaced.append(target)
    replace(source, target)
os.replace = killing
main(["run", "--suite", "cpu", "--tiny", "--rounds", "1", "--variants", "softprompt", "--output", {output!r}])
"""


@pytest.mark.slow(seconds=20)
def test_the_record_of_a_part_that_was_killed_can_be_read(run, tmp_path, capsys):
    code, parts = run(seconds=200, steps=python(_KILLED.format(output=str(tmp_path)), seconds=180))
    assert code == 1
    assert parts["steps"]["outcome"] == "failed: -9"
    (device,) = read_devices([tmp_path])
    assert [found.name for found in device.steps] == ["article"]
    (record,) = records_since(tmp_path, "2000")
    assert list(newest_by_case([record])[0].variants) == ["peft", "softprompt"]
    assert "\narticle " in capsys.readouterr().out  # the short table at the end


@pytest.mark.parametrize("name", gpu.PARTS)
def test_a_part_runs_what_is_there(name, tmp_path):
    part = gpu.PARTS[name]
    for rehearsal in (False, True):
        command = part.command(gpu.Settings(tmp_path, "abc", rehearsal=rehearsal), 100.0)
        assert sys.executable in " ".join(command)
        if command[:3] == [sys.executable, "-m", "benchmarks"]:
            args = _parser().parse_args(command[3:])
            assert args.output == tmp_path
            assert rehearsal or args.budget == 85
            assert getattr(args, "tiny", rehearsal) == rehearsal
        for word in command:
            if word.startswith("tests/"):
                assert (gpu.ROOT / word).exists()
    assert not rehearsal or "TRITON_INTERPRET" in gpu.Settings(tmp_path, rehearsal=True).environment()
    assert gpu.Settings(tmp_path).environment()["SOFTPROMPT_NATIVE"] == "require"


def test_the_passes_fit_a_quarter_of_an_hour_and_nothing_is_timed_beside_something_else():
    assert {part for one in gpu.PASSES.values() for part in one.parts} == set(gpu.PARTS)
    assert gpu.PASSES["first"].seconds + gpu.PASSES["second"].seconds <= 750
    for one in gpu.PASSES.values():
        pairs = zip(one.parts, one.parts[1:], strict=False)
        assert all(after in ("every-kernel", "tests") for part, after in pairs if gpu.PARTS[part].beside_next)


def test_a_pass_of_the_command_line_is_of_its_parts_and_seconds(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(
        "benchmarks.__main__.run_pass",
        lambda name, wanted, settings: asked.append((name, wanted, settings)) or 0,
    )
    monkeypatch.setattr("benchmarks.__main__.has_gpu", lambda: True)
    common = ["gpu", "--output", str(tmp_path), "--commit", "abc"]
    assert main([*common, "--pass", "first", "second"]) == 0
    assert [(name, wanted) for name, wanted, _ in asked] == list(gpu.PASSES.items())[:2]
    assert asked[0][2] == gpu.Settings(tmp_path, "abc")
    asked.clear()
    assert main([*common, "--part", "bloom", "kernels", "--seconds", "70", "--rehearse"]) == 0
    assert asked == [
        ("parts", gpu.Pass(70, ("bloom", "kernels")), gpu.Settings(tmp_path, "abc", rehearsal=True))
    ]


def test_without_a_gpu_a_pass_is_refused(monkeypatch, capsys):
    monkeypatch.setattr("benchmarks.__main__.has_gpu", lambda: False)
    assert main(["gpu", "--pass", "first"]) == 2
    assert "--rehearse" in capsys.readouterr().err


@pytest.mark.slow(seconds=200)
@pytest.mark.skipif(has_gpu(), reason="there is a GPU")
@pytest.mark.parametrize("name", ["first", "second"])
def test_a_pass_runs_to_its_end_at_toy_sizes_and_leaves_few_files(name, tmp_path, capsys):
    assert main(["gpu", "--pass", name, "--rehearse", "--output", str(tmp_path)]) == 0, (
        capsys.readouterr().out
    )
    timeline = json.loads((tmp_path / f"pass-{name}.json").read_text())
    assert {entry["part"]: entry["outcome"] for entry in timeline["parts"]} == dict.fromkeys(
        gpu.PASSES[name].parts, "done"
    )
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) <= 8
    if name == "first":
        steps = newest_by_case(records_since(tmp_path, timeline["date"]))
        assert {"gpu-article", "ensemble", "generate-bloom", "8b"} <= {found.name for found in steps}
        compiled = next(found for found in steps if found.name == "gpu-article")
        assert compiled.variants["softprompt compile+graph"]["check"]["passed"]
