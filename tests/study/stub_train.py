"""Stands for `sett train`: ten windows; SIGTERM stops it in order. It leaves a process of another session behind, as a
killed launcher would.

    python stub_train.py RUN_DIRECTORY TASK SECONDS EXIT_CODE
"""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

folder, task, seconds, code = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3]), int(sys.argv[4])
state = folder / "progress"
done = int(state.read_text()) if state.exists() else 0


def stop(number: int, frame: FrameType | None) -> None:
    print("saved at", done, flush=True)
    sys.exit(0)


signal.signal(signal.SIGTERM, stop)
(folder / "started").touch()
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
while done < 10:
    time.sleep(seconds / 10)
    done += 1
    state.write_text(str(done))
    print("window", done, flush=True)
    if code and done == 3:
        print("the reason", flush=True)
        sys.exit(code)
row = {"task": task, "family": "classification", "metric": "accuracy", "rows": 4, "majority": 0.5, "before": 0.1}
row |= {"after": 0.25 + len(folder.parent.name) / 100, "train_rows": 8}
lines = [
    {"step": step, "time": 1.7e9 + step, "train/seconds_per_window": 0.5, "memory/host_gib": 0.25 * step}
    for step in (5, 10)
]
(folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
(folder / "results.json").write_text(json.dumps({"tasks": [row], "mean": {}}))
