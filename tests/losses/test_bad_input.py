"""Wrong input is an error that names it, and never a crash or a silent number."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import heads, layout, segments, two_sided, vocabulary

from trainer.losses.interface import IGNORE, Losses

Change = Callable[[dict[str, Any]], dict[str, Any]]
ERRORS = (RuntimeError, ValueError)


def changed(name: str, index: Any, value: int) -> Change:
    """One element of an argument is wrong."""

    def change(case: dict[str, Any]) -> dict[str, Any]:
        tensor = case[name].clone()
        tensor[index] = value
        return case | {name: tensor}

    return change


def converted(name: str, change: Callable[[torch.Tensor], Any]) -> Change:
    return lambda case: case | {name: change(case[name])}


def strided(tensor: torch.Tensor) -> torch.Tensor:
    return torch.stack([tensor, tensor], -1)[..., 0]


def segment_case() -> dict[str, Any]:
    return segments([3, 5, 2, 700], 51, tasks=3, options=True) | {"weight": torch.ones(4)}


FLAT: dict[str, tuple[Change, str]] = {
    "offsets not ascending": (changed("offsets", 2, 2), r"offsets must ascend|offsets: must ascend"),
    "offsets not from 0": (changed("offsets", 0, 1), r"offsets must ascend|offsets: must ascend"),
    "offsets negative": (changed("offsets", 0, -3), r"offsets must ascend|offsets: must ascend"),
    "offsets beyond the scores": (changed("offsets", 4, 711), r"offsets must ascend|offsets: must ascend"),
    "offsets far beyond the scores": (changed("offsets", 2, 2**40), r"offsets must ascend|offsets: must ascend"),
    "offsets not to the end": (changed("offsets", 4, 709), r"offsets must ascend|offsets: must ascend"),
    "target too large": (changed("target", 1, 5), r"segment 1\b.*5"),
    "target of the next segment": (changed("target", 0, 3), r"segment 0\b.*3"),
    "target negative": (changed("target", 2, -1), r"segment 2\b.*-1"),
    "target -101": (changed("target", 2, -101), r"segment 2\b.*-101"),
    "target huge": (changed("target", 3, 2**62), rf"segment 3\b.*{2**62}"),
    "empty segment": (changed("offsets", 1, 0), r"segment 0\b.*(no|0) scores?"),
}
FUSED_FLAT: dict[str, tuple[Change, str]] = {
    "task too large": (changed("task", 3, 3), r"segment 3: task 3"),
    "task negative": (changed("task", 0, -1), r"segment 0: task -1"),
    "scores of integers": (converted("scores", torch.Tensor.long), "x: must be float32"),
    "scores in two dimensions": (converted("scores", lambda x: x[None]), "x: must have one dimension"),
    "scores with gaps": (converted("scores", strided), "x: must be contiguous"),
    "offsets int32": (converted("offsets", torch.Tensor.int), "offsets: must be int64, is int32"),
    "offsets empty": (converted("offsets", lambda x: x[:0]), r"offsets: must be \[G \+ 1\]"),
    "offsets with gaps": (converted("offsets", strided), "offsets: must be contiguous"),
    "target int32": (converted("target", torch.Tensor.int), "target: must be int64, is int32"),
    "target too short": (converted("target", lambda x: x[:3]), r"target: must have shape \[4\], has \[3\]"),
    "target in two dimensions": (converted("target", lambda x: x[:, None]), r"target: must have shape"),
    "target with gaps": (converted("target", strided), "target: must be contiguous"),
    "weight float64": (converted("weight", torch.Tensor.double), "weight: must be float32, is float64"),
    "weight bfloat16": (converted("weight", torch.Tensor.bfloat16), "weight: must be float32, is bfloat16"),
    "weight too long": (converted("weight", lambda x: x.repeat(2)), r"weight: must have shape \[4\]"),
    "smoothing float64": (converted("smoothing", torch.Tensor.double), "smoothing: must be float32"),
    "smoothing one for all": (converted("smoothing", lambda x: x[:1]), r"smoothing: must have shape \[4\]"),
    "task int32": (converted("task", torch.Tensor.int), "task: must be int64"),
    "task too short": (converted("task", lambda x: x[:2]), r"task: must have shape"),
}


@pytest.mark.parametrize("wrong", FLAT)
@pytest.mark.parametrize("both", [False, True], ids=["alone", "with_kl"])
def test_wrong_segments(losses: Losses, wrong: str, both: bool) -> None:
    change, message = FLAT[wrong]
    case = change(segment_case())
    name = "segment_cross_entropy_kl" if both else "segment_cross_entropy"
    with pytest.raises(ERRORS, match=message):
        getattr(losses, name)(**(two_sided(case) if both else case))


@pytest.mark.parametrize("wrong", FUSED_FLAT)
@pytest.mark.parametrize("wanted", [False, True], ids=["no_gradient", "gradient"])
def test_wrong_arguments_of_segments(fused: Losses, wrong: str, wanted: bool) -> None:
    change, message = FUSED_FLAT[wrong]
    case = change(segment_case())
    if wanted and case["scores"].is_floating_point():
        case["scores"].requires_grad_()
    with pytest.raises(RuntimeError, match=message):
        fused.segment_cross_entropy(**case)


@pytest.mark.parametrize("name", ["segment_cross_entropy", "head_losses", "linear_cross_entropy"])
def test_another_device_gives_no_number(losses: Losses, name: str) -> None:
    """torch sends a call with one meta tensor to the meta kernels, which compute nothing."""
    case = {"segment_cross_entropy": segment_case, "head_losses": heads, "linear_cross_entropy": vocabulary}[name]()
    with pytest.raises((*ERRORS, NotImplementedError), match=r"(?i)meta|device"):
        getattr(losses, name)(**converted("target", lambda x: x.to("meta"))(case)).total.item()


def test_tasks_without_their_number(fused: Losses) -> None:
    with pytest.raises(RuntimeError, match="task"):
        fused.segment_cross_entropy(**segment_case() | {"tasks": 0})


def test_faults_of_the_first_wrong_segment_are_named_on_any_number_of_threads(fused: Losses) -> None:
    case = segments([40] * 2000, 52)
    case["target"][[700, 1500, 1999]] = 40
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        with pytest.raises(RuntimeError, match=r"segment 700: target 40"):
            fused.segment_cross_entropy(**case)


def test_the_next_call_is_fine(losses: Losses) -> None:
    case = segment_case()
    expected = losses.segment_cross_entropy(**case).total
    with pytest.raises(ERRORS):
        losses.segment_cross_entropy(**changed("target", 1, 5)(case))
    assert torch.equal(losses.segment_cross_entropy(**case).total, expected)


def test_two_buffers_that_do_not_match(fused: Losses) -> None:
    case = two_sided(segment_case())
    for wrong, message in (
        (case["y"][:-1], r"y: must have shape \[710\], has \[709\]"),
        (case["y"].bfloat16(), "y: must be float32, is bfloat16"),
        (strided(case["y"]), "y: must be contiguous"),
    ):
        with pytest.raises(RuntimeError, match=message):
            fused.segment_cross_entropy_kl(**case | {"y": wrong})
    with pytest.raises(RuntimeError, match="kl_weight: must be float32"):
        fused.segment_cross_entropy_kl(**case | {"kl_weight": case["kl_weight"].double()})


HEADS: dict[str, tuple[Change, str]] = {
    "several features by several rows": (changed("segment", (0, 1), 2), r"segment"),
    "not as long as the offsets say": (changed("segment", (2, 3), 19), r"segment"),
    "offsets not ascending": (changed("offsets", 3, 1), r"offsets"),
    "offsets not to the end": (lambda c: c | {"scores": c["scores"] + 1}, r"offsets"),
    "target too large": (changed("target", 2, 20), r"segment 2\b.*20"),
    "target negative": (changed("target", 0, -2), r"segment 0\b.*-2"),
}
FUSED_HEADS: dict[str, tuple[Change, str]] = {
    "feature too large": (changed("segment", (0, 0), 36), r"segment 0: feature 36 does not exist"),
    "feature negative": (changed("segment", (3, 0), -1), r"segment 3: feature -1 does not exist"),
    "features to beyond the last": (changed("segment", (8, 0), 30), r"segment 8: feature 36 does not exist"),
    "row too large": (changed("segment", (1, 2), 43), r"segment 1: row 45"),
    "row negative": (changed("segment", (1, 2), -1), r"segment 1: row -1"),
    "row huge": (changed("segment", (1, 2), 2**62), rf"segment 1: row {2**62}"),
    "rows by no feature": (changed("segment", (0, 1), 0), r"segment 0"),
    "negative features": (changed("segment", (0, 1), -1), r"segment 0"),
    "feature of a point": (changed("point", (2, 0), 36), r"point 2: feature 36 does not exist"),
    "negative feature of a point": (changed("point", (2, 0), -1), r"point 2: feature -1 does not exist"),
    "row of a point": (changed("point", (1, 1), 45), r"point 1: row 45"),
    "task of a segment": (changed("task", 0, 4), r"segment 0: task 4 does not exist"),
    "task of a point": (changed("task", -1, -1), r"point 4: task -1 does not exist"),
    "weight of another width": (converted("weight", lambda x: x[:, 1:].contiguous()), r"weight: must have shape"),
    "weight of another type": (converted("weight", torch.Tensor.bfloat16), "weight: must be float32, is bfloat16"),
    "weight with gaps": (converted("weight", strided), "weight: must be contiguous"),
    "features with gaps": (converted("features", strided), "features: must be contiguous"),
    "features in one dimension": (converted("features", torch.Tensor.flatten), r"features: must be \[F, H\]"),
    "bias too short": (converted("bias", lambda x: x[1:]), r"bias: must have shape \[45\]"),
    "bias of another type": (converted("bias", torch.Tensor.double), "bias: must be float32"),
    "segment of three columns": (converted("segment", lambda x: x[:, :3].contiguous()), r"segment: must have shape"),
    "segment int32": (converted("segment", torch.Tensor.int), "segment: must be int64"),
    "point in one dimension": (converted("point", torch.Tensor.flatten), r"point: must be \[N, 2\]"),
    "value too short": (converted("value", lambda x: x[1:]), r"value: must have shape \[5\]"),
    "value of integers": (converted("value", torch.Tensor.long), "value: must be float32"),
    "loss_weight without points": (converted("loss_weight", lambda x: x[:-5]), r"loss_weight: must have shape"),
    "task without points": (converted("task", lambda x: x[:-5]), r"task: must have shape"),
    "smoothing of all": (converted("smoothing", lambda x: x.repeat(2)), r"smoothing: must have shape"),
    "scores negative": (lambda c: c | {"scores": -1}, r"scores"),
    "offsets too short": (converted("offsets", lambda x: x[:-1]), r"offsets: must have shape"),
    "empty and not ignored": (changed("segment", (0, 3), 0), r"segment 0"),
}


@pytest.mark.parametrize("wrong", HEADS)
def test_wrong_heads(losses: Losses, wrong: str) -> None:
    change, message = HEADS[wrong]
    with pytest.raises(ERRORS, match=message):
        losses.head_losses(**change(heads()))


@pytest.mark.parametrize("wrong", FUSED_HEADS)
@pytest.mark.parametrize("wanted", [False, True], ids=["no_gradient", "gradient"])
def test_wrong_arguments_of_heads(fused: Losses, wrong: str, wanted: bool) -> None:
    change, message = FUSED_HEADS[wrong]
    case = change(heads())
    if wanted:
        case = case | {"features": case["features"].requires_grad_()}
    with pytest.raises(RuntimeError, match=message):
        fused.head_losses(**case)


def test_an_empty_segment_of_a_head_needs_no_target(fused: Losses) -> None:
    case = heads(options=False)
    case["segment"][1] = torch.tensor([1, 1, 2, 0])
    case["target"][1] = IGNORE
    lengths = case["segment"][:, 1] * case["segment"][:, 3]
    case |= {"offsets": layout(lengths.tolist()), "scores": int(lengths.sum())}
    assert torch.isfinite(fused.head_losses(**case).total)
    case["target"][1] = 0
    with pytest.raises(RuntimeError, match="segment 1 has no score"):
        fused.head_losses(**case)


@pytest.mark.parametrize("value", [101, 127, 128, -1, -99, 2**40])
@pytest.mark.parametrize("words", [101, 128], ids=["padded", "aligned"])
def test_wrong_targets_of_a_vocabulary(losses: Losses, value: int, words: int) -> None:
    """101 to 127 lie in the padding of a row."""
    case = changed("target", 3, value + (27 if words == 128 and value in (101, 127) else 0))(vocabulary(words=words))
    with pytest.raises(ERRORS, match=r"target"):
        losses.linear_cross_entropy(**case)


def test_a_wrong_target_is_named_by_its_row(fused: Losses, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by the number it has in its chunk, where every second segment is padding."""
    monkeypatch.setattr("trainer.losses.linear._ROWS_CPU", {torch.float32: 8})
    with pytest.raises(ERRORS, match=r"\b19\b"):
        fused.linear_cross_entropy(**changed("target", 19, 150)(vocabulary()))


