"""Losses of flat scores, by each implementation, against float64."""

import math
from typing import Any

import oracle
import pytest
import torch
from cases import STORAGES, layout, segments, two_sided
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from oracle import check, gradient_within, in_double, loss_within, rounded_once, run, slack_of

from trainer.losses.interface import IGNORE, Losses

lengths_drawn = st.lists(st.one_of(st.integers(0, 300), st.integers(1, 4)), min_size=1, max_size=14).flatmap(
    lambda some: st.sampled_from([[], [2051]]).map(lambda long: some + long)
)
ragged = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],  # shrinking a rounding error takes minutes and says nothing
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
HALVES = (torch.float16, torch.bfloat16)


@pytest.mark.parametrize("storage", STORAGES)
@given(lengths=lengths_drawn, seed=st.integers(0, 2**31), options=st.booleans(), tasks=st.sampled_from([0, 1, 5]))
@ragged
def test_cross_entropy_of_ragged_segments(
    losses: Losses, storage: torch.dtype, lengths: list[int], seed: int, options: bool, tasks: int
) -> None:
    case = segments(lengths, seed, storage=storage, ignored=0.2, options=options, tasks=tasks)
    mine, exact = check(losses.segment_cross_entropy, oracle.segment_cross_entropy, case, ("scores",))
    rounded_once(
        mine.gradient["scores"],
        exact.gradient["scores"],
        case,
        slack_of(losses.segment_cross_entropy),
    )


@pytest.mark.parametrize("storage", STORAGES)
@given(lengths=lengths_drawn, seed=st.integers(0, 2**31), targets=st.booleans(), tasks=st.sampled_from([0, 5]))
@ragged
def test_symmetric_kl_of_ragged_segments(
    losses: Losses, storage: torch.dtype, lengths: list[int], seed: int, targets: bool, tasks: int
) -> None:
    case = segments(lengths, seed, storage=storage, ignored=0.2, options=True, tasks=tasks)
    case = two_sided(case, seed, targets=targets)
    name = "segment_cross_entropy_kl" if targets else "segment_symmetric_kl"
    check(getattr(losses, name), getattr(oracle, name), case, ("x", "y"))


@pytest.mark.parametrize("storage", STORAGES)
def test_long_rows_that_start_anywhere(losses: Losses, storage: torch.dtype) -> None:
    """A vocabulary of 50265: rows start at every remainder of the vector length."""
    case = segments([50265, 3, 50265, 50257], 5, storage=storage, options=True)
    mine, exact = check(losses.segment_cross_entropy, oracle.segment_cross_entropy, case, ("scores",))
    rounded_once(
        mine.gradient["scores"],
        exact.gradient["scores"],
        case,
        slack_of(losses.segment_cross_entropy),
    )


def test_every_length_at_every_start(losses: Losses) -> None:
    """Heads and tails of vector loops: all lengths from 1 to 70, each after a segment that shifts it."""
    lengths = [n for size in range(1, 71) for n in (size, 1 + size % 5)]
    for storage in (torch.float32, torch.bfloat16):
        case = segments(lengths, 6, storage=storage, options=True)
        mine, exact = check(losses.segment_cross_entropy, oracle.segment_cross_entropy, case, ("scores",))
        rounded_once(
            mine.gradient["scores"],
            exact.gradient["scores"],
            case,
            slack_of(losses.segment_cross_entropy),
        )
        check(losses.segment_cross_entropy_kl, oracle.segment_cross_entropy_kl, two_sided(case), ("x", "y"))


