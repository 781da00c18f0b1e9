"""How contenders are compared: checked against each other once, then timed in turns.

Owns: the clock. A round times every contender once, in an order that rotates; the ratio of two contenders is the median
over rounds of their ratio within a round, so that a machine that slows down slows both. A contender that computes
something else, or fails, is listed with the reason and never timed.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

_FLUSH_BYTES = 256 * 2**20  # more than any GPU's L2
_MOST_RUNS = 1000  # of a contender in a round
_FEWEST_ROUNDS, _ENOUGH_SECONDS = 3, 30.0  # a slow case has fewer rounds


@dataclass
class Contender:
    """One way to compute a case's loss and gradients."""

    name: str
    run: Callable[[], Tensor]
    """Forward and backward; the loss."""
    leaves: Sequence[Tensor] = ()
    """Where gradients land; cleared after each run, outside of the timed region."""
    prepare: Callable[[], None] | None = None
    """Before each run, outside of the timed region."""
    gradient: Callable[[], Tensor] | None = None
    """The gradient to compare with that of `against`, after a run."""
    against: str = ""
    """The contender it must agree with and whose time its own is divided by; none for ours."""
    work: float = math.nan
    """Bytes or FLOP that it is credited with; those of the case if it is not said."""

    def clear(self) -> None:
        for leaf in self.leaves:
            leaf.grad = None


@dataclass
class Case:
    """What is compared at one shape and storage type."""

    name: str
    shape: str
    contenders: list[Contender]
    unit: Literal["B", "FLOP"]
    """What `work` counts."""
    work: float
    """What the operation needs at the least: bytes moved or FLOP."""
    counted: str
    """How `work` was counted."""
    ceiling: Contender
    """A copy of a large buffer or a matrix product, timed in the same rounds; its `work` is its own."""
    tolerance: float
    """Of the losses, relative; gradients may differ three times as much, in norm."""
    clock: Literal["wall", "device"] = "device"
    """On a GPU: until the host sees the end, launches included, or the device's own time."""
    absent: dict[str, str] = field(default_factory=dict)
    """Contenders that cannot run here, and why."""
    pairs: list[tuple[str, str, str]] = field(default_factory=list)
    """(label, slow, fast): more ratios of times to report."""
    memory: Sequence[str] = ()
    """Contenders whose peak memory is measured on a CPU, each in a process of its own."""


class Clock:
    """Seconds a run."""

    def __init__(self, device: torch.device, kind: Literal["wall", "device"]) -> None:
        self._cuda, self._kind = device.type == "cuda", kind
        self._flush = torch.empty(_FLUSH_BYTES if self._cuda else 0, dtype=torch.uint8, device=device)

    def sample(self, contender: Contender, runs: int) -> float:
        """The mean over some runs, after each other."""
        if not self._cuda:
            return self._on_cpu(contender, runs)
        return self._on_device(contender, runs) if self._kind == "device" else self._until_host(contender, runs)

    def _on_cpu(self, contender: Contender, runs: int) -> float:
        spent = 0.0
        for _ in range(runs):
            if contender.prepare:
                contender.prepare()
            start = time.perf_counter()
            contender.run()
            spent += time.perf_counter() - start
            contender.clear()
        return spent / runs

    def _until_host(self, contender: Contender, runs: int) -> float:
        spent = 0.0
        for _ in range(runs):
            if contender.prepare:
                contender.prepare()
            self._flush.zero_()
            torch.cuda.synchronize()
            start = time.perf_counter()
            contender.run()
            torch.cuda.synchronize()
            spent += time.perf_counter() - start
            contender.clear()
        return spent / runs

    def _on_device(self, contender: Contender, runs: int) -> float:
        make: Callable[..., Any] = torch.cuda.Event
        events = [(make(enable_timing=True), make(enable_timing=True)) for _ in range(runs)]
        for start, end in events:
            if contender.prepare:
                contender.prepare()
            self._flush.zero_()  # the host launches the run while this is under way
            start.record()
            contender.run()
            end.record()
            contender.clear()
        torch.cuda.synchronize()
        return sum(float(start.elapsed_time(end)) for start, end in events) / 1000 / runs


def measure(case: Case, device: torch.device, rounds: int, seconds: float) -> dict[str, Any]:
    """Check and time all contenders of a case.

    Args:
        case: what to compare.
        device: where.
        rounds: how often each has its turn; less often where that takes long.
        seconds: how long a turn lasts, at least one run.
    """
    clock = Clock(device, case.clock)
    checked = _checked(case, device)
    fit = [c for c in case.contenders if "reason" not in checked[c.name]]
    runs = {c.name: _runs(clock, c, seconds) for c in (*fit, case.ceiling)}
    turns = [*fit, case.ceiling]
    times: dict[str, list[float]] = {c.name: [] for c in turns}
    gc.collect()
    gc.disable()
    begin = time.monotonic()
    try:
        for number in range(rounds):
            if number >= _FEWEST_ROUNDS and time.monotonic() - begin > _ENOUGH_SECONDS:
                break
            first = number % len(turns)  # no contender always runs after the same one
            for contender in turns[first:] + turns[:first]:
                times[contender.name].append(clock.sample(contender, runs[contender.name]))
    finally:
        gc.enable()
    rate = [case.ceiling.work / t for t in times[case.ceiling.name]]
    return {
        "shape": case.shape,
        "unit": case.unit,
        "work": case.work,
        "counted": case.counted,
        "clock": case.clock if device.type == "cuda" else "wall",
        "ceiling": {"what": case.ceiling.name, "per_second": statistics.median(rate), "rounds": rate},
        "contenders": {
            c.name: checked[c.name] if c not in fit else {**checked[c.name], **_summary(case, c, times, rate, runs)}
            for c in case.contenders
        }
        | {name: {"reason": why} for name, why in case.absent.items()},
        "pairs": {
            label: _ratio(times[slow], times[fast])
            for label, slow, fast in case.pairs
            if slow in times and fast in times
        },
    }


