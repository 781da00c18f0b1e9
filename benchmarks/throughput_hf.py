"""The rival of `benchmarks/throughput.py`: multi-task training with the stock Hugging Face `Trainer`.

Owns: what people run today. One encoder with a head per task, batches of one task (the same task on every rank),
dynamic padding by `DataCollatorWithPadding`, the caller's DeepSpeed JSON, no evaluation and no checkpoints. By hand:

    deepspeed --num_gpus 2 benchmarks/throughput_hf.py --examples FILE --model DIR --deepspeed JSON --steps 60

FILE is JSON Lines, one tokenised training example a line, so that both sides train on the same ones:

    {"task": "comve_a", "family": "multiple_choice", "classes": 2, "sequences": [[101, ...], [101, ...]],
     "second": [9, 9], "target": 1}

- `family`: classification, pair_classification, regression, multiple_choice or span.
- `classes`: outputs of a classification head; ignored for the other families.
- `sequences`: token ids with special tokens and without padding; several for multiple choice, else one.
- `second`: for each sequence, the index where its second text starts (its length when there is none).
- `target`: class or choice (int), score in [0, 1] (float), or [first, last] token index of a span's answer.

The first rank prints one JSON line: `real_tokens` (padding not counted), `padded_tokens`, `examples`, `seconds`,
`tokens_per_second` (real ones), `steps` and `world`; sums over all ranks and the measured steps.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import (
    AutoModel,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from trainer.engine.session import init_distributed
from trainer.engine.stop import end_rank

Example = dict[str, Any]
OUTPUTS = {"regression": 1, "multiple_choice": 1, "span": 2}
MEGABATCH = 50  # batches sorted by length at a time: the factor of transformers' LengthGroupedSampler


class Examples(Dataset[Example]):
    def __init__(self, path: Path) -> None:
        with path.open(encoding="utf-8") as lines:
            self.rows: list[Example] = [json.loads(line) for line in lines]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        return self.rows[index]


class TaskBatches:
    """Index batches of one task each, every `world` consecutive ones of the same task: one for each rank."""

    drop_last = True

    def __init__(self, rows: list[Example], batch_size: int, world: int, by_length: bool, seed: int) -> None:
        self.batch_size = batch_size
        self.world = world
        self.by_length = by_length
        self.random = random.Random(seed)
        self.length = [max(map(len, row["sequences"])) for row in rows]
        self.of_task: dict[str, list[int]] = {}
        for index, row in enumerate(rows):
            self.of_task.setdefault(row["task"], []).append(index)
        if not len(self):
            raise SystemExit(f"no task has the {batch_size * world} examples that one batch a rank needs")

    def __len__(self) -> int:
        step = self.batch_size * self.world
        return sum(len(indices) // step for indices in self.of_task.values()) * self.world

    def __iter__(self) -> Iterator[list[int]]:
        step = self.batch_size * self.world
        groups: list[list[int]] = []
        for indices in self.of_task.values():
            order = self._order(indices, step)
            groups += [order[i : i + step] for i in range(0, len(order) - step + 1, step)]
        self.random.shuffle(groups)
        for group in groups:
            for rank in range(self.world):
                yield group[rank * self.batch_size : (rank + 1) * self.batch_size]

    def _order(self, indices: list[int], step: int) -> list[int]:
        order = self.random.sample(indices, len(indices))
        if not self.by_length:
            return order
        mega = step * MEGABATCH
        parts = [sorted(order[i : i + mega], key=self.length.__getitem__) for i in range(0, len(order), mega)]
        return [index for part in parts for index in part]


class Collator:
    """Pads the sequences of a batch to its longest one."""

    def __init__(self, tokenizer: Any) -> None:
        self.pad = DataCollatorWithPadding(tokenizer)

    def __call__(self, rows: list[Example]) -> dict[str, Any]:
        features = [
            {"input_ids": ids, "token_type_ids": [0] * second + [1] * (len(ids) - second)}
            for row in rows
            for ids, second in zip(row["sequences"], row["second"], strict=True)
        ]
        batch: dict[str, Any] = dict(self.pad(features))
        batch["task"], batch["family"] = rows[0]["task"], rows[0]["family"]
        batch["choices"] = [len(row["sequences"]) for row in rows]
        batch["labels"] = torch.tensor([row["target"] for row in rows])
        return batch


class Heads(nn.Module):
    """A linear layer a task."""

    def __init__(self, sizes: dict[str, int], hidden: int) -> None:
        super().__init__()
        # A name of a module can't hold a dot, so the heads are numbered.
        self.index = {task: str(number) for number, task in enumerate(sizes)}
        self.layers = nn.ModuleDict({self.index[task]: nn.Linear(hidden, size) for task, size in sizes.items()})

    def forward(self, task: str, features: Tensor) -> Tensor:
        scores: Tensor = self.layers[self.index[task]](features)
        # ZeRO-3 applies a stale gradient to a parameter that got none, so the other heads get a zero.
        return scores + sum(parameter.sum() * 0 for parameter in self.parameters())


class MultiTaskModel(nn.Module):
    """The pretrained encoder and the heads; returns the loss, as `Trainer` expects."""

    def __init__(self, path: str, rows: list[Example], attention: str | None) -> None:
        super().__init__()
        self.body = AutoModel.from_pretrained(path, dtype=torch.float32, attn_implementation=attention)
        self.config = self.body.config  # DeepSpeed's `auto` values are filled from it
        sizes = {row["task"]: OUTPUTS.get(row["family"]) or row["classes"] for row in rows}
        self.dropout = nn.Dropout(self.config.hidden_dropout_prob)
        self.heads = Heads(sizes, self.config.hidden_size)
        # Gathers the heads of all tasks together, whichever of them a batch uses.
        deepspeed.utils.set_z3_leaf_modules(self, [Heads])

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        token_type_ids: Tensor,
        task: str,
        family: str,
        choices: list[int],
        labels: Tensor,
    ) -> dict[str, Tensor]:
        out = self.body(input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids)
        features = out.last_hidden_state if family == "span" else out.pooler_output
        return {"loss": _loss(family, self.heads(task, self.dropout(features)), attention_mask, choices, labels)}


def _loss(family: str, scores: Tensor, attention_mask: Tensor, choices: list[int], labels: Tensor) -> Tensor:
    if family == "span":
        scores = scores.masked_fill(attention_mask[:, :, None] == 0, -torch.inf)
        return (F.cross_entropy(scores[:, :, 0], labels[:, 0]) + F.cross_entropy(scores[:, :, 1], labels[:, 1])) / 2
    if family == "regression":
        return F.mse_loss(scores[:, 0], labels.to(scores.dtype))
    if family == "multiple_choice":
        rows = list(torch.split(scores[:, 0], choices))
        scores = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-torch.inf)
    return F.cross_entropy(scores, labels)


class TaskTrainer(Trainer):  # type: ignore[misc]  # transformers is not typed
    """`Trainer` with the task batches, counting what goes through the model."""

    def __init__(self, *, batches: TaskBatches, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.batches = batches
        self.counts = torch.zeros(3, dtype=torch.int64, device=self.args.device)

    def get_train_dataloader(self) -> Any:
        loader: DataLoader[Example] = DataLoader(
            self.train_dataset,
            batch_sampler=self.batches,
            collate_fn=self.data_collator,
            pin_memory=self.args.dataloader_pin_memory,
        )
        return self.accelerator.prepare(loader)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any) -> Tensor:
        mask = inputs["attention_mask"]
        self.counts += torch.stack(
            [mask.sum(), torch.tensor(mask.numel()).to(mask), torch.tensor(len(inputs["labels"])).to(mask)]
        ).to(self.counts)
        loss: Tensor = super().training_step(model, inputs, *args)
        return loss


class Stopwatch(TrainerCallback):  # type: ignore[misc]
    """Times the steps after the warm-up, on a machine that has finished them."""

    def __init__(self, trainer: TaskTrainer, warmup: int) -> None:
        self.trainer = trainer
        self.warmup = warmup
        self.started = self.seconds = 0.0

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step in (self.warmup, state.max_steps):
            if args.device.type != "cpu":
                torch.accelerator.synchronize()
            torch.distributed.barrier()
        if state.global_step == self.warmup:
            self.trainer.counts.zero_()
            self.started = time.perf_counter()
        elif state.global_step == state.max_steps:
            self.seconds = time.perf_counter() - self.started


def measure(options: argparse.Namespace) -> dict[str, float]:
    """Train in this process (one rank of several) and return the counts of all ranks."""
    cpu = not torch.cuda.is_available()
    init_distributed()  # on a CPU Trainer leaves this to zero.Init, which needs it before
    with tempfile.TemporaryDirectory() as scratch:
        args = TrainingArguments(
            output_dir=scratch,
            deepspeed=str(options.deepspeed),
            max_steps=options.warmup + options.steps,
            per_device_train_batch_size=options.rows,
            gradient_accumulation_steps=options.accumulation,
            learning_rate=options.lr,
            seed=options.seed,
            use_cpu=cpu,
            ddp_backend="gloo" if cpu else "nccl",
            bf16=options.bf16,
            dataloader_pin_memory=not cpu,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        set_seed(options.seed)
        examples = Examples(options.examples)
        batches = TaskBatches(examples.rows, options.rows, args.world_size, options.group_by_length, options.seed)
        trainer = TaskTrainer(
            batches=batches,
            model=MultiTaskModel(str(options.model), examples.rows, options.attention),
            args=args,
            train_dataset=examples,
            data_collator=Collator(AutoTokenizer.from_pretrained(options.model)),
        )
        watch = Stopwatch(trainer, options.warmup)
        trainer.add_callback(watch)
        trainer.train()
    torch.distributed.all_reduce(trainer.counts)
    real, padded, rows = trainer.counts.tolist()
    return {
        "real_tokens": real,
        "padded_tokens": padded,
        "examples": rows,
        "seconds": watch.seconds,
        "tokens_per_second": real / watch.seconds,
        "steps": options.steps,
        "world": args.world_size,
    }


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--deepspeed", type=Path, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--lr", type=float, default=5e-5)
    parser.add_argument("--attention", help="of transformers; its own choice where absent")
    parser.add_argument("--group-by-length", action="store_true")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--local_rank", type=int, default=0, help="set by the deepspeed launcher")
    return parser.parse_args()


def main() -> None:
    measured = measure(_parse())
    if torch.distributed.get_rank() == 0:
        print(json.dumps(measured), flush=True)


if __name__ == "__main__":
    main()
    end_rank()