VOCABULARY: dict[str, tuple[Change, str]] = {
    "hidden in one dimension": (converted("hidden", torch.Tensor.flatten), "hidden and weight"),
    "another width": (converted("weight", lambda x: x[:, 1:].contiguous()), "hidden and weight"),
    "weight of another type": (converted("weight", torch.Tensor.bfloat16), "weight: must be torch.float32"),
    "bias of another type": (converted("bias", torch.Tensor.double), "bias: must be torch.float32"),
    "bias too short": (converted("bias", lambda x: x[1:]), r"bias: must have shape \[101\], has \[100\]"),
    "target int32": (converted("target", torch.Tensor.int), "target: must be torch.int64"),
    "target too short": (converted("target", lambda x: x[1:]), r"target: must have shape \[37\], has \[36\]"),
    "target in two dimensions": (converted("target", lambda x: x[:, None]), "target"),
    "loss_weight too long": (converted("loss_weight", lambda x: x.repeat(2)), r"loss_weight: must have shape \[37\]"),
    "loss_weight in two dimensions": (converted("loss_weight", lambda x: x[:, None]), "loss_weight"),
    "loss_weight bfloat16": (converted("loss_weight", torch.Tensor.bfloat16), "loss_weight: must be torch.float32"),
    "smoothing float64": (converted("smoothing", torch.Tensor.double), "smoothing: must be torch.float32"),
}


