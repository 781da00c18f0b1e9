"""The command `sett`: thin over the functions of `trainer`.

Owns: options, help texts and exit codes. Heavy imports happen inside the commands, so that `--help` is instant.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trainer.errors import SettError

if TYPE_CHECKING:
    from trainer.cache.progress import RowsBar
    from trainer.engine.launch import Launch
    from trainer.tasks.spec import TaskSpec

app = typer.Typer(
    name="sett",
    help="Train one large model on many tasks at once, on DeepSpeed ZeRO-3.\n\n"
    "First steps: `sett doctor`, `sett plan RECIPE`, `sett train RECIPE`, then `sett eval RUN` and `sett export RUN`.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
tasks_app = typer.Typer(no_args_is_help=True, help="Look at tasks before training on them.")
tokenizer_app = typer.Typer(no_args_is_help=True, help="Make a tokenizer for a model with random weights.")
app.add_typer(tasks_app, name="tasks")
app.add_typer(tokenizer_app, name="tokenizer")

RecipeArgument = Annotated[
    Path, typer.Argument(metavar="RECIPE", help="YAML file, for example recipes/quickstart.yaml.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY.PATH=VALUE]...",
        help="Change single keys of the recipe: `window.tokens=4096 optimizer.lr=3e-5`. Values are YAML.",
    ),
]
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="Run directory, for example runs/quickstart.")]
NumGpus = Annotated[
    int | None,
    typer.Option(
        "--num-gpus",
        "--num_gpus",
        help="GPUs to use on each host; without GPUs, processes. Default: all GPUs, or 1 process.",
    ),
]
Hostfile = Annotated[
    Path | None, typer.Option(help="DeepSpeed hostfile (`host slots=8` a line) to train on several machines.")
]
Include = Annotated[str, typer.Option(help="DeepSpeed's filter, for example `host1@host2:0,2`.")]
Exclude = Annotated[str, typer.Option(help="DeepSpeed's filter, for example `host1:0`.")]
MasterPort = Annotated[
    int | None, typer.Option("--master-port", "--master_port", help="Port of the first rank; default: a free one.")
]
Step = Annotated[
    str, typer.Option(help="Which checkpoint: `best`, `last`, or a step number. `best` falls back on `last`.")
]
TaskPaths = Annotated[
    list[str],
    typer.Argument(metavar="PATH...", help="Task folders (with a task.json), folders or globs of them, or a recipe."),
]


@app.command(name="train")
def train_command(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    num_gpus: NumGpus = None,
    hostfile: Hostfile = None,
    include: Include = "",
    exclude: Exclude = "",
    master_port: MasterPort = None,
) -> None:
    """Train a recipe; run it again to resume where it stopped.

    The run directory (`output/name` of the recipe) holds the recipe, metrics.jsonl, TensorBoard events, checkpoints,
    results and exported models; of a recipe with stages, such a directory for each. By hand, the same without stages is
    `deepspeed --num_gpus N --module trainer.worker RECIPE`.
    """
    from trainer.config import load_recipe
    from trainer.run.job import train
    from trainer.run.outcome import print_outcome

    checked = load_recipe(recipe, overrides or ())
    with _bar("tokenising") as progress:
        run_dir = train(checked, _launch(num_gpus, hostfile, include, exclude, master_port), progress)
    print_outcome(run_dir)


@app.command(name="eval")
def eval_command(
    run: RunArgument,
    split: Annotated[str, typer.Option(help="`dev`, `test` or `train`.")] = "dev",
    step: Step = "best",
    task: Annotated[
        list[str] | None, typer.Option("--task", help="Task to evaluate. Repeat for several; default: all.")
    ] = None,
    num_gpus: NumGpus = None,
    hostfile: Hostfile = None,
    include: Include = "",
    exclude: Exclude = "",
    master_port: MasterPort = None,
) -> None:
    """Evaluate a checkpoint of a run on every task, or on those named; any number of ranks."""
    from trainer.run.evaluate_run import evaluate_run

    evaluate_run(run, split, step, _launch(num_gpus, hostfile, include, exclude, master_port), task or ())


@app.command(name="study")
def study_command(
    study: Annotated[Path, typer.Argument(metavar="STUDY", help="YAML file of a study (docs/studies.md).")],
    jobs: Annotated[int | None, typer.Option(help="Runs at once; default: as many as the machine takes.")] = None,
    ranks: Annotated[int, typer.Option(help="GPUs of a run; without GPUs, processes.")] = 1,
    limit: Annotated[
        float | None, typer.Option(metavar="MINUTES", help="Stop in order after so long; the next call goes on.", min=0)
    ] = None,
    report: Annotated[bool, typer.Option("--report", help="Only write the report of what is finished.")] = False,
) -> None:
    """Train arms x tasks x seeds and compare them; run it again to go on, on any machine.

    The study's directory (`output/name` of the file) holds a run directory for every task, arm and seed, RESULTS.md,
    results.csv, summary.csv and results.png.
    """
    from trainer.study.command import report_study, run_study
    from trainer.study.schema import load_study

    checked = load_study(study)
    if report:
        report_study(checked)
    else:
        run_study(checked, jobs, ranks, limit)


@app.command(name="report")
def report_command(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Run directories; others are compared with the first.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="File to write; default: RUN/report.html, of several runs report.html in this folder."),
    ] = None,
) -> None:
    """Write one HTML file about one or several runs: curves, metrics, weights, sampling, configuration.

    It opens from disk and needs no network. A run may be unfinished; nothing in its directory is changed.
    """
    from trainer.report import write_report

    typer.echo(write_report(runs, out))


@app.command(name="export")
def export_command(
    run: RunArgument,
    task: Annotated[
        list[str] | None,
        typer.Option("--task", help="Task whose head to export, or `backbone`. Repeat for several; default: backbone."),
    ] = None,
    step: Step = "best",
    out: Annotated[Path | None, typer.Option(help="Folder to write to; default: RUN/export.")] = None,
) -> None:
    """Write plain Hugging Face models that stock `AutoModelFor...` classes load."""
    from trainer.run.export import export_run

    for path in export_run(run, task or ["backbone"], step, out):
        typer.echo(path)


@app.command(name="plan")
def plan_command(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    num_gpus: NumGpus = None,
    hostfile: Hostfile = None,
    include: Include = "",
    exclude: Exclude = "",
    windows: Annotated[int, typer.Option(help="How many of the first windows to show.", min=0)] = 2,
) -> None:
    """Dry run: the resolved configuration, memory by ZeRO stage, and the first windows. Starts nothing."""
    from trainer.config import load_recipe
    from trainer.run.plan import print_plan

    checked = load_recipe(recipe, overrides or ())
    with _bar("tokenising") as progress:
        print_plan(checked, _launch(num_gpus, hostfile, include, exclude, None), windows, progress)


@app.command(name="kernels")
def kernels_command() -> None:
    """Compile the loss kernels ahead of time, for this machine or for the GPUs that TORCH_CUDA_ARCH_LIST names.

    Training does this by itself when it is needed, once a machine. The result is in $SETT_CACHE/kernels.
    """
    from trainer.losses import build, fused

    path = build.library(say=print)
    fused.load()
    print(f"{path}\nthe CPU kernels run as {fused.isa()}")


@app.command(name="doctor")
def doctor_command() -> None:
    """What this machine has: accelerator, compilers, DeepSpeed ops, launcher tools."""
    from rich.console import Console

    from trainer.run.doctor import examine, render

    render(examine(), Console())


@tasks_app.command(name="list")
def tasks_list(paths: TaskPaths) -> None:
    """List tasks: family, classes, metric, splits, licence."""
    from rich.console import Console

    from trainer.tasks.check import render_list

    render_list(_load_tasks(paths), Console())


@tasks_app.command(name="check")
def tasks_check(
    paths: TaskPaths,
    limit: Annotated[int, typer.Option(help="Bad rows shown for each split.", min=1)] = 20,
) -> None:
    """Read every row of every split; report bad rows, and rows of train that stand in any task's dev or test."""
    from rich.console import Console

    from trainer.tasks.check import check_tasks

    with _bar("reading") as progress:
        report = check_tasks(_load_tasks(paths), limit, progress)
    report.render(Console())
    if not report.ok:
        raise typer.Exit(3)


