"""A recorder that behaves like a CUDA graph without a GPU: it plays back the operations of one run.

Python is not run again. Every operation gets the very tensors of the recording, and writes its results into
the very tensors that it made then. What the host knew during the recording (sizes, numbers, branches) is
frozen, and a value that the host reads is refused, as in a real capture.
"""

import contextlib

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from softprompt.engine.cuda_graph import RecordingError

_READS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "equal")


class TapeRecorder:
    """See `softprompt.engine.cuda_graph.Recorder`; `replays` counts what was played back."""

    runs_python = False

    def __init__(self):
        self.replays = 0

    def record(self, run, device):
        run()  # the warm-up: tables that are made once do not belong on the tape
        tape = _Tape()
        with tape:
            run()

        def replay():
            self.replays += 1
            with torch.no_grad():
                for func, args, kwargs, made in tape.operations:
                    _play(func, args, kwargs, made)

        replay()
        return replay

    def turn(self, device):
        return contextlib.nullcontext()


class _Tape(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[-1]
        indices = args[1] if name in ("index", "index_put", "index_put_") else ()
        if name in _READS or any(i is not None and i.dtype == torch.bool for i in indices):
            raise RecordingError(f"the host reads the result of {name}")
        made = func(*args, **kwargs)
        if name != "detach":  # an alias: what it stands for is played back
            self.operations.append((func, args, kwargs, made))
        return made


def _play(func, args, kwargs, made):
    given = {t.untyped_storage().data_ptr() for t in tree_flatten((args, kwargs))[0] if torch.is_tensor(t)}
    again = func(*args, **kwargs)
    for old, new in zip(tree_flatten(made)[0], tree_flatten(again)[0], strict=True):
        # Views and operations in place have already written where the recording's tensors look.
        if torch.is_tensor(new) and new.untyped_storage().data_ptr() not in given and new.numel():
            old.copy_(new)
