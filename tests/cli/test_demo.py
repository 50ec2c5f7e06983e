import itertools

import pytest

from softprompt import tiny


@pytest.fixture
def few_rows(monkeypatch, tmp_path):
    """Evaluate on the first rows of the shipped table only."""
    with tiny.eval_table().open(encoding="utf-8") as file:
        (tmp_path / "few.csv").write_text("".join(itertools.islice(file, 25)), encoding="utf-8")
    monkeypatch.setattr(tiny, "eval_table", lambda: tmp_path / "few.csv")


@pytest.mark.slow
@pytest.mark.usefixtures("few_rows", "rendered")
def test_both_sides_train_the_same_and_softprompt_needs_less_memory(run, tmp_path, read_json):
    code, out, _ = run("demo", "--steps", 16, "--output", tmp_path / "demo")
    assert code == 0
    scores = read_json(tmp_path / "demo" / "demo.json")
    plain, patched = scores["sides"]
    assert (plain["name"], patched["name"]) == ("plain PEFT", "softprompt")
    assert len(plain["losses"]) == len(patched["losses"]) == len(plain["milliseconds"]) == 16
    assert scores["largest_loss_difference"] < 1e-4
    assert max(plain["losses"][:3]) > 5 * plain["losses"][-1]
    assert patched["peak_bytes"] < plain["peak_bytes"] / 2
    assert (
        plain["accuracy_before"]
        == patched["accuracy_before"]
        < plain["accuracy_after"]
        == patched["accuracy_after"]
    )
    assert "Model and tweets are synthetic" in out
    assert (tmp_path / "demo" / "demo.png").read_bytes().startswith(b"\x89PNG")


def test_an_output_that_is_a_file_is_one_line(run, tmp_path):
    (tmp_path / "file").write_text("precious")
    code, _, err = run("demo", "--output", tmp_path / "file")
    assert code == 2
    assert err == f"softprompt: --output {tmp_path / 'file'} is a file: name a folder\n"
