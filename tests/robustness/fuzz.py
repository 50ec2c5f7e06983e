"""Thousands of random batches against PEFT, and a record of what came out.

python tests/robustness/fuzz.py --batches 2000 --record benchmarks/results/robustness/fuzz.json
"""

import argparse
import sys
import time
from pathlib import Path

import hypothesis

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS / "helpers"), str(TESTS), str(TESTS.parent)]

import fuzzing  # noqa: E402
from robustness.records import write_record  # noqa: E402
from tiny_models import PADDED  # noqa: E402


def fuzz(name, batches, seed):
    """Runs so many batches through a model; hypothesis makes the first failing one as small as it can."""
    errors = fuzzing.Errors()

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=batches,
        deadline=None,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(case=fuzzing.cases(compact=name not in PADDED))
    def run(case):
        fuzzing.check(name, case, errors)

    start, failures = time.perf_counter(), []
    try:
        run()
    except Exception as error:  # whatever it is, the other models are run too
        failures.append("\n".join([f"{type(error).__name__}: {error}", *getattr(error, "__notes__", ())]))
    return {
        "architecture": name,
        "batches": errors.batches,
        "failures": failures,
        "largest_errors": {
            "loss": errors.loss,
            "gradient": errors.gradient,
            "logits": errors.logits,
        },
        "seconds": round(time.perf_counter() - start, 1),
        "made_of": dict(sorted(errors.traits.items())),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, default=2000, help="of all architectures together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", type=Path, help="a JSON file that gets the results")
    args = parser.parse_args()
    count = len(fuzzing.MODELS)
    rows = []
    for number, name in enumerate(fuzzing.MODELS):
        rows.append(fuzz(name, args.batches // count + (number < args.batches % count), args.seed))
        print({key: value for key, value in rows[-1].items() if key != "made_of"}, flush=True)
    failures = sum(len(row["failures"]) for row in rows)
    if args.record:
        write_record(
            args.record,
            {
                "what": "random batches through a patched model and through PEFT",
                "command": f"python tests/robustness/fuzz.py --batches {args.batches} --seed {args.seed}",
                "batches": sum(row["batches"] for row in rows),
                "failures": failures,
                "architectures": rows,
            },
        )
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
