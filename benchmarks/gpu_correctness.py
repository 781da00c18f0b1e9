"""The loss kernels on this machine's GPU against the reference implementation in float64, and what only a GPU can show.

Owns: the checks that need no test runner, so that they also run under compute-sanitizer: values and gradients of all
ops, storage types and length paths; indexes beyond 2^31; faults; streams and devices; the same bits every time.

    python benchmarks/gpu_correctness.py [--small] [--device cpu]
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from trainer.losses import ReferenceLosses, fused
from trainer.losses.interface import IGNORE

STORAGES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# Around the borders of whatever a kernel may hold: lanes, warps, blocks, shared memory, clusters.
LENGTHS = (1, 2, 3, 7, 31, 32, 33, 127, 129, 151, 255, 257, 1000, 1023, 1025, 2049, 4097, 8191, 16385, 32769)
LONG = (50265, 65537, 128256, 131073, 262145)
SMALL = (1, 2, 3, 31, 33, 151, 1025, 5003, 40001)

Where = torch.device


def backward(total: Tensor, keep: bool = False) -> None:
    total.backward(retain_graph=keep)  # type: ignore[no-untyped-call]


def close(what: str, found: Tensor, exact: Tensor, storage: torch.dtype, slack: float = 3e-5) -> None:
    """Each number is within its storage's rounding, and `slack` of the largest for the arithmetic."""
    exact = exact.double()
    found = found.detach().to(exact.device).double()
    if storage == torch.float64:
        slack = 1e-11
    top = float(exact.abs().max()) if exact.numel() else 0.0
    tiny = 1e-7 if storage == torch.float16 else 0.0  # its smallest numbers are coarse
    bound = exact.abs() * torch.finfo(storage).eps + slack * top + tiny
    worst = float(((found - exact).abs() - bound).max()) if exact.numel() else 0.0
    if not worst <= 0 or not bool(torch.isfinite(found).all()):
        raise AssertionError(f"{what}: {worst:.3g} beyond its bound; the largest number is {top:.3g}")


def segments(lengths: list[int], storage: torch.dtype, where: Where, seed: int = 0, shift: int = 0) -> dict[str, Any]:
    """Two score buffers that start `shift` elements into their memory, and everything that describes them."""
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    count, elements = len(lengths), int(offsets[-1])

    def buffer(values: Tensor) -> Tensor:
        return torch.cat([values.new_zeros(shift), values]).to(where, storage)[shift:]

    x = torch.randn(elements, generator=generator) * 3
    target = torch.randint(2**40, (count,), generator=generator) % torch.tensor(lengths)
    target[::7] = IGNORE
    likely = torch.arange(1, count, 3)
    likely = likely[target[likely] != IGNORE]
    x[offsets[likely] + target[likely]] += 20  # a probability near 1
    given = {
        "x": buffer(x),
        "y": buffer(x + torch.randn(elements, generator=generator) * 0.3),
        "offsets": offsets,
        "target": target,
        "weight": torch.rand(count, generator=generator),
        "kl_weight": torch.rand(count, generator=generator),
        "smoothing": torch.rand(count, generator=generator) * (torch.arange(count) % 2),
        "task": torch.randint(5, (count,), generator=generator),
    }
    return {name: value.to(where) for name, value in given.items()}


