"""Thousands of steps in changing shapes: memory, tensors and caches stay where they are.

python tests/robustness/soak.py --steps 2000 --record benchmarks/results/robustness/soak.json
"""

import argparse
import gc
import sys
import time
from pathlib import Path

import torch

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS / "helpers"), str(TESTS), str(TESTS.parent)]

from generating import speaker  # noqa: E402
from parity import make_batch  # noqa: E402
from robustness.records import write_record  # noqa: E402
from tiny_models import prompt_config, prompted  # noqa: E402

import softprompt  # noqa: E402
from softprompt import state  # noqa: E402
from softprompt.engine import cuda_graph, model_records  # noqa: E402

CACHES = {
    "states": state._MODELS,
    "records": model_records._RECORDS,
}


def lengths_of(step):
    """One to five texts of up to 24 tokens, in another shape at almost every step."""
    return [1 + (step * 7 + row * 5) % 24 for row in range(1 + step % 5)]


def resident_bytes():
    """Memory of this process that lies in RAM."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * 4096


def sizes():
    """What must not grow."""
    gc.collect()
    tensors = sum(1 for thing in gc.get_objects() if isinstance(thing, torch.Tensor))
    return {
        "tensors": tensors,
        "objects": len(gc.get_objects()),
        **{name: len(cache) for name, cache in CACHES.items()},
    }


def training():
    """Training steps of a patched model, recorded or not."""
    model = softprompt.patch(prompted("llama", torch.float32), on_unsupported="error")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)

    def step(number):
        batch = make_batch(lengths_of(number), side=("left", "right")[number % 2], labels="everywhere")
        output = model(**batch)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if number % 3 == 0:
            output.logits.argmax(-1)

    return step


def recorded_training():
    """Training steps that are recorded and replayed: by running them again, without a GPU."""
    cuda_graph.RECORDERS["cpu"] = cuda_graph.RerunRecorder()
    return training()


def generating():
    """`generate` with the prompt kept from call to call; now and then the prompt changes."""
    model = softprompt.patch(speaker("llama", dtype=torch.float32), on_unsupported="error")
    prompt = model.prompt_encoder["default"].embedding.weight

    def step(number):
        batch = make_batch(lengths_of(number), side="left", labels=None)
        model.generate(**batch, max_new_tokens=1 + number % 4)
        if number % 10 == 0:
            with torch.no_grad():
                prompt.add_(0.01)

    return step


def adapters():
    """Adapters that come and go, and the patch with them."""
    model = prompted("llama", torch.float32)
    base, batch = model.get_base_model(), make_batch(labels="everywhere")

    def step(number):
        name = f"adapter-{number}"
        model.add_adapter(name, prompt_config(base, 1 + number % 6))
        softprompt.patch(model, on_unsupported="error", logits=("full", "text")[number % 2])
        model.set_adapter(name)
        model(**batch).loss.backward()
        model(**batch, adapter_names=[name, "default", name]).loss.backward()
        model.generate(input_ids=batch["input_ids"][:1], max_new_tokens=1)
        model.zero_grad()
        softprompt.unpatch(model)
        model.delete_adapter(name)
        model.set_adapter("default")

    return step


LOOPS = {
    "training": training,
    "recorded training": recorded_training,
    "generate": generating,
    "adapters that come and go": adapters,
}


def soak(name, steps, warm):
    """Sizes after the warm steps and at the end. RSS is compared between the middle and the end."""
    step = LOOPS[name]()
    start = time.perf_counter()
    try:
        for number in range(warm):
            step(number)
        before = sizes()
        for number in range(warm, steps):
            if number == (warm + steps) // 2:
                gc.collect()
                middle = resident_bytes()
            step(number)
        after, end = sizes(), resident_bytes()
    finally:
        cuda_graph.RECORDERS.pop("cpu", None)
    return {
        "loop": name,
        "steps": steps,
        "seconds": round(time.perf_counter() - start, 1),
        "before": before,
        "after": after,
        "grown": {key: after[key] - before[key] for key in after},
        "resident_bytes": {"middle": middle, "end": end, "grown": end - middle},
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000, help="of each loop")
    parser.add_argument("--record", type=Path, help="a JSON file that gets the results")
    args = parser.parse_args()
    rows = []
    for name in LOOPS:
        rows.append(soak(name, args.steps, args.steps // 4))
        print(
            {key: rows[-1][key] for key in ("loop", "steps", "seconds", "grown", "resident_bytes")},
            flush=True,
        )
    grown = [row["loop"] for row in rows if row["grown"]["tensors"] > 0 or row["grown"]["objects"] > 500]
    if args.record:
        command = f"python tests/robustness/soak.py --steps {args.steps}"
        what = "steps in changing shapes, and what grew after the first quarter of them"
        write_record(args.record, {"what": what, "command": command, "grown": grown, "loops": rows})
    return 1 if grown else 0


if __name__ == "__main__":
    raise SystemExit(main())
