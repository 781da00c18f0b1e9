"""The ops under PyTorch's machinery: checks, compilation, autocast, kept graphs, threads, instruction sets."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from cases import heads, layout, segments, two_passes, two_sided, vocabulary
from oracle import gradient_within, in_double, run

from trainer.losses import linear
from trainer.losses.interface import Losses

CASES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "segment_cross_entropy": (segments([3, 0, 40, 1, 900], options=True, tasks=3), ("scores",)),
    "segment_symmetric_kl": (two_sided(segments([3, 40, 1, 900]), targets=False), ("x", "y")),
    "segment_cross_entropy_kl": (two_sided(segments([3, 40, 1, 900], options=True, tasks=3)), ("x", "y")),
    "head_losses": (heads(hidden=7), ("features", "weight", "bias")),
    "linear_cross_entropy": (
        vocabulary(rows=11, words=13, hidden=5, bias=True, smoothing=True, softcap=3.0, z_loss=1e-2),
        ("hidden", "weight", "bias"),
    ),
    "linear_symmetric_kl": (
        two_passes(vocabulary(rows=11, words=13, hidden=5, bias=True, softcap=3.0), "both"),
        ("x", "y", "weight", "bias"),
    ),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any], tuple[str, ...]]:
    return request.param, *CASES[request.param]


def wanting(arguments: dict[str, Any], leaves: tuple[str, ...]) -> dict[str, Any]:
    return arguments | {n: arguments[n].detach().clone().requires_grad_() for n in leaves}


def segment_op(c: dict[str, Any], gradient: bool) -> tuple[Any, ...]:
    x = c.get("scores", c.get("x"))
    weight, kl_weight = (c["weight"], c.get("kl_weight")) if "target" in c else (None, c["weight"])
    return (x, c.get("y"), c["offsets"], c.get("target"), weight, kl_weight, c.get("smoothing"),
            c.get("z_loss", 0.0), c.get("task"), c.get("tasks", 0), -1, gradient)  # fmt: skip


def head_op(c: dict[str, Any], gradient: bool) -> tuple[Any, ...]:
    return (c["features"], c["weight"], c["bias"], c["segment"], c["offsets"], c["target"], c["loss_weight"],
            c["smoothing"], c["point"], c["value"], c["z_loss"], c["task"], c["tasks"], c["scores"],
            gradient)  # fmt: skip


def linear_op(c: dict[str, Any], gradient: bool) -> tuple[Any, ...]:
    return (c["hidden"], c["weight"], c["bias"], c["target"], c["loss_weight"], c["smoothing"], c["softcap"],
            c["z_loss"], gradient, gradient)  # fmt: skip


def linear_kl_op(c: dict[str, Any], gradient: bool) -> tuple[Any, ...]:
    return (c["x"], c["y"], c["weight"], c["bias"], c["loss_weight"], c["softcap"], *[gradient] * 3)


@pytest.mark.parametrize("gradient", [True, False])
def test_opcheck(fused: Losses, case: tuple[str, dict[str, Any], tuple[str, ...]], gradient: bool) -> None:
    name, arguments, leaves = case
    arguments = wanting(arguments, leaves) if gradient else arguments
    op, flatten = {
        "head_losses": (torch.ops.sett.head_losses, head_op),
        "linear_cross_entropy": (torch.ops.sett.linear_cross_entropy, linear_op),
        "linear_symmetric_kl": (torch.ops.sett.linear_symmetric_kl, linear_kl_op),
    }.get(name, (torch.ops.sett.segment_losses, segment_op))
    torch.library.opcheck(op.default, flatten(arguments, gradient))


def test_ops_give_gradients_to_their_totals_alone(fused: Losses) -> None:
    """Whoever calls the ops themselves must not get a gradient of zero, or of the total, for a loss."""
    for name, op, flatten in (
        ("segment_cross_entropy_kl", torch.ops.sett.segment_losses, segment_op),
        ("head_losses", torch.ops.sett.head_losses, head_op),
        ("linear_cross_entropy", torch.ops.sett.linear_cross_entropy, linear_op),
        ("linear_symmetric_kl", torch.ops.sett.linear_symmetric_kl, linear_kl_op),
    ):
        arguments, leaves = CASES[name]
        outputs = op(*flatten(wanting(arguments, leaves), True))
        assert [part.requires_grad for part in outputs] == [True] + [False] * (len(outputs) - 1)


def test_opcheck_of_ops_in_place(fused: Losses) -> None:
    c = CASES["segment_cross_entropy"][0]
    arguments = (c["scores"].clone(), c["offsets"], c["target"], c["weight"], c["smoothing"], c["z_loss"], -1)
    torch.library.opcheck(torch.ops.sett.segment_cross_entropy_.default, arguments)


def test_gradients_in_float64_are_the_slopes(
    losses: Losses, case: tuple[str, dict[str, Any], tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "_ROWS_CPU", dict.fromkeys(linear._ROWS_CPU, 4))
    name, _, leaves = case
    small = {
        "segment_cross_entropy": segments([3, 0, 8, 1], options=True),
        "segment_symmetric_kl": two_sided(segments([3, 8, 1]), targets=False),
        "segment_cross_entropy_kl": two_sided(segments([3, 8, 1], options=True)),
        "head_losses": heads(hidden=3, classification=3),
        "linear_cross_entropy": CASES[name][0],
        "linear_symmetric_kl": CASES[name][0],
    }[name]
    arguments = in_double(small, leaves)

    def total(*values: torch.Tensor) -> torch.Tensor:
        return getattr(losses, name)(**arguments | dict(zip(leaves, values, strict=True))).total

    inputs = tuple(arguments[n].detach().clone().requires_grad_() for n in leaves)
    assert torch.autograd.gradcheck(total, inputs, fast_mode=name == "head_losses")


def in_training(function: Callable[..., Any], arguments: dict[str, Any]) -> Callable[..., Any]:
    """A loss among other operations, as a model has it."""

    def step(*leaves: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        names = list(arguments["leaves"])
        result = function(**arguments["rest"], **{n: x * 2 for n, x in zip(names, leaves, strict=True)})
        return result.total * 3 + 1, result[1].detach().sum()

    return step


@pytest.mark.parametrize("storage", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_compiled_equals_eager(
    fused: Losses, case: tuple[str, dict[str, Any], tuple[str, ...]], storage: torch.dtype
) -> None:
    name, arguments, leaves = case
    arguments = arguments | {n: arguments[n].to(storage) for n in leaves}
    rest = {n: a for n, a in arguments.items() if n not in leaves}
    step = in_training(getattr(fused, name), {"leaves": leaves, "rest": rest})
    backend = "inductor" if name == "segment_cross_entropy" and storage == torch.float32 else "aot_eager"
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    outcomes = []
    for call in (step, compiled):
        inputs = [arguments[n].detach().clone().requires_grad_() for n in leaves]
        total, loss = call(*inputs)
        total.backward()
        outcomes.append((total.detach(), loss, [x.grad for x in inputs]))
    (a, b, c), (d, e, f) = outcomes
    torch.testing.assert_close(d, a, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(e, b, rtol=1e-6, atol=1e-6)
    for mine, eager in zip(f, c, strict=True):
        rounding = 2 * torch.finfo(storage).eps
        torch.testing.assert_close(mine, eager, rtol=rounding, atol=rounding * 1e-3)


def test_compiled_once_for_all_lengths(fused: Losses) -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def step(scores: torch.Tensor, offsets: torch.Tensor, target: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return fused.segment_cross_entropy(scores, offsets, target, weight).total

    compiled = torch.compile(step, fullgraph=True, backend=counter, dynamic=True)
    compilations = []
    for lengths in ([3, 4], [5, 60, 7], [2, 9, 30, 200]):
        c = segments(lengths)
        arguments = (c["scores"].requires_grad_(), c["offsets"], c["target"], c["weight"])
        total = compiled(*arguments)
        (gradient,) = torch.autograd.grad(total, arguments[0])
        (expected,) = torch.autograd.grad(step(*arguments), arguments[0])
        torch.testing.assert_close(gradient, expected, rtol=0, atol=0)
        compilations.append(counter.frame_count)
    assert compilations[0] == compilations[-1], "compiled again for other lengths"


@pytest.mark.parametrize("name", ["head_losses", "linear_cross_entropy"])
def test_autocast_takes_mixed_types(losses: Losses, name: str) -> None:
    """fp32 features and weights, bf16 arithmetic; gradients come back in fp32. Some layers give bf16 features."""
    arguments, leaves = CASES[name]
    low = in_double(arguments | {n: arguments[n].bfloat16() for n in leaves}, leaves)
    exact = run(getattr(oracle, name), low, leaves)
    for first in (torch.float32, torch.bfloat16):
        mixed = arguments | {leaves[0]: arguments[leaves[0]].to(first)}
        with torch.autocast("cpu", torch.bfloat16):
            mine = run(getattr(losses, name), mixed, leaves)
        torch.testing.assert_close(mine.result.total.double(), exact.result.total, rtol=3e-2, atol=0)
        assert mine.result.total.dtype == torch.float32
        for leaf in leaves:
            assert mine.gradient[leaf].dtype == mixed[leaf].dtype
            true = exact.gradient[leaf]
            assert (mine.gradient[leaf].double() - true).abs().max() <= 3e-2 * true.abs().max()


@pytest.mark.parametrize("upstream", [1.0, 0.0, -3.0, 65536.0, 1e-3])
def test_upstream_scales_and_kept_graphs(
    losses: Losses, case: tuple[str, dict[str, Any], tuple[str, ...]], upstream: float
) -> None:
    name, arguments, leaves = case
    once = run(getattr(losses, name), arguments, leaves, upstream=1.0)
    wanted = wanting(arguments, leaves)
    total = getattr(losses, name)(**wanted).total * upstream
    inputs = [wanted[n] for n in leaves]
    first = torch.autograd.grad(total, inputs, retain_graph=True)
    second = torch.autograd.grad(total, inputs, retain_graph=True)
    last = torch.autograd.grad(total, inputs)
    for leaf, a, b, c in zip(leaves, first, second, last, strict=True):
        torch.testing.assert_close(a, once.gradient[leaf] * upstream, rtol=1e-5, atol=1e-6 * abs(upstream))
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def test_accumulated_gradients_add_up(losses: Losses, case: tuple[str, dict[str, Any], tuple[str, ...]]) -> None:
    """Two backwards into the same leaves, and two losses of the same leaves in one backward."""
    name, arguments, leaves = case
    once = run(getattr(losses, name), arguments, leaves)
    wanted = wanting(arguments, leaves)
    for _ in range(2):
        getattr(losses, name)(**wanted).total.backward()
    (getattr(losses, name)(**wanted).total + 2 * getattr(losses, name)(**wanted).total).backward()
    for leaf in leaves:
        torch.testing.assert_close(wanted[leaf].grad, 5 * once.gradient[leaf], rtol=1e-5, atol=1e-6)


def test_only_the_total_goes_back(losses: Losses, case: tuple[str, dict[str, Any], tuple[str, ...]]) -> None:
    name, arguments, leaves = case
    result = getattr(losses, name)(**wanting(arguments, leaves))
    for field in result._fields[1:]:
        part = getattr(result, field)
        assert not part.requires_grad
        with pytest.raises(RuntimeError, match="does not require grad"):
            part.sum().backward()
    with torch.no_grad():
        silent = getattr(losses, name)(**wanting(arguments, leaves))
    assert not silent.total.requires_grad
    assert torch.equal(silent.total, result.total.detach())


def bits(result: oracle.Run) -> list[torch.Tensor]:
    return [*(part.detach() for part in result.result), *result.gradient.values()]


@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16])
def test_same_bits_in_every_run_and_on_any_number_of_threads(
    fused: Losses, case: tuple[str, dict[str, Any], tuple[str, ...]], storage: torch.dtype
) -> None:
    name, _, leaves = case
    arguments = {
        "segment_cross_entropy": segments([300] * 200 + [50265], storage=storage, tasks=5),
        "segment_symmetric_kl": two_sided(segments([300] * 200, storage=storage, tasks=5), targets=False),
        "segment_cross_entropy_kl": two_sided(segments([300] * 200, storage=storage, tasks=5)),
        "head_losses": heads(hidden=256, classification=2000, storage=storage),
        "linear_cross_entropy": vocabulary(rows=300, words=501, hidden=64, bias=True, storage=storage),
        "linear_symmetric_kl": two_passes(
            vocabulary(rows=300, words=501, hidden=64, bias=True, storage=storage), "both"
        ),
    }[name]
    torch.set_num_threads(1)
    expected = bits(run(getattr(fused, name), arguments, leaves))
    # torch's own matrix products promise the same bits on the same number of threads alone.
    for threads in (1, 1) if name.startswith("linear") else (1, 2, 4):
        torch.set_num_threads(threads)
        for a, b in zip(bits(run(getattr(fused, name), arguments, leaves)), expected, strict=True):
            assert torch.equal(a, b), f"{threads} threads"


def test_fp16_keeps_digits_under_tiny_weights_and_a_loss_scale(fused: Losses) -> None:
    """Weights of 1e-6 give gradients below fp16's smallest number; times 65536 they are ordinary ones."""
    for name in ("segment_cross_entropy", "segment_cross_entropy_kl"):
        plain = segments([3, 40, 500], 31, storage=torch.float16)
        plain["weight"] = torch.tensor([1e-6, 3e-6, 2e-6])
        arguments, leaves = (two_sided(plain), ("x", "y")) if name.endswith("kl") else (plain, ("scores",))
        mine = run(getattr(fused, name), arguments, leaves, upstream=65536.0)
        exact = run(getattr(oracle, name), in_double(arguments, leaves), leaves, upstream=65536.0)
        torch.testing.assert_close(mine.result.total.double(), exact.result.total, rtol=3e-6, atol=0)
        for leaf in leaves:
            oracle.rounded_once(mine.gradient[leaf], exact.gradient[leaf], arguments)
    for name in ("head_losses", "linear_cross_entropy"):
        arguments, leaves = CASES[name]
        arguments = arguments | {n: arguments[n].half() for n in leaves}
        arguments["loss_weight"] = arguments["loss_weight"] * 1e-6
        mine = run(getattr(fused, name), arguments, leaves, upstream=65536.0)
        exact = run(getattr(oracle, name), in_double(arguments, leaves), leaves, upstream=65536.0)
        for leaf in leaves:
            true = exact.gradient[leaf]
            assert (mine.gradient[leaf].double() - true).abs().max() <= 5e-3 * true.abs().max(), (name, leaf)