def _checked(case: Case, device: torch.device) -> dict[str, dict[str, Any]]:
    """Run everyone once: what the first run cost, and how far its result is from ours; or a reason to leave it out."""
    seen: dict[str, tuple[float, Tensor | None]] = {}
    facts: dict[str, dict[str, Any]] = {}
    for contender in case.contenders:
        try:
            facts[contender.name] = fact = _first_run(contender, device)
            loss = fact.pop("result")
            gradient = contender.gradient().detach() if contender.gradient else None
            if any(other.against == contender.name for other in case.contenders):
                seen[contender.name] = loss, None if gradient is None else gradient.clone()
            if contender.against in seen:
                _compare(fact, loss, gradient, *seen[contender.against], case.tolerance)
        except Exception as error:  # a rival's failure, of whatever kind, is a line of the table
            if not contender.against:
                raise
            said = str(error).strip().splitlines() or [""]
            facts[contender.name] = {"reason": f"failed: {type(error).__name__}: {said[0][:160]}"}
        contender.clear()
        gradient = None
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return facts


def _first_run(contender: Contender, device: torch.device) -> dict[str, Any]:
    """The run that compiles, on a GPU another one whose memory is looked at."""
    start = time.perf_counter()
    if contender.prepare:
        contender.prepare()
    loss = float(contender.run().detach())
    fact: dict[str, Any] = {"result": loss, "first_run_seconds": time.perf_counter() - start}
    if device.type == "cuda":
        contender.clear()
        if contender.prepare:
            contender.prepare()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        fact["result"] = float(contender.run().detach())
        fact["peak_bytes"] = torch.cuda.max_memory_allocated() - before
    return fact


def _compare(
    fact: dict[str, Any], loss: float, gradient: Tensor | None, ours: float, other: Tensor | None, tolerance: float
) -> None:
    fact["loss_error"] = abs(loss - ours) / max(abs(ours), 1e-30)
    if not fact["loss_error"] <= tolerance:  # NaN is an error too
        fact["reason"] = f"not timed, it is not the same: loss {loss:.6g}, ours {ours:.6g}"
        return
    if gradient is None or other is None:
        return
    difference = _norm(gradient.reshape(-1), other.reshape(-1))
    fact["gradient_error"] = difference / max(_norm(other.reshape(-1), None), 1e-30)
    if not fact["gradient_error"] <= 3 * tolerance:
        fact["reason"] = f"not timed, it is not the same: gradients are {fact['gradient_error']:.2g} off"


def _norm(x: Tensor, y: Tensor | None) -> float:
    """|x - y|, piece by piece: an fp32 copy of a large gradient may not fit."""
    total, piece = 0.0, 2**26
    for start in range(0, x.numel(), piece):
        part = x[start : start + piece].float()
        total += float((part if y is None else part - y[start : start + piece].float()).square().sum())
    return math.sqrt(total)


def _runs(clock: Clock, contender: Contender, seconds: float) -> int:
    """How many runs fill a turn; these runs are the warm-up too."""
    quickest, spent = math.inf, 0.0
    for _ in range(3):
        quickest = min(quickest, taken := clock.sample(contender, 1))
        if (spent := spent + taken) > 0.5:
            break
    return max(1, min(_MOST_RUNS, math.ceil(seconds / max(quickest, 1e-7))))


def _summary(
    case: Case, contender: Contender, times: dict[str, list[float]], ceiling: list[float], runs: dict[str, int]
) -> dict[str, Any]:
    mine = times[contender.name]
    work = case.work if math.isnan(contender.work) else contender.work
    rates = [work / t for t in mine]
    summary: dict[str, Any] = {
        "seconds": statistics.median(mine),
        "lowest": min(mine),
        "highest": max(mine),
        "per_second": statistics.median(rates),
        "share_of_ceiling": statistics.median(rate / top for rate, top in zip(rates, ceiling, strict=True)),
        "runs_a_round": runs[contender.name],
        "rounds": mine,
    }
    if contender.against in times:
        summary["slower_than"] = {"what": contender.against, **_ratio(mine, times[contender.against])}
    return summary


def _ratio(slow: list[float], fast: list[float]) -> dict[str, Any]:
    ratios = [a / b for a, b in zip(slow, fast, strict=True)]
    return {"median": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios), "rounds": ratios}


def launches(contender: Contender) -> int:
    """How many kernels, copies and fills a run starts on the GPU."""
    from torch.profiler import ProfilerActivity, profile

    if contender.prepare:
        contender.prepare()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as recorded:
        contender.run()
        torch.cuda.synchronize()
    contender.clear()
    return sum(event.device_type.name == "CUDA" for event in recorded.events() or ())
