"""Arguments of the loss functions: ragged layouts with every option, drawn from a seed."""

from typing import Any

import torch
from torch import Tensor

from trainer.losses.interface import IGNORE

STORAGES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def layout(lengths: list[int]) -> Tensor:
    """Offsets of segments of these lengths."""
    return torch.tensor([0, *lengths]).cumsum(0)


def segments(
    lengths: list[int], seed: int = 0, *, storage: torch.dtype = torch.float32, spread: float = 3.0,
    ignored: float = 0.0, options: bool = False, tasks: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """Arguments of `segment_cross_entropy`; a share `ignored` of the segments and all empty ones have no target."""
    draw = torch.Generator().manual_seed(seed)
    count, scores = len(lengths), spread * torch.randn(sum(lengths), generator=draw, dtype=torch.float64)
    target = torch.tensor([int(torch.randint(max(n, 1), (), generator=draw)) for n in lengths], dtype=torch.int64)
    out = torch.rand(count, generator=draw) < ignored
    target[out | (torch.tensor(lengths, dtype=torch.int64) == 0)] = IGNORE
    weight = torch.rand(count, generator=draw) + 0.1
    weight[torch.rand(count, generator=draw) < 0.1] = 0.0
    case: dict[str, Any] = {
        "scores": scores.to(storage),
        "offsets": layout(lengths),
        "target": target,
        "weight": weight,
    }
    if options:
        smoothing = 0.3 * torch.rand(count, generator=draw)
        smoothing[torch.rand(count, generator=draw) < 0.3] = 0.0
        case |= {"smoothing": smoothing, "z_loss": 1e-3}
    if tasks:
        case |= {"task": torch.randint(tasks, (count,), generator=draw), "tasks": tasks}
    return case


def two_sided(case: dict[str, Any], seed: int = 0, noise: float = 1.0, targets: bool = True) -> dict[str, Any]:
    """The same as arguments of `segment_cross_entropy_kl`, or of `segment_symmetric_kl`."""
    draw = torch.Generator().manual_seed(seed + 1)
    case = dict(case)
    x = case.pop("scores")
    case |= {"x": x, "y": (x.double() + noise * torch.randn(len(x), generator=draw, dtype=torch.float64)).to(x.dtype)}
    if targets:
        return case | {"kl_weight": case["weight"].flip(0) * 0.5}
    return {n: a for n, a in case.items() if n not in ("target", "smoothing", "z_loss")}


def heads(
    *, hidden: int = 48, storage: torch.dtype = torch.float32, seed: int = 0, bias: bool = True, options: bool = True,
    classification: int = 6,
) -> dict[str, Any]:  # fmt: skip
    """Arguments of `head_losses`: classification, choice, spans whose two segments share features, and regression.

    The last three features and row 40 on have no use.
    """
    draw = torch.Generator().manual_seed(seed)
    features, rows = classification + 5 + 2 * 9 + 4 + 3, 45
    segment, lengths = [], []
    for i in range(classification):  # three heads of 2, 3 and 20 rows
        first, size = ((0, 2), (2, 3), (5, 20))[i % 3]
        segment.append((i, 1, first, size))
        lengths.append(size)
    at = classification
    for size in (2, 3):  # two questions of 2 and 3 choices, one row
        segment.append((at, size, 25, 1))
        lengths.append(size)
        at += size
    for _ in range(2):  # start and end over the same 9 features
        segment += [(at, 9, 26, 1), (at, 9, 27, 1)]
        lengths += [9, 9]
        at += 9
    points = [(at + i, 28 + i % 2) for i in range(4)] + [(0, 29)]
    count, total = len(segment), len(segment) + len(points)
    target = torch.tensor([int(torch.randint(n, (), generator=draw)) for n in lengths])
    target[1] = IGNORE
    loss_weight = torch.rand(total, generator=draw) + 0.1
    loss_weight[2] = loss_weight[-1] = 0.0

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64).to(storage)

    case: dict[str, Any] = {
        "features": normal(features, hidden),
        "weight": (normal(rows, hidden).double() * 2 / hidden**0.5).to(storage),
        "bias": normal(rows) if bias else None,
        "segment": torch.tensor(segment),
        "offsets": layout(lengths),
        "target": target,
        "loss_weight": loss_weight,
        "point": torch.tensor(points),
        "value": torch.rand(len(points), generator=draw),
        "scores": sum(lengths),
    }
    if options:
        smoothing = 0.2 * torch.rand(count, generator=draw)
        smoothing[::2] = 0.0
        case |= {"smoothing": smoothing, "z_loss": 1e-3}
        case |= {"task": torch.randint(4, (total,), generator=draw), "tasks": 4}
    return case


def vocabulary(
    rows: int = 37, words: int = 101, hidden: int = 32, *, storage: torch.dtype = torch.float32, seed: int = 0,
    bias: bool = False, smoothing: bool = False, **options: float,
) -> dict[str, Any]:  # fmt: skip
    """Arguments of `linear_cross_entropy`; every seventh row ignored, the second of weight 0."""
    draw = torch.Generator().manual_seed(seed)
    target = torch.randint(words, (rows,), generator=draw)
    target[::7] = IGNORE
    loss_weight = torch.rand(rows, generator=draw) / max(rows, 1)
    loss_weight[1:2] = 0.0
    scale = 3 / hidden**0.5
    case: dict[str, Any] = {
        "hidden": torch.randn(rows, hidden, generator=draw).to(storage),
        "weight": (scale * torch.randn(words, hidden, generator=draw)).to(storage),
        "bias": torch.randn(words, generator=draw).to(storage) if bias else None,
        "target": target,
        "loss_weight": loss_weight,
    }
    if smoothing:
        case["smoothing"] = 0.3 * torch.rand(rows, generator=draw)
    return case | options


def two_passes(case: dict[str, Any], gradient: str, noise: float = 1.0) -> dict[str, Any]:
    """Arguments of `head_divergence` or `linear_symmetric_kl` from those of `head_losses` or `linear_cross_entropy`."""
    draw = torch.Generator().manual_seed(5)
    kept = ("weight", "bias", "segment", "offsets", "loss_weight", "point", "scores", "softcap")
    x = case["features"] if "features" in case else case["hidden"]
    y = (x.double() + noise * torch.randn(x.shape, generator=draw, dtype=torch.float64)).to(x.dtype)
    return {n: a for n, a in case.items() if n in kept} | {"x": x, "y": y, "gradient": gradient}