def test_fp16_gradients_do_not_overflow_under_large_weights(fused: Losses) -> None:
    arguments = segments([3, 40], 32, storage=torch.float16) | {"weight": torch.tensor([1e6, 3e5])}
    mine = run(fused.segment_cross_entropy, arguments, ("scores",), upstream=1e-6)
    exact = run(oracle.segment_cross_entropy, in_double(arguments, ("scores",)), ("scores",), upstream=1e-6)
    true = exact.gradient["scores"]
    gradient_within(mine.gradient["scores"], true.half(), true)


ISA_SCRIPT = """
import sys, torch
sys.path.insert(0, sys.argv[1])
torch.set_num_threads(2)
import oracle, test_ops
from cases import heads, segments, two_sided
from trainer.losses import choose, fused
losses = choose("fused")
lengths = [*range(1, 70), 2051]
for storage in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
    case = segments(lengths, 41, storage=storage, options=True, tasks=3)
    mine, exact = oracle.check(losses.segment_cross_entropy, oracle.segment_cross_entropy, case, ("scores",))
    oracle.rounded_once(mine.gradient["scores"], exact.gradient["scores"], case)
    name = "segment_cross_entropy_kl"
    oracle.check(losses.segment_cross_entropy_kl, oracle.segment_cross_entropy_kl, two_sided(case), ("x", "y"))
    for hidden in (7, 96):
        case = heads(hidden=hidden, storage=storage)
        oracle.check(losses.head_losses, oracle.head_losses, case, ("features", "weight", "bias"))
print(fused.isa())
"""


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512"])
def test_every_instruction_set(fused: Losses, isa: str) -> None:
    """The same checks on each, in a process of its own; a processor without one says which it took instead."""
    done = subprocess.run(
        [sys.executable, "-c", ISA_SCRIPT, str(Path(__file__).parent)],
        env={**os.environ, "SETT_KERNELS_ISA": isa},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    order = ["generic", "avx2", "avx512"]
    best = torch.ops.sett.isa() if "SETT_KERNELS_ISA" not in os.environ else order[-1]
    used = done.stdout.split()[-1]
    assert used == min(isa, best, key=order.index) or "SETT_KERNELS_ISA" in os.environ


def test_an_unknown_instruction_set_is_named(fused: Losses) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from trainer.losses import fused; fused.load(); fused.isa()"],
        env={**os.environ, "SETT_KERNELS_ISA": "avx1024"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 1
    assert "SETT_KERNELS_ISA: 'avx1024'" in done.stderr


@pytest.mark.skipif("SETT_BIG_TESTS" not in os.environ, reason="8 GB AND A MINUTE: SETT_BIG_TESTS=1 runs it")
def test_more_scores_than_an_int32_counts(fused: Losses) -> None:
    """A segment that begins beyond 2^31, in place."""
    words, rows = 2**20, 2**11 + 1
    scores = torch.zeros(rows * words, dtype=torch.bfloat16)
    scores[-words:] = torch.randn(words).bfloat16()
    last = scores[-words:].clone()
    target = torch.full((rows,), -100)
    target[0], target[-1] = 5, words - 1
    _, loss = torch.ops.sett.segment_cross_entropy_(
        scores, layout([words] * rows), target, torch.ones(rows), None, 0.0, words
    )
    exact = -torch.log_softmax(last.double(), 0)[-1]
    torch.testing.assert_close(loss[-1].double(), exact, rtol=2e-6, atol=0)
    true = torch.softmax(last.double(), 0)
    true[-1] -= 1
    assert (scores[-words:].double() - true).abs().max() < 4e-3
    assert (scores[words:-words] == 0).all()
