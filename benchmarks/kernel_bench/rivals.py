"""Other people's loss kernels, each where it is installed and can run.

Owns: how each is called. None of them is a requirement: one that is absent is named with what would install it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kernel_bench.setting import Setting

Given = Callable[[Tensor, Tensor], Tensor]
"""(logits [N, V], target) to the mean cross-entropy."""
Linear = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(hidden, weight, target) to the mean cross-entropy."""


def of_logits(setting: Setting) -> tuple[dict[str, Given], dict[str, str]]:
    """Kernels that take logits, and those that cannot run here with the reason."""

    def liger() -> Given:
        module: Given = _found("liger_kernel.transformers").LigerCrossEntropyLoss()
        return module

    def quack() -> Given:
        function = _found("quack.cross_entropy").cross_entropy
        return lambda logits, target: function(logits, target, reduction="mean")

    return _those_that_run(setting, {"Liger-Kernel": (liger, "liger-kernel"), "QuACK": (quack, "quack-kernels")})


def of_states(setting: Setting) -> tuple[dict[str, Linear], dict[str, str]]:
    """Fused linear cross-entropies, and those that cannot run here with the reason."""

    def liger(**options: Any) -> Linear:
        module = _found("liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss(**options)
        return lambda hidden, weight, target: _first(module(weight, hidden, target))

    def cut(**options: Any) -> Linear:
        function = _found("cut_cross_entropy").linear_cross_entropy
        return lambda hidden, weight, target: _first(function(hidden, weight, target, **options))

    def quack() -> Linear:
        function = _found("quack.linear_cross_entropy").chunked_linear_cross_entropy
        return lambda hidden, weight, target: _first(function(hidden, weight, target))

    functions, absent = _those_that_run(
        setting,
        {
            "Liger-Kernel": (liger, "liger-kernel"),
            "Liger-Kernel, fp32 sums": (lambda: liger(accum_dtype=torch.float32), "liger-kernel"),
            "cut-cross-entropy": (cut, "cut-cross-entropy"),
            "cut-cross-entropy, all gradients": (lambda: cut(filter_eps=None), "cut-cross-entropy"),
            "QuACK": (quack, "quack-kernels"),
        },
    )
    name = "torch linear_cross_entropy"
    if not hasattr(F, "linear_cross_entropy"):
        return functions, {name: f"torch {torch.__version__} does not have it; 2.13 does", **absent}

    def chunked(policy: Literal["auto", "accurate"]) -> Linear:
        options = torch.nn.LinearCrossEntropyOptions(acc_policy=policy)
        return lambda h, w, t: F.linear_cross_entropy(h, w, t, options=options)

    return {name: chunked("auto"), f"{name}, accurate": chunked("accurate"), **functions}, absent


def _those_that_run(setting: Setting, made: dict[str, tuple[Callable[[], Any], str]]) -> tuple[Any, dict[str, str]]:
    functions: dict[str, Any] = {}
    absent: dict[str, str] = {}
    for name, (make, package) in made.items():
        if not setting.cuda:
            absent[name] = "runs on GPUs only"
            continue
        try:
            functions[name] = make()
        except ModuleNotFoundError as error:
            absent[name] = f"not installed: pip install {package} (no module '{error.name}')"
        except Exception as error:  # an import that breaks on this machine is no reason to stop
            absent[name] = f"does not import here: {type(error).__name__}: {str(error).strip()[:120]}"
    return functions, absent


def _found(module: str) -> Any:
    return importlib.import_module(module)


def _first(result: Any) -> Tensor:
    """The loss, of functions that return more in some versions."""
    loss: Tensor = result[0] if isinstance(result, tuple) else result
    return loss
