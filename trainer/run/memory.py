"""How much memory a model's states need per rank under each way of sharding.

Owns: the table of `sett plan`. ZeRO-2 and ZeRO-3 are DeepSpeed's own estimators; ZeRO-0 and ZeRO-1, for which it has
none, are counted by the same rule. All are for 16-bit training with Adam (weights and gradients in 16 bits, master
weights, gradient sums and two moments in 32) and hold no activations, buffers of the network or fragmentation.
"""

from __future__ import annotations

from typing import NamedTuple

from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs
from rich.console import Console
from rich.table import Table

_WEIGHTS = 2
_GRADIENTS = 2 + 4  # 16-bit, and the 32-bit sum
_OPTIMIZER = 4 + 4 + 4  # master weights and two moments
_BUFFER = 1.5  # DeepSpeed's allowance for buffers in host memory
_CAPTION = "16-bit training with Adam. Activations come on top."


class MemoryRow(NamedTuple):
    """Bytes that the states of one rank need under one way of sharding."""

    stage: int
    offload: str
    """What lives in host memory between uses: nothing, the optimizer, or the optimizer and the weights."""
    gpu: int
    """On the rank's accelerator; on a CPU box this is memory of the host, too."""
    cpu: int
    """In host memory, this rank's share of its node."""
    config: str
    """The shipped configuration that does this, or an empty string."""


def estimate(params: int, largest_layer: int, world_size: int, gpus_per_node: int) -> list[MemoryRow]:
    """States of `params` parameters on `world_size` ranks, stage by stage; ZeRO-3 gathers `largest_layer` whole."""
    per_node = min(gpus_per_node, world_size)
    hardware = {"num_gpus_per_node": per_node, "num_nodes": -(-world_size // per_node)}
    loading = int(4 * params * _BUFFER)  # each rank loads the model into host memory once
    replicated = _WEIGHTS + _GRADIENTS
    rows = [
        MemoryRow(0, "none", (replicated + _OPTIMIZER) * params, loading, ""),
        MemoryRow(1, "none", replicated * params + _OPTIMIZER * params // world_size, loading, "zero1"),
    ]
    for offload in (False, True):
        cpu, gpu = estimate_zero2_model_states_mem_needs(params, cpu_offload=offload, **hardware)
        name = "" if offload else "zero2"
        rows.append(MemoryRow(2, "optimizer" if offload else "none", gpu, cpu // per_node, name))
    for optimizer, weights, name in ((False, False, "zero3"), (True, False, ""), (True, True, "zero3-offload-cpu")):
        cpu, gpu, _ = estimate_zero3_model_states_mem_needs(
            params, largest_layer, cpu_offload=optimizer, cpu_offload_params=weights, **hardware
        )
        offloaded = "optimizer, weights" if weights else "optimizer" if optimizer else "none"
        rows.append(MemoryRow(3, offloaded, gpu, cpu // per_node, name))
    return rows


def render(rows: list[MemoryRow], console: Console) -> None:
    """Print the rows as a table."""
    table = Table(title="Memory per rank for model states", title_justify="left", caption=_CAPTION)
    table.add_column("ZeRO", justify="right")
    table.add_column("offloaded")
    table.add_column("GPU", justify="right")
    table.add_column("CPU", justify="right")
    table.add_column("deepspeed:", style="cyan")
    for row in rows:
        table.add_row(str(row.stage), row.offload, readable(row.gpu), readable(row.cpu), row.config)
    console.print(table)


def readable(size: float) -> str:
    """`1.5 GB`: bytes in the largest binary unit that leaves at least 1."""
    for unit in ("B", "KB", "MB", "GB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TB"
