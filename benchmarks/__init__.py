"""Speed and memory of softprompt beside its peers: `python -m benchmarks run`, then `... report`.

cases.py     what is run: shapes, batches, targets, suites, all as data
texts.py     how long real texts are
variants.py  who runs it
limits.py    how fast it can get at all: tokens, FLOP, bytes, and what the device does per second
run.py       the runner: check, then time, then memory
real.py      a real model on real tweets: the first steps beside PEFT, then `softprompt train`
machine.py   what a record says of the device and the software
report.py    the tables of the README; charts.py draws its pictures
results/     the records, one folder a device
"""

import os

# The profiler that counts memory would announce its start and end; it reads this when torch is imported.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
