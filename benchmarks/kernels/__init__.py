"""`python -m benchmarks run --suite kernels`: the ops one by one, beside their peers.

cases.py      sizes and targets, as data
problem.py    what a case is made of: inputs, variants, truth, floor
rows.py       embed_prompt, pack_layout, prepend_prompt
head.py       linear_cross_entropy
attention.py  shared_prompt_attention; flex.py and padded.py are its peers
clock.py      GPU time without launches: CUDA-graph replays, or events around many calls
run.py        the runner: check, then time
"""
