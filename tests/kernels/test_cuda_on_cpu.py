"""The CUDA loss kernels without a GPU: the same .cu files, compiled by g++ against cuda_shim, against float64.

Every CUDA thread is a real thread, so the sanitizers see what they would see in any program: a missing barrier, a
vector that touches its neighbour's bytes.
"""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from cuda_driver import IGNORE, STORAGES, Call, build, real, run
from torch import Tensor

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is needed (Debian: apt-get install g++)")


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("plain"), "-O2")


# ----------------------------------------------------------------------------------------------------------------------
# Segments


def segments(
    lengths: list[int],
    storage: torch.dtype,
    mode: str,
    *,
    seed: int = 0,
    smoothing: float = 0.0,
    z_loss: float = 0.0,
    in_place: bool = False,
    gradients: bool = True,
    noise: float = 1.0,
    **options: object,
) -> Call:
    """A call of segment_losses with random scores; mode is "entropy", "divergence" or "both"."""
    generator = torch.Generator().manual_seed(seed)
    elements, count = sum(lengths), len(lengths)
    x = (torch.randn(elements, generator=generator, dtype=torch.float64) * 3).to(storage)
    y = (x.double() + noise * torch.randn(elements, generator=generator, dtype=torch.float64)).to(storage)
    target = torch.tensor([int(torch.randint(max(n, 1), (1,), generator=generator)) for n in lengths])
    weight = torch.rand(count, generator=generator) + 0.5
    entropy, divergence = mode != "divergence", mode != "entropy"
    arrays: dict[str, Tensor | None] = {
        "x": x,
        "y": y if divergence else None,
        "offsets": torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()]),
        "target": target if entropy else None,
        "weight": weight if entropy else None,
        "kl_weight": torch.rand(count, generator=generator) + 0.5 if divergence else None,
        "smoothing": torch.full((count,), smoothing) if smoothing else None,
        "loss": torch.full((count,), 7.0, dtype=real(storage)) if entropy else None,
        "kl": torch.full((count,), 7.0, dtype=real(storage)) if divergence else None,
        "grad_x": torch.full_like(x, 7.0) if gradients else None,
        "grad_y": torch.full_like(x, 7.0) if gradients and divergence else None,
        "fault": torch.zeros(3, dtype=torch.int64),
    }
    shares = {"grad_x": "x", "grad_y": "y"} if in_place else {}
    shares = {name: other for name, other in shares.items() if arrays[name] is not None}
    kind = STORAGES.index(storage)
    return Call(0, [kind, elements, count, max(lengths)], [z_loss], arrays, shares, **options)  # type: ignore[arg-type]


@dataclass
class Answer:
    loss: Tensor | None
    kl: Tensor | None
    grad_x: Tensor
    grad_y: Tensor | None


def segment_oracle(call: Call, precision: torch.dtype) -> Answer:
    """The same by PyTorch; call it before the arrays come back."""
    x = call["x"].to(precision, copy=True).requires_grad_()
    y = call["y"].to(precision, copy=True).requires_grad_() if call.arrays["y"] is not None else None
    losses, divergences, total = [], [], torch.zeros((), dtype=precision)
    bounds = call["offsets"].tolist()
    for g, (begin, end) in enumerate(pairwise(bounds)):
        row = x[begin:end]
        if call.arrays["target"] is not None:
            loss = torch.zeros((), dtype=precision)
            if (target := int(call["target"][g])) != IGNORE:
                s = float(call["smoothing"][g]) if call.arrays["smoothing"] is not None else 0.0
                loss = torch.nn.functional.cross_entropy(row, torch.tensor(target), label_smoothing=s)
                loss = loss + call.reals[0] * torch.logsumexp(row, 0) ** 2
            losses.append(loss)
            total = total + float(call["weight"][g]) * loss
        if y is not None:
            log_p, log_q = row.log_softmax(0), y[begin:end].log_softmax(0)
            # A score of -inf in both takes no part.
            t = torch.where(log_p == log_q, torch.zeros((), dtype=precision), log_p - log_q)
            j = ((log_p.exp() - log_q.exp()) * t).sum()
            divergences.append(j)
            total = total + float(call["kl_weight"][g]) * j
    total.backward()
    assert x.grad is not None
    return Answer(
        torch.stack(losses).detach() if losses else None,
        torch.stack(divergences).detach() if divergences else None,
        x.grad,
        y.grad if y is not None else None,
    )


