"""Speed and memory of softprompt beside its peers: `python -m benchmarks run`, then `... report`.

cases.py     what is run: shapes, batches, targets, suites, all as data
texts.py     how long real texts are
variants.py  who runs it
limits.py    how fast it can get at all: tokens, FLOP, bytes, and what the device does per second
run.py       the runner: check, then time, then memory
machine.py   what a record says of the device and the software
report.py    the tables of the README; charts.py draws its pictures
results/     the records, one folder a device
"""
