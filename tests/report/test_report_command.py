"""`sett report` as a command."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from report.small import write_run
from typer.testing import CliRunner

from trainer.cli import app, main


def files_of(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file()}


def report(*arguments: object) -> Path:
    done = CliRunner().invoke(app, ["report", *map(str, arguments)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return Path(done.output.strip())


def test_one_run_has_its_report_inside(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    before = files_of(tmp_path)
    assert report(run) == run / "report.html"
    assert files_of(tmp_path) == before | {run / "report.html"}
    first = (run / "report.html").read_text()
    assert report(run) == run / "report.html"  # a report may be written over
    assert len((run / "report.html").read_text()) == len(first)


def test_several_runs_have_theirs_here_or_where_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [write_run(tmp_path / "runs" / name, seed=seed) for seed, name in enumerate("ab")]
    before = files_of(tmp_path)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert report(*runs) == Path("report.html")
    assert report(*runs, "--out", tmp_path / "there.html") == tmp_path / "there.html"
    assert files_of(tmp_path) == before | {tmp_path / "here" / "report.html", tmp_path / "there.html"}


def test_no_run_is_one_line_and_the_exit_code_of_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["sett", "report", str(tmp_path / "gone")])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 5
    said = capsys.readouterr().err
    assert (
        said == f"sett: {tmp_path}/gone: no such directory; give the directory of a run, `output/name` of its recipe\n"
    )


def test_it_needs_neither_torch_nor_deepspeed(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", meta=True)
    code = (
        "import sys; from pathlib import Path; from trainer.report import write_report; "
        "write_report([Path(sys.argv[1])]); "
        "print(*{'torch', 'deepspeed', 'transformers', 'matplotlib'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(run)], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.strip() == ""
    assert (run / "report.html").stat().st_size > 10_000