def assert_as_good(actual: Tensor, exact: Tensor, torch_own: Tensor, floor: float, what: str) -> None:
    """At most three times PyTorch's own error against float64, plus a floor that scales with the result."""
    scale = float(exact.abs().max()) if exact.numel() else 0.0
    allowed = 3 * float((torch_own.double() - exact).abs().max()) + floor * max(scale, 1e-3)
    error = float((actual.double() - exact).abs().max())
    assert error <= allowed, f"{what}: error {error:.3g}, allowed {allowed:.3g}"


def check_segments(driver: Path, calls: list[Call], folder: Path) -> None:
    answers = [(segment_oracle(c, torch.float64), segment_oracle(c, real(c["x"].dtype))) for c in calls]
    run(driver, calls, folder)
    for call, (exact, own) in zip(calls, answers, strict=True):
        storage = call["x"].dtype
        floor = 1e-12 if storage == torch.float64 else 2e-6
        assert call.fault == ("none", 0, 0)
        for name in ("loss", "kl"):
            if call.arrays[name] is not None:
                expected, reference = getattr(exact, name), getattr(own, name)
                assert_as_good(call[name], expected, reference, floor, f"{name} {storage}")
        for name in ("grad_x", "grad_y"):
            if call.arrays[name] is not None:
                expected, reference = getattr(exact, name), getattr(own, name).to(storage)
                assert_as_good(call[name], expected, reference, floor, f"{name} {storage}")


# Longest first of what fits a warp, a block, clusters of 2, 4 and 8, and nothing, in 16-bit cross-entropy; the others
# hold as many bytes or half as many, so that they go through the same paths at other places.
PATHS = [[1, 2, 3, 151, 40, 700], [3000, 5, 3001], [7003, 3, 2999, 11], [15001], [29990, 100], [40001, 70]]


@pytest.mark.parametrize("mode", ["entropy", "divergence", "both"])
@pytest.mark.parametrize("storage", STORAGES, ids=str)
def test_every_path_against_float64(driver: Path, tmp_path: Path, storage: torch.dtype, mode: str) -> None:
    calls = [segments(lengths, storage, mode, seed=i) for i, lengths in enumerate(PATHS)]
    calls.append(segments([9001, 20], storage, mode, capability=8))
    check_segments(driver, calls, tmp_path)
    clusters = [call.launches[0][2] for call in calls]
    assert clusters[-1] == 1
    if storage == torch.bfloat16 and mode == "entropy":
        assert clusters == [1, 1, 2, 4, 8, 8, 1]


@pytest.mark.parametrize("storage", STORAGES, ids=str)
def test_options_and_alignment(driver: Path, tmp_path: Path, storage: torch.dtype) -> None:
    size = storage.itemsize
    lengths = [5027, 1, 2, 2503, 4, 9]
    calls = [
        segments(lengths, storage, "both", smoothing=0.1, z_loss=1e-3),
        segments(lengths, storage, "entropy", smoothing=0.3, in_place=True),
        segments(lengths, storage, "both", in_place=True, past={"x": size, "y": size}),
        segments(lengths, storage, "entropy", past={"x": size}),  # x and grad_x cross boundaries at other elements
        segments(lengths, storage, "divergence", past={"y": size}),
        segments([50, 3000], storage, "entropy", gradients=False),
        segments([50, 3000], storage, "both", gradients=False),
    ]
    check_segments(driver, calls, tmp_path)