def segment_ops(where: Where, lengths: list[int], storage: torch.dtype, shift: int, longest: int) -> None:
    """Cross-entropy, KL, both, and cross-entropy in place."""
    d = segments(lengths, storage, where, shift=shift)
    exact = {name: v.cpu() for name, v in d.items()}
    for op, takes_y, options in (
        ("segment_cross_entropy", False, {"z_loss": 1e-3, "smoothing": True}),
        ("segment_symmetric_kl", True, {}),
        ("segment_cross_entropy_kl", True, {"smoothing": True}),
    ):
        results = []
        for losses, data, dtype in ((fused, d, storage), (ReferenceLosses(), exact, torch.float64)):
            leaves = [data[n].to(dtype).detach().requires_grad_() for n in ("x", "y")[: 1 + takes_y]]
            if dtype == storage and shift:  # .to() and .detach() share memory: still unaligned
                assert leaves[0].data_ptr() % 16 or where.type != "cuda"
            names = [
                "offsets",
                *(["target"] if "cross" in op else []),
                "weight",
                *(["kl_weight"] if "y_kl" in op else []),
            ]
            said: dict[str, Any] = dict(options)
            if "smoothing" in said:
                said["smoothing"] = data["smoothing"]
            result = getattr(losses, op)(
                *leaves, *(data[n] for n in names), task=data["task"], tasks=5, longest=longest, **said
            )
            backward(result.total)
            results.append((result, [leaf.grad for leaf in leaves]))
        (ours, grads), (truth, exact_grads) = results
        for field in ("total", "loss", "divergence", "by_task"):
            close(f"{op} {field}", getattr(ours, field), getattr(truth, field), torch.float32)
        for name, gradient, wanted in zip("xy", grads, exact_grads, strict=False):
            close(f"{op} gradient of {name}", gradient, wanted, storage)
    x = d["x"].clone() if not shift else d["x"]
    inputs = x.double().cpu().clone().requires_grad_()
    _, loss = torch.ops.sett.segment_cross_entropy_(x, d["offsets"], d["target"], d["weight"], None, 0.0, longest)
    truth = ReferenceLosses().segment_cross_entropy(inputs, exact["offsets"], exact["target"], exact["weight"])
    backward(truth.total)
    assert inputs.grad is not None
    close("in place: loss", loss, truth.loss, torch.float32)
    close("in place: gradient", x, inputs.grad, storage)


def heads_data(storage: torch.dtype, where: Where, hidden: int, bias: bool = True) -> dict[str, Any]:
    """Classification, multiple choice, spans and regression, with rows and features that nobody uses."""
    generator = torch.Generator().manual_seed(hidden)
    sizes = [2, 3, 5, 8, 33, 151, 1, 2]
    first = [sum(sizes[:i]) + 3 for i in range(len(sizes))]
    rows, features = sum(sizes) + 7, 90
    classified = [[i, 1, first[i % 6], sizes[i % 6]] for i in range(60)]
    chosen = [[60 + 4 * i, 4, first[6], 1] for i in range(3)]
    spans = [[40, 50, first[7] + side, 1] for side in (0, 1)]
    segment = torch.tensor(classified + chosen + spans)
    lengths = segment[:, 1] * segment[:, 3]
    count = len(segment)
    target = torch.randint(2**40, (count,), generator=generator) % lengths
    target[::9] = IGNORE
    given: dict[str, Any] = {
        "features": torch.randn(features, hidden, generator=generator).to(storage),
        "weight": (torch.randn(rows, hidden, generator=generator) / hidden**0.5).to(storage),
        "bias": torch.randn(rows, generator=generator).to(storage) if bias else None,
        "segment": segment,
        "offsets": torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]),
        "target": target,
        "loss_weight": torch.rand(count + 6, generator=generator),
        "point": torch.stack([torch.arange(6) * 3, torch.full((6,), first[6])], 1),
        "value": torch.rand(6, generator=generator),
    }
    return {name: v if v is None else v.to(where) for name, v in given.items()}


def head_op(where: Where, storage: torch.dtype, hidden: int, bias: bool) -> None:
    d = heads_data(storage, where, hidden, bias)
    results = []
    losses: Any
    for losses, device, dtype in ((fused, where, storage), (ReferenceLosses(), torch.device("cpu"), torch.float64)):
        data: dict[str, Any] = {name: v if v is None else v.to(device) for name, v in d.items()}
        leaves = [v if v is None else v.detach().to(dtype).requires_grad_() for v in list(data.values())[:3]]
        task = torch.arange(len(d["loss_weight"]), device=device) % 4
        result: Any = losses.head_losses(
            *leaves, *list(data.values())[3:], scores=int(d["offsets"][-1]), task=task, tasks=4
        )
        backward(result.total)
        results.append((result, [leaf.grad for leaf in leaves if leaf is not None]))
    (ours, grads), (truth, exact_grads) = results
    for field in ("total", "loss", "scores", "by_task"):
        close(f"heads {field}", getattr(ours, field), getattr(truth, field), torch.float32)
    for name, gradient, wanted in zip(("features", "weight", "bias"), grads, exact_grads, strict=False):
        close(f"heads gradient of {name}", gradient, wanted, storage)
        assert not bool(gradient.cpu()[wanted == 0].any()), f"heads gradient of {name}: unused rows must be zero"


