"""What every rank runs; started by `sett train`, or by hand:

    deepspeed --num_gpus 8 --module trainer.worker recipes/quickstart.yaml [key.path=value ...]

Owns: the rank's entry point and nothing else.
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

from trainer.engine.stop import end_rank
from trainer.errors import SettError


def main() -> None:
    """Train the recipe named on the command line; exits with the error's code and one message from the first rank."""
    # DeepSpeed's launcher adds --local_rank=N, which torch's environment variables repeat.
    arguments = [a for a in sys.argv[1:] if not a.startswith("--local_rank")]
    if not arguments or arguments[0].startswith("-"):
        print(
            "usage: deepspeed [launcher options] --module trainer.worker RECIPE [key.path=value ...]", file=sys.stderr
        )
        sys.exit(2)
    _quieten()
    code = 0
    try:
        if arguments[0] == "eval":
            from trainer.run.evaluate_run import evaluate_on_this_rank

            run_dir, split, step, *tasks = arguments[1:]
            evaluate_on_this_rank(Path(run_dir), split, int(step), tasks)
        else:
            from trainer.run.job import run_on_this_rank

            run_on_this_rank(arguments[0], arguments[1:])
    except SettError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"sett: {error}", file=sys.stderr, flush=True)
        code = error.exit_code
    end_rank(code)


def _quieten() -> None:
    """Leave the terminal to progress and problems."""
    from deepspeed.utils.logging import set_log_level_from_string

    set_log_level_from_string("error")
    # DeepSpeed calls collectives by the names torch 2.13 renamed; nothing a user can act on.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")


if __name__ == "__main__":
    main()