def test_hard_scores(driver: Path, tmp_path: Path) -> None:
    calls = []
    for storage in STORAGES:
        sure = segments([300, 5000], storage, "entropy")  # p(target) near 1
        for g in range(2):
            sure["x"][int(sure["offsets"][g] + sure["target"][g])] = 20.0
        shifted = segments([300, 5000], storage, "both", noise=0.01)
        for name in ("x", "y"):
            shifted[name].add_(1e4)
        holes = segments([40, 5000], storage, "both")
        for name in ("x", "y"):
            for i in (0, 7, 39, 41, 3000):
                if i not in (int(holes["target"][0]), 40 + int(holes["target"][1])):
                    holes[name][i] = -math.inf
        ignored = segments([40, 3000, 20, 5000], storage, "entropy")
        ignored["target"][:2] = IGNORE
        left_out = segments([40, 3000, 20, 5000], storage, "both")
        left_out["target"][2:] = IGNORE
        calls += [sure, shifted, ignored, left_out]
        if storage != torch.float64:  # the oracle's own gradient is NaN there
            finite = torch.isfinite(holes["x"])
            holes_exact = segment_oracle_without(holes, finite)
            run(driver, [holes], tmp_path)
            assert torch.allclose(holes["loss"].double(), holes_exact.loss, rtol=1e-5)  # type: ignore[arg-type]
            assert torch.allclose(holes["kl"].double(), holes_exact.kl, rtol=1e-5)  # type: ignore[arg-type]
            assert torch.isfinite(holes["grad_x"]).all()
            assert (holes["grad_x"][~finite] == 0).all()
    check_segments(driver, calls, tmp_path)


def segment_oracle_without(call: Call, keep: Tensor) -> Answer:
    """The oracle of a call without some of its scores."""
    bounds = call["offsets"].tolist()
    counts = [int(keep[b:e].sum()) for b, e in pairwise(bounds)]
    before = [int(keep[b : b + t].sum()) for b, t in zip(bounds[:-1], call["target"].tolist(), strict=True)]
    arrays = dict(call.arrays)
    arrays["x"], arrays["y"] = call["x"][keep], call["y"][keep]
    arrays["offsets"] = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()])
    arrays["target"] = torch.tensor(before)
    return segment_oracle(Call(0, call.integers, call.reals, arrays), torch.float64)


def test_tiny_noise_keeps_the_digits_of_the_divergence(driver: Path, tmp_path: Path) -> None:
    call = segments([3, 500, 5000], torch.float32, "divergence", noise=1e-4)
    exact = segment_oracle(call, torch.float64)
    run(driver, [call], tmp_path)
    assert exact.kl is not None
    assert torch.allclose(call["kl"].double(), exact.kl, rtol=1e-5, atol=0)


def test_bad_segments(driver: Path, tmp_path: Path) -> None:
    many = segments([30] * 50, torch.float32, "both", in_place=True)
    many["target"][torch.tensor([49, 33, 12, 30])] = torch.tensor([30, -1, 77, 1 << 40])
    exact = segment_oracle(segments([30] * 50, torch.float32, "both"), torch.float64)
    empty = segments([5, 0, 0, 4000], torch.float32, "entropy")
    empty["target"][1] = IGNORE
    broken = segments([5, 2500, 6, 7], torch.bfloat16, "entropy")
    broken["offsets"][2] = 1 << 50
    both_ends = segments([5, 5], torch.float32, "divergence")
    both_ends["offsets"][0] = -(1 << 62)
    calls = [many, empty, broken, both_ends]
    run(driver, calls, tmp_path)
    assert [call.fault for call in calls] == [
        ("target", 12, 77),
        ("empty", 2, 0),
        ("offsets", 1, 1 << 50),
        ("offsets", 0, 5),
    ]
    bad = torch.zeros(50, dtype=torch.bool)
    bad[[49, 33, 12, 30]] = True
    assert (torch.isnan(many["loss"]) == bad).all()
    grads = many["x"].view(50, 30)
    assert (grads[bad] == 0).all()
    assert torch.allclose(grads[~bad].double(), exact.grad_x.view(50, 30)[~bad], atol=1e-6)
    assert empty["loss"][1] == 0
    assert torch.isnan(empty["loss"][2])
    assert torch.isnan(broken["loss"][1:3]).all()