def linear_op(where: Where, storage: torch.dtype, rows: int, hidden: int, words: int, **options: Any) -> None:
    generator = torch.Generator().manual_seed(rows)
    h = torch.randn(rows, hidden, generator=generator).to(storage)
    w = (torch.randn(words, hidden, generator=generator) / hidden**0.5).to(storage)
    b = torch.randn(words, generator=generator).to(storage) if options.pop("bias", False) else None
    target = torch.randint(words, (rows,), generator=generator)
    target[::5] = IGNORE
    weight = torch.rand(rows, generator=generator) / rows
    results = []
    losses: Any
    for losses, device, dtype in ((fused, where, storage), (ReferenceLosses(), torch.device("cpu"), torch.float64)):
        leaves = [v if v is None else v.detach().to(device, dtype).requires_grad_() for v in (h, w, b)]
        result: Any = losses.linear_cross_entropy(*leaves, target.to(device), weight.to(device), **options)
        backward(result.total)
        results.append((result, [leaf.grad for leaf in leaves if leaf is not None]))
    (ours, grads), (truth, exact_grads) = results
    # Logits are rounded to the storage type before the loss, as in any model: by 2^-9 of some tens in bf16.
    for name, found, wanted in [
        ("total", ours.total, truth.total),
        ("loss", ours.loss, truth.loss),
        *zip(("hidden", "weight", "bias"), grads, exact_grads, strict=False),
    ]:
        eps = max(torch.finfo(storage).eps, 1e-6 if storage == torch.float32 else 0.0)
        error = float((found.detach().cpu().double() - wanted).norm() / wanted.norm())
        assert error <= 4 * eps, f"linear {name}: off by {error:.2g} in norm"


def second_pass(where: Where, storage: torch.dtype, rows: int, hidden: int, words: int) -> None:
    """R3F's divergences, of the small heads and of a vocabulary."""
    draw = torch.Generator().manual_seed(rows)
    h, weight = heads_data(storage, where, hidden), torch.rand(rows, generator=draw) / rows
    w = (torch.randn(words, hidden, generator=draw) / hidden**0.5).to(storage)
    x, y = (torch.randn(rows, hidden, generator=draw).to(storage) for _ in range(2))
    other = (h["features"].cpu() + torch.randn(h["features"].shape, generator=draw)).to(storage)
    layout = [h[name] for name in ("segment", "offsets", "loss_weight", "point")]
    results = []
    losses: Any
    for losses, device, dtype in ((fused, where, storage), (ReferenceLosses(), torch.device("cpu"), torch.float64)):
        leaves = [v.detach().to(device, dtype).requires_grad_() for v in (h["features"], other, h["weight"], h["bias"])]
        its = [v.to(device) for v in layout]
        small: Any = losses.head_divergence(*leaves, *its, gradient="both", scores=int(h["offsets"][-1]))
        large = [v.detach().to(device, dtype).requires_grad_() for v in (x, y, w)]
        vocabulary: Any = losses.linear_symmetric_kl(*large, None, weight.to(device), gradient="both")
        backward(small.total)
        backward(vocabulary.total)
        found = [small.total, small.divergence, vocabulary.total, vocabulary.divergence]
        results.append([*found, *(leaf.grad for leaf in (*leaves, *large))])
    for number, (ours, wanted) in enumerate(zip(*results, strict=True)):
        eps = max(torch.finfo(storage).eps, 1e-6 if storage == torch.float32 else 0.0)
        error = float((ours.detach().cpu().double() - wanted.detach()).norm() / wanted.detach().norm())
        assert error <= 4 * eps, f"second pass, result {number}: off by {error:.2g} in norm"