def test_uniform_scores_cost_log_n(losses: Losses) -> None:
    lengths = [1, 2, 3, 151, 50265]
    case = segments(lengths)
    case["scores"] = torch.full((sum(lengths),), 7.0)
    result = losses.segment_cross_entropy(**case)
    assert result.loss.tolist() == pytest.approx([math.log(n) for n in lengths], rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("storage", STORAGES)
def test_one_class_costs_nothing_and_has_no_gradient(losses: Losses, storage: torch.dtype) -> None:
    case = segments([1, 1, 1], storage=storage) | {"smoothing": torch.tensor([0.0, 0.1, 1.0])}
    mine = run(losses.segment_cross_entropy, case, ("scores",))
    assert mine.result.loss.tolist() == [0.0, 0.0, 0.0]
    assert mine.gradient["scores"].tolist() == [0.0, 0.0, 0.0]
    both = run(losses.segment_symmetric_kl, two_sided(case, targets=False), ("x", "y"))
    assert both.result.divergence.tolist() == pytest.approx([0.0] * 3, abs=1e-12)
    assert both.gradient["x"].tolist() == pytest.approx([0.0] * 3, abs=1e-6)
    assert both.gradient["y"].tolist() == pytest.approx([0.0] * 3, abs=1e-6)


@pytest.mark.parametrize("storage", STORAGES)
def test_a_common_offset_changes_nothing(losses: Losses, storage: torch.dtype) -> None:
    """Scores near 1e4 that every storage holds: multiples of 64 (of 2^-3 in fp32 and fp64)."""
    lengths = [2, 3, 40, 700]
    case = segments(lengths, options=True) | {"z_loss": 0.0}
    step = 64.0 if storage in HALVES else 0.125
    offset = 9984.0
    small = (segments(lengths, spread=2.0)["scores"] / 2).round() * step
    for name, extra in (("segment_cross_entropy", {}), ("segment_cross_entropy_kl", {"kl": True})):
        runs = []
        for start in (0.0, offset):
            mine = case | {"scores": (small + start).to(storage)}
            if extra:
                mine = two_sided(mine) | {"y": (small.flip(0) + start).to(storage)}
            runs.append(run(getattr(losses, name), mine, ("x", "y") if extra else ("scores",)))
        near, far = runs
        torch.testing.assert_close(far.result.loss, near.result.loss, rtol=3e-6, atol=1e-7)
        torch.testing.assert_close(far.result.divergence, near.result.divergence, rtol=3e-6, atol=1e-7)
        for leaf, gradient in near.gradient.items():
            torch.testing.assert_close(
                far.gradient[leaf], gradient, rtol=1.01 * torch.finfo(storage).eps + 3e-6, atol=1e-7
            )


def test_infinities(losses: Losses) -> None:
    inf = math.inf
    scores = torch.tensor([-inf, 0.0, 1.0, -inf, -inf, 3.0, -inf, 0.0, 2.0])
    case = {
        "scores": scores,
        "offsets": layout([3, 3, 3]),
        "target": torch.tensor([1, 2, 0]),  # of the last segment the target itself is out of the question
        "weight": torch.tensor([1.0, 2.0, 0.0]),
    }
    mine = run(losses.segment_cross_entropy, case, ("scores",))
    assert mine.result.loss.tolist() == pytest.approx([math.log(1 + math.e), 0.0, inf], rel=1e-6)
    assert float(mine.result.total.detach()) == pytest.approx(math.log(1 + math.e), rel=1e-6)
    p = math.e / (1 + math.e)
    assert mine.gradient["scores"].tolist() == pytest.approx([0.0, -p, p, 0, 0, 0, 0, 0, 0], rel=1e-6, abs=1e-7)
    both = {"x": scores, "y": scores.flip(0)[[2, 1, 0, 5, 4, 3, 8, 7, 6]], "offsets": layout([3, 3, 3])}
    both["y"] = torch.where(scores == -inf, -inf, both["y"] + torch.tensor([0.0, 1, 0] * 3))
    kl = run(losses.segment_symmetric_kl, both | {"weight": torch.tensor([1.0, 2.0, 1.0])}, ("x", "y"))
    exact = run(
        oracle.segment_symmetric_kl, in_double(both, ("x", "y")) | {"weight": torch.tensor([1.0, 2, 1])}, ("x", "y")
    )
    assert torch.isfinite(exact.result.divergence).all()
    loss_within(kl.result.divergence, exact.result.divergence, exact.result.divergence)
    for leaf in ("x", "y"):
        assert torch.isfinite(kl.gradient[leaf]).all()


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("margin", [3.0, 6.0, 7.0, 9.0, 12.0, 15.0])
def test_a_sure_target_keeps_the_digits_of_loss_and_gradient(
    losses: Losses, storage: torch.dtype, margin: float
) -> None:
    """p(target) of 0.95 to 0.9999997: 1 - p must not be what rounding leaves of it."""
    if storage == torch.float16 and margin > 12:
        margin = 12.0
    case: dict[str, Any] = {
        "scores": torch.tensor([0.0, margin, 0.0, -1.0, margin], dtype=storage),
        "offsets": layout([3, 2]),
        "target": torch.tensor([1, 1]),
        "weight": torch.ones(2),
    }
    mine = run(losses.segment_cross_entropy, case, ("scores",))
    exact = run(oracle.segment_cross_entropy, in_double(case, ("scores",)), ("scores",))
    fused = losses.name == "fused"
    if fused or storage == torch.float64:
        torch.testing.assert_close(mine.result.loss.double(), exact.result.loss, rtol=2e-6, atol=0)
        rounded = (2.0 if storage == torch.float16 else 1.0) * torch.finfo(storage).eps / 2 * 1.01 + 2e-6
        least = 2.0**-24 if storage == torch.float16 else 0.0
        torch.testing.assert_close(mine.gradient["scores"].double(), exact.gradient["scores"], rtol=rounded, atol=least)
    else:  # plain PyTorch in fp32: 1 - p has the digits that fp32 leaves
        torch.testing.assert_close(mine.result.loss.double(), exact.result.loss, rtol=0, atol=3e-7)
        error = (mine.gradient["scores"].double() - exact.gradient["scores"]).abs()
        assert (error <= torch.finfo(storage).eps * exact.gradient["scores"].abs() + 3e-7).all()


def test_tolerance_catches_one_rounding_of_p() -> None:
    """What Liger had: the target's gradient by a read, a subtraction and a write in bf16."""
    case = segments([30], spread=1.0, storage=torch.bfloat16) | {"weight": torch.ones(1)}
    case["scores"][case["target"]] = 9.0
    truth = run(oracle.segment_cross_entropy, in_double(case, ("scores",)), ("scores",)).gradient["scores"]
    theirs = run(oracle.segment_cross_entropy, case, ("scores",)).gradient["scores"]
    gradient_within(truth.bfloat16(), theirs, truth)
    rounded_once(truth.bfloat16(), truth, case)
    p = torch.softmax(case["scores"].double(), 0).bfloat16()
    p[case["target"]] -= 1
    for rule in (lambda: gradient_within(p, theirs, truth), lambda: rounded_once(p, truth, case)):
        with pytest.raises(AssertionError, match="off by"):
            rule()


def test_tolerance_catches_a_loss_of_rounded_scores_and_a_gradient_rounded_twice() -> None:
    case = segments([300, 20], 3) | {"weight": torch.tensor([1.0, 0.7])}
    exact = run(oracle.segment_cross_entropy, in_double(case, ("scores",)), ("scores",))
    theirs = run(oracle.segment_cross_entropy, case, ("scores",))
    rounded = run(oracle.segment_cross_entropy, case | {"scores": case["scores"].half().float()}, ("scores",))
    with pytest.raises(AssertionError, match="off by"):
        loss_within(rounded.result.loss, theirs.result.loss, exact.result.loss)
    with pytest.raises(AssertionError, match="off by"):
        gradient_within(rounded.gradient["scores"], theirs.gradient["scores"], exact.gradient["scores"])
    truth = exact.gradient["scores"]
    with pytest.raises(AssertionError, match="off by"):
        rounded_once((truth.bfloat16() * 0.7).bfloat16() / 0.7, truth, case)


@pytest.mark.parametrize("storage", STORAGES)
def test_weights_apply_segment_by_segment(losses: Losses, storage: torch.dtype) -> None:
    """Gradients of a segment with weight w are w times those with weight 1; 0, -2 and 1e-3 among them."""
    lengths = [5, 17, 3, 200, 64]
    case = segments(lengths, 8, storage=storage)
    weight = torch.tensor([1.0, 0.0, -2.0, 1e-3, 0.25])
    ones = run(losses.segment_cross_entropy, in_double(case, ("scores",)) | {"weight": torch.ones(5)}, ("scores",))
    mine = run(losses.segment_cross_entropy, case | {"weight": weight}, ("scores",))
    each = torch.repeat_interleave(weight.double(), torch.tensor(lengths))
    rounded_once(mine.gradient["scores"], each * ones.gradient["scores"], case)
    assert (mine.gradient["scores"][each == 0] == 0).all()
    assert float(mine.result.total) == pytest.approx(float(weight.double() @ ones.result.loss), rel=1e-5)


@pytest.mark.parametrize("storage", STORAGES)
def test_ignored_segments_have_no_part(losses: Losses, storage: torch.dtype) -> None:
    case = segments([4, 0, 9, 5], 9, storage=storage, tasks=2, options=True)
    case["target"][2] = IGNORE
    case["weight"] = torch.ones(4)
    if losses.name == "fused":
        case["scores"][4:13] = torch.nan  # nobody looks at it: linear_cross_entropy leaves memory unset there
    mine = run(losses.segment_cross_entropy, case, ("scores",))
    assert mine.result.loss[[1, 2]].tolist() == [0.0, 0.0]
    assert math.isfinite(float(mine.result.total))
    assert (mine.gradient["scores"][4:13] == 0).all()
    assert (mine.gradient["scores"][:4] != 0).any()
    nothing = run(losses.segment_cross_entropy, case | {"target": torch.full((4,), IGNORE)}, ("scores",))
    assert float(nothing.result.total) == 0.0
    assert nothing.result.by_task.tolist() == [0.0, 0.0]
    assert (nothing.gradient["scores"] == 0).all()


def test_ignored_segments_keep_their_divergence(losses: Losses) -> None:
    case = two_sided(segments([4, 9], 10) | {"target": torch.tensor([IGNORE, 2])})
    check(losses.segment_cross_entropy_kl, oracle.segment_cross_entropy_kl, case, ("x", "y"))
    result = losses.segment_cross_entropy_kl(**case)
    assert result.loss[0] == 0
    assert result.divergence[0] > 0


@pytest.mark.parametrize("storage", STORAGES)
def test_nothing_at_all(losses: Losses, storage: torch.dtype) -> None:
    for case in (segments([], storage=storage), segments([0, 0], storage=storage)):
        for arguments, name in (
            (case, "segment_cross_entropy"),
            (two_sided(case, targets=False), "segment_symmetric_kl"),
            (two_sided(case), "segment_cross_entropy_kl"),
        ):
            leaf = "scores" if "scores" in arguments else "x"
            arguments = arguments | {"task": torch.zeros(len(case["target"]), dtype=torch.int64), "tasks": 3}
            mine = run(getattr(losses, name), arguments, (leaf,))
            assert float(mine.result.total) == 0.0
            assert mine.result.by_task.tolist() == [0.0, 0.0, 0.0]
            assert mine.gradient[leaf].shape == (0,)


def test_results_are_fp32_unless_scores_are_fp64(losses: Losses) -> None:
    for storage in STORAGES:
        case = segments([3, 4], storage=storage, tasks=2)
        real = torch.float64 if storage == torch.float64 else torch.float32
        assert {part.dtype for part in losses.segment_cross_entropy(**case)} == {real}
        assert {part.dtype for part in losses.segment_cross_entropy_kl(**two_sided(case))} == {real}