def test_the_same_bits_every_time(driver: Path, tmp_path: Path) -> None:
    def calls() -> list[Call]:
        heads, _ = head_call(torch.bfloat16, hidden=64)
        return [segments([7003, 3, 2999, 11, 500], torch.bfloat16, "both", smoothing=0.1), heads]

    first, second = calls(), calls()
    run(driver, first, tmp_path)
    run(driver, second, tmp_path)
    for a, b in zip(first, second, strict=True):
        for name, array in a.arrays.items():
            if array is not None:
                assert torch.equal(array.view(-1).view(torch.uint8), b[name].view(-1).view(torch.uint8)), name


# ----------------------------------------------------------------------------------------------------------------------
# Heads, sums, scale


def head_call(storage: torch.dtype, *, hidden: int, gradients: bool = True, bias: bool = True) -> tuple[Call, Tensor]:
    """Classification heads of 2, 3 and 151 rows, a shared row for choices and spans, a row for regression."""
    generator = torch.Generator().manual_seed(hidden)
    features_count, rows_count = 90, 2 + 3 + 151 + 1 + 1 + 1  # the last row no segment uses

    def randn(*size: int) -> Tensor:
        return (torch.randn(*size, generator=generator, dtype=torch.float64) * 0.3).to(storage)

    use = [[f, 1, *[(0, 2), (2, 3), (5, 151)][f % 3]] for f in range(20)]
    use += [[20 + 4 * k, 4, 156, 1] for k in range(5)] + [[40, 45, 156, 1]]
    segment = torch.tensor(use)
    lengths = segment[:, 1] * segment[:, 3]
    offsets = torch.tensor([0, *lengths.cumsum(0).tolist()])
    point = torch.tensor([[3, 157], [88, 157], [89, 157]])
    g, n, e = len(use), len(point), int(offsets[-1])
    target = torch.tensor([i % int(lengths[i]) for i in range(g)])
    target[4] = IGNORE
    outputs = real(storage)
    arrays: dict[str, Tensor | None] = {
        "features": randn(features_count, hidden),
        "weight": randn(rows_count, hidden),
        "bias": randn(rows_count) if bias else None,
        "segment": segment,
        "offsets": offsets,
        "target": target,
        "loss_weight": torch.rand(g + n, generator=generator) + 0.5,
        "smoothing": torch.tensor([0.1 * (i % 2) for i in range(g)]),
        "point": point,
        "value": torch.randn(n, generator=generator),
        "task": torch.arange(g + n) % 5,
        "scores": torch.full((e + n,), 7.0, dtype=outputs),
        "grad_scores": torch.full((e + n,), 7.0, dtype=outputs) if gradients else None,
        "loss": torch.full((g + n,), 7.0, dtype=outputs),
        "total": torch.zeros(1, dtype=outputs),
        "by_task": torch.zeros(5, dtype=outputs),
        "grad_features": torch.full((features_count, hidden), 7.0, dtype=storage) if gradients else None,
        "grad_weight": torch.full((rows_count, hidden), 7.0, dtype=storage) if gradients else None,
        "grad_bias": torch.full((rows_count,), 7.0, dtype=storage) if gradients and bias else None,
        "fault": torch.zeros(3, dtype=torch.int64),
    }
    integers = [STORAGES.index(storage), features_count, hidden, rows_count, g, e, n, 5]
    return Call(2, integers, [1e-3], arrays), lengths


