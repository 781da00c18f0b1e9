"""What `sett study` does: check everything, run what is left, report.

Owns: the order of these, what is printed at the end, and the error of a study with failed runs.
"""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from trainer.errors import RunError, shortened
from trainer.study.claim import holder
from trainer.study.grid import Run, plan_runs
from trainer.study.machine import choose_slots
from trainer.study.report import TABLE, terminal_table, write_report
from trainer.study.result import Action, next_action
from trainer.study.runner import Runner, Tally
from trainer.study.schema import Study


def run_study(study: Study, jobs: int | None, ranks: int, limit: float | None) -> None:
    """Run what is left of a study for at most `limit` minutes, and write the report.

    Raises:
        ConfigError, DataError, ModelError: the study or a recipe is wrong; nothing has been started.
        RunError: runs failed; the others are done.
    """
    runs = plan_runs(study)
    slots = choose_slots(runs, jobs, ranks)
    runner = Runner(runs, study.metric, slots, limit, _say)
    _say(
        f"study {study.name}: {len(study.arms)} arms x {len(study.tasks)} tasks x {len(study.all_seeds)} seeds"
        f"{f' from {len(study.used_origins)} origins' if study.used_origins else ''}; "
        f"{runner.done} of {len(runs)} runs are done, {len(slots.environments)} at once"
    )
    tally = runner.work()
    _report(study, runs)
    _say_rest(runs, study.metric, tally)
    if tally.failed:
        names = shortened([run.label for run in tally.failed])
        raise RunError(f"{len(tally.failed)} of {len(runs)} runs failed ({names}); the same command tries them again")


def report_study(study: Study) -> None:
    """Write and print the report of what is finished; starts nothing."""
    _report(study, plan_runs(study))


def _report(study: Study, planned: Sequence[Run]) -> None:
    runs = [run for run in planned if run.judged]
    summary = write_report(study, runs)
    console = Console()
    console.print(terminal_table(study, summary))
    console.print(
        f"{len(summary.results)} of {len(runs)} runs finished; {study.directory / TABLE}",
        highlight=False,
        soft_wrap=True,
    )


def _say_rest(runs: Sequence[Run], split: str, tally: Tally) -> None:
    """What is not done, and why."""
    held = [run for run in tally.elsewhere if next_action(run, split) is not Action.NOTHING]
    if held:
        who = sorted({name for run in held if (name := holder(run.directory))})
        _say(f"{len(held)} runs are with another study ({shortened(who)}); call again for the whole report")
    left = sum(next_action(run, split) is not Action.NOTHING for run in runs) - len(held) - len(tally.failed)
    if left > 0:
        _say(f"{left} runs are left; run the same command to go on")


def _say(text: str) -> None:
    print(text, flush=True)