@tokenizer_app.command(name="train")
def tokenizer_train(
    inputs: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Text: .txt[.gz] or .jsonl[.gz].")],
    out: Annotated[Path, typer.Option(help="Folder to write the tokenizer to.")],
    vocab_size: Annotated[int, typer.Option("--vocab-size", min=16)] = 16_000,
    model: Annotated[str, typer.Option(help="`unigram` or `bpe`.")] = "unigram",
    kind: Annotated[str, typer.Option(help="`encoder`, `encoder-decoder` or `decoder`.")] = "encoder",
) -> None:
    """Train a SentencePiece tokenizer on text, in the form `AutoTokenizer` loads."""
    from trainer.errors import ConfigError
    from trainer.run.tokenizer import train_sentencepiece

    if model not in ("unigram", "bpe"):
        raise ConfigError(f"--model: '{model}' is not one of unigram, bpe")
    if kind not in ("encoder", "encoder-decoder", "decoder"):
        raise ConfigError(f"--kind: '{kind}' is not one of encoder, encoder-decoder, decoder")
    typer.echo(train_sentencepiece(inputs, out, model, vocab_size, kind))  # type: ignore[arg-type]


def _launch(num_gpus: int | None, hostfile: Path | None, include: str, exclude: str, port: int | None) -> Launch:
    from trainer.engine.launch import Launch

    return Launch(num_gpus, hostfile, include, exclude, port)


def _load_tasks(paths: list[str]) -> list[TaskSpec]:
    from trainer.config import load_recipe
    from trainer.config.stages import stage_tasks
    from trainer.tasks.cards import load_tasks

    if len(paths) == 1 and paths[0].endswith((".yaml", ".yml")):
        return stage_tasks(load_recipe(paths[0]))
    return load_tasks(paths)


def _bar(verb: str) -> RowsBar:
    from trainer.cache.progress import RowsBar

    return RowsBar(verb)


def main() -> None:
    """Entry point: a `SettError` is one message and its exit code; anything else is our bug and keeps its traceback."""
    try:
        app()
    except SettError as error:
        print(f"sett: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