@pytest.mark.parametrize("wrong", VOCABULARY)
def test_wrong_arguments_of_a_vocabulary(fused: Losses, wrong: str) -> None:
    change, message = VOCABULARY[wrong]
    with pytest.raises(ERRORS, match=message):
        fused.linear_cross_entropy(**change(vocabulary(bias=True, smoothing=True)))


def test_a_weight_that_zero3_has_not_gathered(fused: Losses) -> None:
    empty = torch.nn.Parameter(torch.zeros(0))
    for name, case in (("linear_cross_entropy", vocabulary()), ("head_losses", heads())):
        with pytest.raises(RuntimeError, match=r"weight: has no elements\. Under ZeRO-3"):
            getattr(fused, name)(**case | {"weight": empty})


def test_ops_refuse_half_a_pair(fused: Losses) -> None:
    c = segment_case()
    op = torch.ops.sett.segment_losses
    rest = (None, 0.0, None, 0, -1, True)
    for arguments, message in (
        ((None, c["offsets"], None, None, None), "give a target"),
        ((None, c["offsets"], c["target"], None, None), "target and weight"),
        ((c["scores"], c["offsets"], None, None, None), "y and kl_weight"),
    ):
        with pytest.raises(RuntimeError, match=message):
            op(c["scores"], *arguments, *rest)


