"""Every study that is shipped loads, with all its runs."""

from pathlib import Path

import pytest

from trainer.study.grid import plan_runs
from trainer.study.schema import load_study

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared" / "data"


@pytest.mark.parametrize("path", sorted((ROOT / "studies").glob("*.yaml")), ids=lambda path: path.stem)
def test_it_loads(path: Path) -> None:
    study = load_study(path)
    if not DATA.is_dir():
        pytest.skip("NO POOL OF TASKS in ../shared/data: the study's runs are NOT checked here")
    runs = plan_runs(study)
    assert len(runs) == study.planned
    assert all(run.stages[-1].early_stopping.watch in ("mean", run.task) for run in runs)
