"""One case: every variant is built, checked, measured and timed; one that cannot is named with the reason.

A recorded step keeps its memory between the steps. Where the recorded steps of all variants do not fit beside
the largest step, each is timed in a sitting of its own with an anchor of the first sitting beside it (PEFT
where that fits, or softprompt's eager step), and its ratio to PEFT is the product of the two ratios. Where
not even an anchor fits beside it, it is timed alone, after the others, and its ratio is that of the medians.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.cases import Case, StepBatch
from benchmarks.gate import Truth, truth_of
from benchmarks.memory import Before, allocated, capacity, look_before, peak_of
from benchmarks.runner import Runner, make_runner
from benchmarks.timing import WARM_UP_ROUNDS, Budget, interleaved, summary
from benchmarks.variants import REFERENCE, Variant
from softprompt.engine.cuda_graph import first_line

_ROOM = 0.85  # of the GPU's memory that steps may fill side by side

Record = dict[str, Any]


class StepFailed(RuntimeError):
    """A variant failed while it was timed."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(reason)
        self.name, self.reason = name, reason


class Contest:
    """One case.

    Args:
        case: what is run.
        base: the model that the variants share.
        batch: of the case.
        rounds: timed steps of each variant.
        budget: of the run.
        reserved: seconds of the budget that later cases need.
        strict: raise what fails, as on a CPU, where nothing is missing.
    """

    def __init__(
        self,
        case: Case,
        base: Any,
        batch: StepBatch,
        *,
        rounds: int,
        budget: Budget,
        reserved: float = 0.0,
        strict: bool = False,
    ) -> None:
        self.case, self.base, self.batch = case, base, batch
        self._rounds, self._budget, self._reserved, self._strict = rounds, budget, reserved, strict
        self._prompts: list[torch.Tensor] | None = None
        self.truth: Truth | None = None
        self.records: dict[str, Record] = {}
        self._waiting: list[Variant] = []  # not begun yet
        self.ratio_to: str | None = None

    def run(self, variants: Sequence[Variant]) -> list[Record]:
        """The records of the variants that serve cases of this kind, in their order."""
        serving = [variant for variant in variants if self.case.kind in variant.kinds]
        self._waiting = list(serving)
        for variant in serving:
            self.records[variant.name] = {
                "name": variant.name,
                "about": variant.about,
                "own": variant.own,
                "check": None,
                "time": None,
                "peak_bytes": None,
                "reason": None,
            }
        reference = self._reference() if REFERENCE in serving else None
        runners = [] if reference is None else [reference]
        others = [variant for variant in serving if variant is not REFERENCE]
        runners += self._admitted([variant for variant in others if not variant.keeps_memory])
        keepers = [variant for variant in others if variant.keeps_memory]
        apart = [] if self._fit_together(keepers) else keepers
        if not apart:
            runners += self._admitted(keepers)
        self._time(runners)
        runners.clear()
        reference = None
        for variant in apart:
            self._time_apart(variant)
        return [self.records[variant.name] for variant in serving]

    def truth_description(self) -> Record | None:
        """What the variants were compared with, and how far off they may be."""
        if self.truth is None:
            return None
        return {
            "source": self.truth.source,
            "allowed_loss": self.truth.allowed_loss,
            "allowed_gradient": self.truth.allowed_gradient,
        }

    def _reference(self) -> Runner | None:
        """PEFT, admitted, and the truth."""
        before = look_before(self.case.device, own=False)
        runner = self._guarded(REFERENCE, lambda: self._warmed_up(REFERENCE))
        # Without PEFT on the whole batch, PEFT on a few rows at a time says what is right.
        self.truth = truth_of(self.case, self.base, self.batch, runner)
        if runner is None:
            return None
        self._prompts = [prompt.detach().clone() for prompt in runner.prompts]
        return self._guarded(REFERENCE, lambda: self._check(runner, before))

    def _warmed_up(self, variant: Variant) -> Runner:
        runner = make_runner(variant, self.base, self.case, self.batch, self._prompts)
        for _ in range(1 if self._strict else variant.warm_up):
            runner.forward_backward()
            runner.forget()
        return runner

    def _admitted(self, variants: Sequence[Variant]) -> list[Runner]:
        """Runners of those that may be timed; the others have a reason, or a failed check."""
        return [runner for variant in variants if (runner := self._admit(variant)) is not None]

    def _admit(self, variant: Variant) -> Runner | None:
        record = self.records[variant.name]
        # What stands before it in the order of importance may be built after it, and needs its time, too.
        ahead = self._waiting[: self._waiting.index(variant)]
        self._waiting.remove(variant)
        reserved = self._reserved + sum(other.seconds(self.case) for other in ahead)
        record["reason"] = variant.obstacle() or self._budget.refuses(variant.seconds(self.case), reserved)
        if record["reason"] is not None:
            return None
        before = look_before(self.case.device, own=variant.own)
        return self._guarded(variant, lambda: self._check(self._warmed_up(variant), before))

    def _check(self, runner: Runner, before: Before) -> Runner | None:
        """The check, then the memory. Of replays the worst of two counts: one may differ from the next."""
        if self.truth is None:
            raise ValueError(f"{self.case.name}: nothing to compare with")
        record = self.records[runner.name]
        steps = 2 if runner.variant.keeps_memory else 1
        checks = [self.truth.check(*runner.loss_and_gradient()) for _ in range(steps)]
        record["check"] = next((check for check in checks if not check["passed"]), checks[-1])
        record["reason"] = runner.variant.doubt(runner.model)
        if record["reason"] is not None or not record["check"]["passed"]:
            return None
        record["peak_bytes"] = peak_of(runner, self.case, before)
        return runner

    def _guarded(self, variant: Variant, work: Callable[[], Runner | None]) -> Runner | None:
        """What `work` returns; where it fails, the record says why."""
        if self._strict:
            return work()
        try:
            return work()
        except Exception as error:  # a peer may fail in any way, and that must not end the run
            self._refuse(variant.name, reason_of(error))
        gc.collect()
        self._empty_cache()
        return None

    def _refuse(self, name: str, reason: str) -> None:
        self.records[name].update(reason=reason, time=None, peak_bytes=None)

    def _fit_together(self, keepers: Sequence[Variant]) -> bool:
        if self.case.device != "cuda" or not keepers:
            return True
        peaks = {name: record["peak_bytes"] for name, record in self.records.items()}
        own, theirs = peaks.get("softprompt eager"), peaks.get(REFERENCE.name)
        if own is None or theirs is None:
            return False
        kept = sum(own if variant.own else theirs for variant in keepers)
        largest = max(peak for peak in peaks.values() if peak is not None)
        return bool(allocated("cuda") + kept + largest <= _ROOM * capacity())

    def _time(self, runners: list[Runner]) -> None:
        """The first sitting: all that passed, side by side."""
        seconds = self._sitting(runners)
        if not seconds:
            return
        self.ratio_to = REFERENCE.name if REFERENCE.name in seconds else next(iter(seconds))
        for name, own in seconds.items():
            self.records[name]["time"] = summary(own, seconds[self.ratio_to])

    def _anchor(self, variant: Variant) -> Variant | None:
        """Who sits beside a variant that is timed apart; None: nobody fits."""
        from benchmarks.variants import OURS

        twin = OURS[0] if variant.own else REFERENCE  # keeps about what a step of its eager twin needs
        kept = self.records.get(twin.name, {}).get("peak_bytes")
        for anchor in (REFERENCE, OURS[0]):
            record = self.records.get(anchor.name, {})
            if record.get("time") and (kept is None or self._leaves_room(kept + (record["peak_bytes"] or 0))):
                return anchor
        return None

    def _leaves_room(self, needed: int) -> bool:
        return self.case.device != "cuda" or bool(allocated("cuda") + needed <= _ROOM * capacity())

    def _time_apart(self, variant: Variant) -> None:
        self._empty_cache()
        anchor = self._anchor(variant)
        runner = self._admit(variant)
        if runner is None:
            return
        runners = [runner]
        if anchor is not None:
            try:
                runners.insert(0, self._warmed_up(anchor))
            except torch.OutOfMemoryError:
                anchor = None  # it did not fit after all; the record says that the variant was timed alone
        seconds = self._sitting(runners)
        if variant.name not in seconds:
            return
        own = seconds[variant.name]
        record = summary(own)
        if anchor is not None and anchor.name in seconds:
            pairs = zip(seconds[anchor.name], own, strict=True)
            known = self.records[anchor.name]["time"]["ratio"]
            record["ratio"] = known * statistics.median(theirs / ours for theirs, ours in pairs)
            record["ratio_through"] = anchor.name
        elif self.ratio_to is not None:
            record["ratio"] = self.records[self.ratio_to]["time"]["p50"] / record["p50"]
            record["ratio_through"] = "medians, timed alone"
        self.records[variant.name]["time"] = record
        runners.clear()
        if not variant.own and self.case.device == "cuda":
            torch._dynamo.reset()

    def _sitting(self, runners: list[Runner]) -> dict[str, list[float]]:
        """Seconds of the steps; who fails is dropped, and the others start again."""
        while runners:
            failed: tuple[str, str] | None = None
            try:
                return interleaved(
                    {runner.name: _named(runner) for runner in runners},
                    self._rounds,
                    self.case.device,
                    warm_up=WARM_UP_ROUNDS if self._strict else 1,
                    seconds_left=self._budget.left(self._reserved),
                )
            except StepFailed as error:
                if self._strict:
                    raise
                failed = error.name, error.reason
            # Outside of the handler, where the failed step's tensors are no longer held by its traceback.
            name, reason = failed
            self._refuse(name, f"while it was timed beside the others: {reason}")
            runners[:] = [runner for runner in runners if runner.name != name]
            self._empty_cache()
        return {}

    def _empty_cache(self) -> None:
        gc.collect()
        if self.case.device == "cuda":
            torch.cuda.empty_cache()


def _named(runner: Runner) -> Callable[[], None]:
    def step() -> None:
        try:
            runner.step()
        except Exception as error:
            raise StepFailed(runner.name, reason_of(error)) from error

    return step


def reason_of(error: Exception) -> str:
    """One sentence."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    return first_line(error)[:300]