CRASHING = """
import sys
sys.path.insert(0, sys.argv[1])
import test_bad_input as bad
from trainer.losses import choose
losses, refused = choose("fused"), 0
for cases, base, call in (
    (bad.FLAT | bad.FUSED_FLAT, bad.segment_case, losses.segment_cross_entropy),
    (bad.HEADS | bad.FUSED_HEADS, bad.heads, losses.head_losses),
):
    for name, (change, _) in cases.items():
        for wanted in (False, True):
            case = change(base())
            leaf = case["scores"] if "features" not in case else case["features"]
            if wanted and leaf.is_floating_point():
                leaf.requires_grad_()
            try:
                call(**case)
            except RuntimeError:
                refused += 1
            else:
                sys.exit(f"accepted: {name}")
print("refused", refused)
"""


def test_nothing_crashes(fused: Losses) -> None:
    """All of it in one process, where a write out of bounds shows at the latest when memory is given back."""
    done = subprocess.run(
        [sys.executable, "-c", CRASHING, str(Path(__file__).parent)],
        env={**os.environ, "MALLOC_CHECK_": "3", "MALLOC_PERTURB_": "85"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, f"exit {done.returncode}: {done.stderr[-2000:]}"
    assert done.stdout.split() == ["refused", str(2 * len(FLAT | FUSED_FLAT) + 2 * len(HEADS | FUSED_HEADS))]