def head_oracle(call: Call, precision: torch.dtype) -> dict[str, Tensor]:
    features = call["features"].to(precision, copy=True).requires_grad_()
    weight = call["weight"].to(precision, copy=True).requires_grad_()
    bias = (call["bias"] if call.arrays["bias"] is not None else torch.zeros(len(weight))).to(precision, copy=True)
    bias.requires_grad_()
    scores, losses = [], []
    for i, (f, fc, r, rc) in enumerate(call["segment"].tolist()):
        s = (features[f : f + fc] @ weight[r : r + rc].T + bias[r : r + rc]).view(-1)
        scores.append(s)
        if (target := int(call["target"][i])) == IGNORE:
            losses.append(torch.zeros((), dtype=precision))
            continue
        smooth = float(call["smoothing"][i])
        loss = torch.nn.functional.cross_entropy(s, torch.tensor(target), label_smoothing=smooth)
        losses.append(loss + call.reals[0] * torch.logsumexp(s, 0) ** 2)
    for (f, r), value in zip(call["point"].tolist(), call["value"].tolist(), strict=True):
        s = features[f] @ weight[r] + bias[r]
        scores.append(s.view(1))
        losses.append((s - value) ** 2)
    flat, loss = torch.cat(scores), torch.stack(losses)
    terms = call["loss_weight"].to(precision) * loss
    total = terms.sum()
    by_task = torch.zeros(call["by_task"].numel(), dtype=precision).index_add(0, call["task"], terms)
    total.backward()
    grads = {"grad_features": features.grad, "grad_weight": weight.grad, "grad_bias": bias.grad}
    results = {"scores": flat, "loss": loss, "total": total.view(1), "by_task": by_task, **grads}
    return {name: x.detach() for name, x in results.items() if x is not None}


@pytest.mark.parametrize("hidden", [64, 37, 600])
@pytest.mark.parametrize("storage", STORAGES, ids=str)
def test_heads_against_float64(driver: Path, tmp_path: Path, storage: torch.dtype, hidden: int) -> None:
    gradients = hidden != 37 or storage != torch.float64
    call, _ = head_call(storage, hidden=hidden, gradients=gradients, bias=hidden != 600)
    exact, own = head_oracle(call, torch.float64), head_oracle(call, real(storage))
    run(driver, [call], tmp_path)
    assert len(call.launches) == 2
    assert call.fault == ("none", 0, 0)
    for name, expected in exact.items():
        if call.arrays[name] is not None:
            floor = 1e-12 if storage == torch.float64 else 3e-6
            assert_as_good(call[name], expected, own[name].to(call[name].dtype), floor, f"{name} {storage}")
    if gradients:
        assert (call["grad_weight"][-1] == 0).all()


def test_bad_heads(driver: Path, tmp_path: Path) -> None:
    good, lengths = head_call(torch.float32, hidden=64)
    whole = head_oracle(good, torch.float64)
    changes = {
        "feature": (torch.tensor([90, 1, 0, 2]), 90),
        "row": (torch.tensor([0, 1, 158, 2]), 158),
        "shape": (torch.tensor([0, 2, 0, 2]), 2),
    }
    calls = []
    for segment, _ in changes.values():
        call, _ = head_call(torch.float32, hidden=64)
        call["segment"][6] = segment
        call["target"][9] = 1000
        calls.append(call)
    far, _ = head_call(torch.float32, hidden=64)
    far["segment"][6] = torch.tensor([-(1 << 63), (1 << 63) - 1, 1 << 62, 1])
    point, _ = head_call(torch.float32, hidden=64)
    point["point"][1, 0] = -1
    offsets, _ = head_call(torch.float32, hidden=64)
    offsets["offsets"][3] = -(1 << 63)
    task, _ = head_call(torch.float32, hidden=64)
    task["task"][7] = 5
    run(driver, [*calls, far, point, offsets, task], tmp_path)
    for call, (kind, (_, value)) in zip(calls, changes.items(), strict=True):
        assert call.fault == (kind, 6, value)
        assert torch.isnan(call["loss"]).nonzero().view(-1).tolist() == [6, 9]
        assert torch.isfinite(call["grad_weight"]).all()
        begin = int(call["offsets"][6])
        assert (call["grad_scores"][begin : begin + int(lengths[6])] == 0).all()
    assert far.fault[:2] == ("shape", 6)
    assert point.fault == ("feature", 27, -1)
    assert offsets.fault[:2] == ("offsets", 2)
    assert task.fault == ("task", 7, 5)
    kept = torch.arange(len(whole["loss"])) != 27
    assert torch.allclose(point["loss"][kept].double(), whole["loss"][kept], rtol=1e-5)