def beyond_int32(where: Where) -> None:
    """2^31 elements and more, functional and in place; rows are compared where the index overflows, and last."""
    words = 128256
    rows = 2**31 // words + 40
    x = torch.randn(rows, words, dtype=torch.bfloat16, device=where, generator=torch.Generator(where).manual_seed(0))
    target = torch.arange(rows, device=where) * 7919 % words
    weight = torch.rand(rows, device=where)
    offsets = torch.arange(rows + 1, device=where) * words
    border = 2**31 // words
    watched = torch.tensor([0, border // 2, border - 1, border, border + 1, rows - 1], device=where)
    inputs = x[watched].cpu().double().flatten().requires_grad_()
    some = torch.arange(len(watched) + 1) * words
    truth = ReferenceLosses().segment_cross_entropy(inputs, some, target[watched].cpu(), weight[watched].cpu())
    backward(truth.total)
    assert inputs.grad is not None
    x.requires_grad_()
    result = fused.segment_cross_entropy(x.view(-1), offsets, target, weight, longest=words)
    backward(result.total)
    assert x.grad is not None
    close("beyond 2^31: loss", result.loss[watched], truth.loss, torch.float32)
    close("beyond 2^31: gradient", x.grad[watched].flatten(), inputs.grad, torch.bfloat16)
    gradient, x.grad = x.grad, None
    flat = x.detach().view(-1)
    _, loss = torch.ops.sett.segment_cross_entropy_(flat, offsets, target, weight, None, 0.0, words)
    assert torch.equal(loss, result.loss)
    assert torch.equal(flat, gradient.view(-1)), "in place and functional differ"


def faults(where: Where) -> None:
    """Each wrong index is an error that names it, and the next call works."""

    def expect(words: str, call: Callable[[], Any]) -> None:
        try:
            call()
            if where.type == "cuda":
                torch.cuda.synchronize()
            fused.check_faults()
        except (RuntimeError, ValueError) as error:
            if words not in str(error):
                raise AssertionError(f"expected '{words}' in: {error}") from error
            return
        raise AssertionError(f"no error that says '{words}'")

    d = segments([5, 7, 3, 40000], torch.float32, where)
    names = ["x", "offsets", "target", "weight"]
    for change, words in (("target", "target"), ("offsets", "offset")):
        wrong = d[change].clone()
        wrong[2] = 10**9
        given = {**d, change: wrong}
        expect(words, partial(fused.segment_cross_entropy, *(given[n] for n in names)))
    h = heads_data(torch.float32, where, 64)
    for name, column, words in (("segment", 0, "feature"), ("segment", 2, "row"), ("target", None, "target")):
        wrong = h[name].clone()
        if column is None:
            wrong[1] = 12345
        else:
            wrong[1, column] = 12345
        given = {**h, name: wrong}
        scores = int(h["offsets"][-1])
        expect(words, partial(fused.head_losses, **given, scores=scores))
    segment_ops(where, [5, 7], torch.float32, 0, -1)


def same_bits(where: Where, repetitions: int) -> None:
    """The same input gives the same bits, on an idle and on a busy device."""
    d = segments([*SMALL, *([300] * 200)], torch.bfloat16, where)
    h = heads_data(torch.bfloat16, where, 768)

    def once() -> list[Tensor]:
        x, y = d["x"].detach().requires_grad_(), d["y"].detach().requires_grad_()
        names = ["offsets", "target", "weight", "kl_weight"]
        both = fused.segment_cross_entropy_kl(x, y, *(d[n] for n in names), task=d["task"], tasks=5)
        leaves = [v.detach().requires_grad_() for v in list(h.values())[:3]]
        heads = fused.head_losses(*leaves, *list(h.values())[3:], scores=int(h["offsets"][-1]))
        backward(both.total + heads.total)
        return [both.total, both.loss, both.by_task, heads.total, heads.scores, *(v.grad for v in (x, y, *leaves))]

    first = [t.detach().clone() for t in once()]
    for number in range(repetitions):
        for place, (a, b) in enumerate(zip(first, once(), strict=True)):
            assert torch.equal(a, b), f"run {number} differs from the first in result {place}"


def streams_and_devices(where: Where) -> None:
    """Kernels run on the current stream, after what writes their input; and on the device of their input."""
    words, rows = 5003, 64
    offsets = torch.arange(rows + 1, device=where) * words
    target, weight = torch.arange(rows, device=where), torch.ones(rows, device=where)
    right = torch.randn(rows * words, device=where, generator=torch.Generator(where).manual_seed(1))
    expected = fused.segment_cross_entropy(right, offsets, target, weight).loss
    x = torch.zeros_like(right)
    torch.cuda.synchronize()
    make: Any = torch.cuda.Stream
    stream = make()
    with torch.cuda.stream(stream):
        sleep: Any = torch.cuda._sleep
        sleep(10**8)  # tens of milliseconds: on another stream the kernel would see zeros
        x.copy_(right)
        loss = fused.segment_cross_entropy(x, offsets, target, weight).loss
    stream.synchronize()
    assert torch.equal(loss, expected), "the kernel did not wait for its stream"
    for number in range(1, torch.cuda.device_count()):
        other = torch.device("cuda", number)
        for storage in (torch.float32, torch.bfloat16):
            segment_ops(other, [3, 151, 5003], storage, 1, -1)
            head_op(other, storage, 768, True)


def upstream(where: Where) -> None:
    """Gradients for an upstream other than 1, and for a graph that is kept."""
    d = segments([5, 151, 5003], torch.float32, where)
    x = d["x"].requires_grad_()
    grads = []
    for factor, times in ((1.0, 1), (1024.0, 1), (3.0, 2)):
        total = fused.segment_cross_entropy(x, d["offsets"], d["target"], d["weight"]).total * factor
        for again in range(times):
            x.grad = None
            backward(total, keep=again + 1 < times)
        assert x.grad is not None
        grads.append(x.grad / factor)
    close("upstream 1024", grads[1], grads[0].cpu(), torch.float32)
    close("graph kept", grads[2], grads[0].cpu(), torch.float32)


def checks(where: Where, small: bool) -> Iterator[tuple[str, Callable[[], None]]]:
    """All checks by name."""
    short = list(SMALL if small else LENGTHS) * 2
    for storage in STORAGES:
        kind = str(storage)[6:]
        yield f"segments {kind}", partial(segment_ops, where, short, storage, 0, max(short))
        yield f"segments {kind}, unaligned", partial(segment_ops, where, short, storage, 1, -1)
        for length in () if small else LONG:
            row, name = [length, 3, length], f"segments {kind}, {length}"
            yield name, partial(segment_ops, where, row, storage, 0, length)
            yield f"{name}, unaligned", partial(segment_ops, where, [1, *row], storage, 3, -1)
        for hidden, bias in product((64, 768) if small else (1, 7, 64, 768, 1000, 4096), (True, False)):
            name = f"heads {kind}, hidden {hidden}, {'bias' if bias else 'no bias'}"
            yield name, partial(head_op, where, storage, hidden, bias)
        size = (40, 64, 1003) if small else (2500, 128, 5003)
        yield f"linear {kind}", partial(linear_op, where, storage, *size)
        extras: dict[str, Any] = {"bias": True, "softcap": 30.0, "z_loss": 1e-4}
        yield f"linear {kind}, {', '.join(extras)}", partial(linear_op, where, storage, *size, **extras)
        yield f"second pass {kind}", partial(second_pass, where, storage, *size)
    yield "upstream gradients", partial(upstream, where)
    yield "same bits", partial(same_bits, where, 5 if small else 200)
    if not small:
        yield "faults", partial(faults, where)
        if where.type == "cuda":
            yield "streams and devices", partial(streams_and_devices, where)
            yield "beyond 2^31 elements", partial(beyond_int32, where)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="small shapes and no faults, for compute-sanitizer")
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    fused.load(lambda text: print(text, flush=True))
    failed = []
    every = list(checks(torch.device(options.device), options.small))
    for name, check in every:
        start = time.monotonic()
        try:
            check()
            if options.device != "cpu":
                torch.cuda.synchronize()
            fused.check_faults()
        except Exception:
            failed.append(name)
            traceback.print_exc()
        said = "FAILED" if failed and failed[-1] == name else "ok"
        print(f"{said:7} {name} ({time.monotonic() - start:.1f} s)", flush=True)
    print(
        f"{len(every) - len(failed)} of {len(every)} checks passed" + "".join(f"\n  failed: {name}" for name in failed)
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
