"""Time, bandwidth and memory of Sett's loss kernels beside eager PyTorch, torch.compile and other people's kernels.

Owns: the command, its table, and the JSON. What is compared and how is in `kernel_bench`. On a machine with a GPU that
is measured, else the CPU. Every contender is checked against ours before it is timed, and all of a case take turns.

    python benchmarks/kernels.py [--case NAME ...] [--rounds N] [--seconds S] [--out FILE]
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # imported in main(): transformers looks for a package called kernels, and may find this file
    from kernel_bench.measure import Case
    from kernel_bench.setting import Setting
    from rich.console import Console

HERE = Path(__file__).resolve().parent
CASES = ("heads", "heads-count", "segment-ce", "ce-kl", "linear-ce")
_PREFIXES = [("", 1.0), ("k", 1e3), ("M", 1e6), ("G", 1e9), ("T", 1e12)]


def cases(name: str, setting: Setting) -> Iterator[Case]:
    """The cases of one name: a shape or a storage type each."""
    from kernel_bench import heads, segments, vocabulary

    made = {
        "heads": heads.heads,
        "heads-count": heads.heads_count,
        "segment-ce": segments.segment_ce,
        "ce-kl": segments.ce_kl,
        "linear-ce": vocabulary.linear_ce,
    }
    return made[name](setting)


def run(setting: Setting, options: argparse.Namespace, console: Console) -> Iterator[dict[str, Any]]:
    """All that was measured so far, after each case, so that an interruption loses one."""
    import torch
    from kernel_bench import memory
    from kernel_bench.measure import launches, measure
    from kernel_bench.setting import machine

    results: dict[str, Any] = {
        "machine": machine(setting),
        "settings": {"rounds": options.rounds, "seconds": options.seconds},
        "cases": [],
    }
    for name in options.case or CASES:
        for case in cases(name, setting):
            torch.compiler.reset()
            measured = measure(case, setting.device, options.rounds, options.seconds)
            found = measured["contenders"]
            for contender in case.contenders:
                if setting.cuda and name == "heads" and "seconds" in found[contender.name]:
                    found[contender.name]["launches"] = launches(contender)
            for chosen in () if setting.cuda else case.memory:
                peak = memory.measure(chosen, case.shape, options.kernels)
                found[chosen]["peak_bytes" if isinstance(peak, int) else "peak_unknown"] = peak
            results["cases"].append({"name": name, **measured})
            results["machine"]["load_average_after"] = os.getloadavg()[0]
            show(results["cases"][-1], console)
            del case
            gc.collect()
            if setting.cuda:
                torch.cuda.empty_cache()
            yield results


def show(case: dict[str, Any], console: Console) -> None:
    """A case's table."""
    from rich.table import Table

    found = case["contenders"]
    ceiling = f"{case['ceiling']['what']}: {amount(case['ceiling']['per_second'], case['unit'] + '/s')}"
    columns = {"peak_bytes": "memory", "launches": "launches"}
    extra = {key: title for key, title in columns.items() if any(key in facts for facts in found.values())}
    table = Table(
        title=f"{case['name']}: {case['shape']}",
        caption=f"{amount(case['work'], case['unit'])}: {case['counted']}\nceiling: {ceiling}",
    )
    table.add_column("")
    for heading in ("ms", "lowest to highest", "times ours", "rate", "of ceiling", *extra.values()):
        table.add_column(heading, justify="right")
    for name, facts in found.items():
        if "reason" in facts:
            table.add_row(name, "", facts["reason"])
            continue
        slower = facts.get("slower_than")
        table.add_row(
            name,
            f"{1e3 * facts['seconds']:.3g}",
            f"{1e3 * facts['lowest']:.3g} to {1e3 * facts['highest']:.3g}",
            f"{slower['median']:.2f} ({slower['lowest']:.2f} to {slower['highest']:.2f})" if slower else "",
            amount(facts["per_second"], case["unit"] + "/s"),
            f"{facts['share_of_ceiling']:.0%}",
            *(_extra(key, facts) for key in extra),
        )
    console.print(table)
    for label, ratio in case["pairs"].items():
        values = f"{ratio['median']:.2f} ({ratio['lowest']:.2f} to {ratio['highest']:.2f})"
        console.print(f"ratio of times, {label}: {values}", highlight=False)


def _extra(key: str, facts: dict[str, Any]) -> str:
    if key not in facts:
        return ""
    return amount(facts[key], "B") if key == "peak_bytes" else str(facts[key])


def amount(value: float, unit: str) -> str:
    """Three digits and a decimal prefix."""
    prefix, size = [pair for pair in _PREFIXES if abs(value) >= pair[1] or pair[1] == 1.0][-1]
    return f"{value / size:.3g} {prefix}{unit}"


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--case", nargs="+", choices=CASES, help="only these; written to a file only with --out")
    add("--rounds", type=int, default=7)
    add("--seconds", type=float, default=0.05, help="how long a contender's turn in a round lasts, at the least")
    add("--out", type=Path, help="default for all cases: benchmarks/results/kernels-DEVICE.json")
    add("--kernels", choices=["fused", "reference"], default="fused", help="who is ours")
    return parser.parse_args()


def main() -> None:
    options = _parse()
    from kernel_bench.setting import Setting
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 150)
    setting = Setting.here(options.kernels, lambda text: print(text, file=sys.stderr, flush=True))
    path: Path | None = options.out
    for results in run(setting, options, console):
        facts = results["machine"]
        if path is None and not options.case and options.kernels == "fused":
            device = re.sub(r"[^a-z0-9]+", "-", facts["device"].lower()).strip("-") if setting.cuda else "cpu"
            path = HERE / "results" / f"kernels-{device}.json"
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    console.print(
        f"{facts['device']}, {facts['threads']} threads, isa {facts['isa']}, torch {facts['packages']['torch']}; load "
        f"{facts['load_average_before']:.1f} before, {facts['load_average_after']:.1f} after",
        highlight=False,
    )
    if facts["load_average_before"] > facts["cores"] / 2:
        console.print("other jobs share this machine: of these numbers only memory is worth reading", highlight=False)
    if path is not None:
        console.print(f"written to {path}", highlight=False)


if __name__ == "__main__":
    main()