def sum_call(count: int, wide: bool, more: bool) -> Call:
    generator = torch.Generator().manual_seed(count)
    kind = torch.float64 if wide else torch.float32
    arrays: dict[str, Tensor | None] = {
        "loss": torch.randn(count, generator=generator).to(kind),
        "weight": torch.rand(count, generator=generator),
        "task": torch.randint(7, (count,), generator=generator),
        "more": torch.randn(count, generator=generator).to(kind) if more else None,
        "more_weight": torch.rand(count, generator=generator) if more else None,
        "total": torch.zeros(1, dtype=kind),
        "by_task": torch.zeros(7, dtype=kind),
        "fault": torch.zeros(3, dtype=torch.int64),
    }
    return Call(1, [int(wide), count, 7], [], arrays)


def test_sums_and_scale(driver: Path, tmp_path: Path) -> None:
    calls = [sum_call(n, wide, more) for n in (0, 1, 1000) for wide in (False, True) for more in (False, True)]
    scales = []
    for storage in STORAGES:
        for by in (1.0, 0.5):
            arrays = {"x": torch.arange(1003).to(storage), "scale": torch.tensor([by], dtype=real(storage))}
            past = {"x": storage.itemsize}
            scales.append(Call(3, [STORAGES.index(storage), 1003], [], arrays, past=past))
    run(driver, calls + scales, tmp_path)
    for call in calls:
        terms = call["weight"].double() * call["loss"].double()
        if call.arrays["more"] is not None:
            terms += call["more_weight"].double() * call["more"].double()
        by_task = torch.zeros(7, dtype=torch.float64).index_add(0, call["task"], terms)
        assert torch.allclose(call["total"].double(), terms.sum(), rtol=1e-6, atol=1e-6)
        assert torch.allclose(call["by_task"].double(), by_task, rtol=1e-6, atol=1e-6)
    for call in scales:
        expected = (torch.arange(1003).to(call["x"].dtype).to(call["scale"].dtype) * call["scale"]).to(call["x"].dtype)
        assert torch.equal(call["x"], expected)


# ----------------------------------------------------------------------------------------------------------------------
# Sanitizers


def sanitized_calls() -> list[Call]:
    """Every path, small: neighbours that share 16 bytes, in place, on clusters, longer than the registers."""
    bf16 = torch.bfloat16
    calls = [
        segments([5, 9, 1, 30, 7, 12], bf16, "entropy", in_place=True),
        segments([4099, 3, 2507, 11], bf16, "both", in_place=True, smoothing=0.1),
        segments([4099, 4101], torch.float64, "entropy", in_place=True),
        segments([5000, 6001], bf16, "entropy", capability=8, in_place=True),
        segments([2100, 2200], torch.float32, "divergence", past={"y": 4}),
        sum_call(100, False, True),
        head_call(bf16, hidden=24)[0],
        head_call(torch.float32, hidden=5, gradients=False)[0],
    ]
    bad = segments([30] * 6, bf16, "entropy", in_place=True)
    bad["target"][:] = 99
    return [*calls, bad]


@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_sanitizers(tmp_path: Path, sanitizer: str) -> None:
    driver = build(tmp_path, "-O1", "-g", f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all")
    run(driver, sanitized_calls(), tmp_path)
