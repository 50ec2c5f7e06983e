"""Cases of `generate`: the prefill (one new token) and the whole, checked by their logits."""

from __future__ import annotations

import copy
import gc
import math
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import PAD_TOKEN
from benchmarks.contest import Contest, Record, reason_of
from benchmarks.gate import Truth
from benchmarks.memory import allocated
from benchmarks.runner import Runner, make_runner
from benchmarks.timing import interleaved, summary
from benchmarks.variants import REFERENCE, Variant


class GenerationContest(Contest):
    """One case of `generate`, for PEFT and the patched model.

    Random weights are no teacher: two logits can be so close that rounding decides, after which the tokens
    differ. Logits are compared with PEFT's in fp32 in every row as long as its tokens are the same, and the
    share of equal tokens is recorded.
    """

    def run(self, variants: Any) -> list[Record]:
        """See `Contest.run`."""
        serving = [variant for variant in variants if self.case.kind in variant.kinds]
        wide = copy.deepcopy(self.base).float()
        tokens, logits = self._generated(self._model(REFERENCE, wide))
        del wide
        gc.collect()
        admitted: list[tuple[Variant, Any]] = []
        allowed = math.inf
        for variant in serving:
            record = self.records[variant.name] = {
                "name": variant.name,
                "about": variant.about,
                "own": variant.own,
                "check": None,
                "time": None,
                "prefill": None,
                "peak_bytes": None,
                "reason": None,
            }
            before = allocated(self.case.device)
            try:
                model = self._model(variant, self.base)
                own_tokens, own_logits = self._generated(model)
                error, same = _compare(own_tokens, own_logits, tokens, logits)
                if variant is REFERENCE:
                    allowed = 2 * error + self.case.gradient_tolerance
                    self.truth = Truth(0, logits[0], "logits of PEFT in float32", 0, allowed)
                record["check"] = {
                    "logit_error": error if math.isfinite(error) else None,
                    "equal_tokens": same,
                    "passed": error <= allowed,
                }
                if not record["check"]["passed"]:
                    continue
                record["peak_bytes"] = self._peak(model, before)
            except Exception as error_met:
                if self._strict:
                    raise
                record["reason"] = reason_of(error_met)
                continue
            admitted.append((variant, model))
        for part, new_tokens in (("prefill", 1), ("time", self.case.new_tokens)):
            self._time_part(admitted, part, new_tokens)
        return [self.records[variant.name] for variant in serving]

    def _model(self, variant: Variant, base: Any) -> Any:
        runner: Runner = make_runner(variant, base, self.case, self.batch)
        model = runner.model.eval()
        base.generation_config.eos_token_id = None  # all rows have all tokens
        base.generation_config.pad_token_id = PAD_TOKEN
        return model

    def _generate(self, model: Any, new_tokens: int, **options: Any) -> Any:
        with torch.no_grad():
            return model.generate(
                input_ids=self.batch.inputs["input_ids"],
                attention_mask=self.batch.inputs["attention_mask"],
                do_sample=False,
                max_new_tokens=new_tokens,
                **options,
            )

    def _generated(self, model: Any) -> tuple[Tensor, list[Tensor]]:
        """[B, n] new tokens and n [B, V] logits."""
        out = self._generate(model, self.case.new_tokens, output_logits=True, return_dict_in_generate=True)
        new = out.sequences[:, -self.case.new_tokens :]
        return new, [step.float() for step in out.logits]

    def _peak(self, model: Any, before: int) -> int | None:
        if self.case.device != "cuda":
            return None
        torch.cuda.reset_peak_memory_stats()
        self._generate(model, self.case.new_tokens)
        torch.cuda.synchronize()
        return int(torch.cuda.max_memory_allocated() - before)

    def _time_part(self, admitted: list[tuple[Variant, Any]], part: str, new_tokens: int) -> None:
        steps = {
            variant.name: (lambda model=model: self._generate(model, new_tokens))
            for variant, model in admitted
        }
        seconds = interleaved(
            steps,
            self._rounds,
            self.case.device,
            warm_up=1,
            seconds_left=self._budget.left(self._reserved),
        )
        if not seconds:
            return
        self.ratio_to = next(iter(seconds))
        for name, own in seconds.items():
            self.records[name][part] = summary(own, seconds[self.ratio_to])


def _compare(
    tokens: Tensor, logits: list[Tensor], true_tokens: Tensor, true_logits: list[Tensor]
) -> tuple[float, float]:
    """Error of the logits in rows whose tokens were equal so far, and the share of equal tokens."""
    alike = torch.ones(tokens.shape[0], dtype=torch.bool, device=tokens.device)
    off, size = 0.0, 0.0
    for step, (own, true) in enumerate(zip(logits, true_logits, strict=True)):
        off += float((own[alike] - true[alike]).double().square().sum())
        size += float(true[alike].double().square().sum())
        alike &= tokens[:, step] == true_tokens[:, step]
    return math.sqrt(off / size), float((tokens == true_tokens).double().mean())
