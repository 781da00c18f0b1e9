"""Inner products of micro-batch gradients with a held-out gradient, read where DeepSpeed keeps gradients anyway.

Owns: `HeldOutGradient`: a gradient v that is kept, and how the gradients of training are read against it. There is no
backward a task and no copy of a task's gradient (design: "the alignment rides on the reduce-scatter").

- ZeRO-3: each rank keeps its shard of v, one copy. It multiplies the shard of the accumulated gradient by it after each
  backward; the difference between two micro-steps is the alignment of what that micro-step added. A micro-step is
  readable when all its ranks hold the same task.
- ZeRO 0 to 2 replicate the weights, and v with them. A hook on each parameter multiplies what a rank's own backward
  gives, before anything is reduced: every micro-batch is readable, whatever the other ranks hold.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_optimizer_state, safe_get_local_optimizer_state
from torch import Tensor, nn

from trainer.engine.session import Session

_CHUNK = 1 << 20
"""Elements multiplied and added up in fp32; sums of these are fp64."""


class HeldOutGradient(ABC):
    """The gradient v of held-out losses by some parameters, and inner products with it.

    v is in true units: neither the number of ranks nor a loss scale is in it.
    """

    by_rank: bool
    """Whether a rank's own micro-batch is readable; else only what all ranks of a micro-step add together."""

    def __init__(self, session: Session, parameters: dict[str, nn.Parameter]) -> None:
        """`parameters`: by which the gradient is taken, by name; all others count as zero."""
        self.session = session
        self.parameters = parameters
        self.ready = False
        self._products: list[Tensor] = []
        self._squares: Tensor | None = None
        self._lengths: list[Tensor] = []

    @property
    @abstractmethod
    def forward(self) -> Callable[..., dict[str, Tensor]]:
        """What the losses for `collect` must be computed by."""

    @abstractmethod
    def collect(self, losses: Iterable[Callable[[], Tensor]]) -> None:
        """Set v to the gradient of the sum of `losses` over all ranks.

        Every rank gives as many losses; each is called for its forward and gone through backward at once. Training's
        gradients must be clear, and are left clear.
        """

    @abstractmethod
    def precondition(self, eps: float) -> bool:
        """Multiply v by Adam's 1 / (sqrt(second moment) + eps); after the first step only.

        Returns:
            False, and v as it was, when the optimizer keeps no second moment.
        """

    @abstractmethod
    def pieces(self) -> list[Tensor]:
        """This rank's tensors of v: their sum of squares over ranks is that of v, `replicas` times."""

    @property
    @abstractmethod
    def replicas(self) -> int: ...

    def norm(self) -> float:
        """Norm of v, the same on every rank."""
        local = torch.stack([_product(piece, piece) for piece in self.pieces()]).sum()
        return float((self.session.all_sum(local.to(self.session.device)) / self.replicas).sqrt())

    def load(self, pieces: list[Tensor], ready: bool) -> None:
        """Take over what `pieces` gave before."""
        for mine, saved in zip(self.pieces(), pieces, strict=True):
            mine.copy_(saved)
        self.ready = ready

    @contextmanager
    def reading(self) -> Iterator[HeldOutGradient]:
        """Around the micro-steps of a window; call `after_backward` after each."""
        self._products, self._lengths = [], []
        hooks = [p.register_hook(self._hook(n)) for n, p in self.parameters.items()]  # type: ignore[no-untyped-call]
        try:
            yield self
        finally:
            for hook in hooks:
                hook.remove()

    @abstractmethod
    def _hook(self, name: str) -> Callable[[Tensor], None]: ...

    @abstractmethod
    def after_backward(self) -> None:
        """Note the inner product and the gradient's norm of the micro-step that has just gone backward."""

    def readings(self) -> tuple[Tensor, Tensor]:
        """[K] fp64 this rank's inner products of the K micro-steps (summed over ranks: the whole), and [K] the norm of
        its own micro-batches' gradients."""
        return torch.stack(self._products), torch.stack(self._lengths)

    def _own_scale(self) -> float:
        """What `Session.backward` puts into a gradient before it is averaged over ranks."""
        return self.session.world_size * self.session.loss_scale()

    def _add_square(self, gradient: Tensor) -> None:
        square = _product(gradient.reshape(-1), gradient.reshape(-1))
        self._squares = square if self._squares is None else self._squares + square

    def _length(self) -> Tensor:
        """Norm of the gradient since the last call."""
        square, self._squares = self._squares, None
        if square is None:
            return torch.zeros((), dtype=torch.float64, device=self.session.device)
        return square.sqrt() / self._own_scale()


class ShardedGradient(HeldOutGradient):
    """Under ZeRO-3. DeepSpeed's buffer of gradient shards is one flat tensor.

    This rank's shard of v has a tensor for every run of neighbouring parameters in it.
    """

    by_rank = False

    def __init__(self, session: Session, parameters: dict[str, nn.Parameter]) -> None:
        super().__init__(session, parameters)
        self._buffer: Tensor = session.engine.optimizer.grad_partitions_flat_buffer
        wanted = {id(p) for p in parameters.values()}
        self._ranges: list[tuple[nn.Parameter, int, int]] = []
        offset = 0
        for parameter in (p for group in session.engine.optimizer.fp16_groups for p in group):
            end = offset + parameter.partition_numel()
            if id(parameter) in wanted:
                self._ranges.append((parameter, offset, end))
            offset = end
        assert offset == self._buffer.numel(), "DeepSpeed's gradient buffer is laid out differently"
        self._runs: list[tuple[int, Tensor]] = []
        for start, end in _joined([(start, end) for _, start, end in self._ranges]):
            self._runs.append((start, torch.zeros(end - start, dtype=torch.float32, device=self._buffer.device)))
        self._before = torch.zeros((), dtype=torch.float64, device=self._buffer.device)

    @property
    def forward(self) -> Callable[..., dict[str, Tensor]]:
        forward: Callable[..., dict[str, Tensor]] = self.session.engine
        return forward

    @property
    def replicas(self) -> int:
        return 1

    def pieces(self) -> list[Tensor]:
        return [vector for _, vector in self._runs]

    def collect(self, losses: Iterable[Callable[[], Tensor]]) -> None:
        for loss in losses:
            self.session.backward(loss())
        for start, vector in self._runs:
            torch.div(self._buffer[start : start + len(vector)], self.session.loss_scale(), out=vector)
        self.session.clear_gradients()
        self.ready = True

    def precondition(self, eps: float) -> bool:
        starts = [start for start, _ in self._runs]
        for parameter, start, end in self._ranges:
            moment = safe_get_local_optimizer_state(parameter, "exp_avg_sq")
            if moment is None:
                return False
            first, vector = self._runs[bisect_right(starts, start) - 1]
            vector[start - first : end - first] /= moment.reshape(-1).to(vector.device).sqrt() + eps
        return True

    @contextmanager
    def reading(self) -> Iterator[HeldOutGradient]:
        self._before = torch.zeros_like(self._before)
        with super().reading() as reader:
            yield reader

    def _hook(self, name: str) -> Callable[[Tensor], None]:
        return self._add_square

    def after_backward(self) -> None:
        parts = [_product(self._buffer[start : start + len(vector)], vector) for start, vector in self._runs]
        now = torch.stack(parts).sum() / self.session.loss_scale()
        self._products.append((now - self._before).to(self.session.device))
        self._before = now
        self._lengths.append(self._length())


class ReplicatedGradient(HeldOutGradient):
    """Under ZeRO 0 to 2, where every rank's backward has whole gradients of its own micro-batch."""

    by_rank = True

    def __init__(self, session: Session, parameters: dict[str, nn.Parameter]) -> None:
        super().__init__(session, parameters)
        self._vectors = {name: torch.zeros_like(p, dtype=torch.float32).view(-1) for name, p in parameters.items()}
        self._product = torch.zeros((), dtype=torch.float64, device=session.device)

    @property
    def forward(self) -> Callable[..., dict[str, Tensor]]:
        """Around DeepSpeed, whose hooks would take these gradients for those of training."""
        return self.session.forward_aside

    @property
    def replicas(self) -> int:
        return self.session.world_size

    def pieces(self) -> list[Tensor]:
        return list(self._vectors.values())

    def collect(self, losses: Iterable[Callable[[], Tensor]]) -> None:
        for vector in self._vectors.values():
            vector.zero_()
        scale = self.session.loss_scale()
        for loss in losses:
            gradients = torch.autograd.grad(loss() * scale, list(self.parameters.values()), allow_unused=True)
            for vector, gradient in zip(self._vectors.values(), gradients, strict=True):
                if gradient is not None:
                    vector += gradient.reshape(-1) / scale
        for vector in self._vectors.values():
            dist.all_reduce(vector)
        self.ready = True

    def precondition(self, eps: float) -> bool:
        zero = self.session.engine.optimizer
        if hasattr(zero, "_hp_optimizer_states_linked"):
            # ZeRO-1 and 2 link an optimizer's state to parameters once, after the first group's first step, when the
            # other groups have none (deepspeed/runtime/zero/stage_1_and_2.py, _optimizer_step).
            zero._hp_optimizer_states_linked = False
            zero._lazy_init_hp_params_optimizer_state()
        moments = {name: _second_moment(self.session, p) for name, p in self.parameters.items()}
        if any(moment is None for moment in moments.values()):
            return False
        for name, moment in moments.items():
            assert moment is not None
            self._vectors[name] /= moment.reshape(-1).sqrt() + eps
        return True

    def _hook(self, name: str) -> Callable[[Tensor], None]:
        def read(gradient: Tensor) -> None:
            self._product = self._product + _product(gradient.reshape(-1), self._vectors[name])
            self._add_square(gradient)

        return read

    def after_backward(self) -> None:
        self._products.append(self._product / self._own_scale())
        self._product = torch.zeros_like(self._product)
        self._lengths.append(self._length())


def held_out_gradient(session: Session, parameters: dict[str, nn.Parameter]) -> HeldOutGradient:
    """The kind that fits the session's ZeRO stage."""
    return (ShardedGradient if session.stage == 3 else ReplicatedGradient)(session, parameters)


def _joined(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Ascending ranges, those that touch made one."""
    joined: list[tuple[int, int]] = []
    for start, end in ranges:
        if joined and joined[-1][1] == start:
            start = joined.pop()[0]
        joined.append((start, end))
    return joined


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Inner product of two flat tensors in fp64: the difference of one and the next must keep its digits."""
    pairs = zip(torch.split(a, _CHUNK), torch.split(b, _CHUNK), strict=True)
    return torch.stack([torch.dot(x.float(), y.float()) for x, y in pairs]).sum(dtype=torch.float64)


def _second_moment(session: Session, parameter: nn.Parameter) -> Tensor | None:
    if session.stage == 0 and not hasattr(parameter, "_hp_mapping"):
        moment: Tensor | None = session.engine.optimizer.state.get(parameter, {}).get("exp_avg_sq")
    else:
        moment = safe_get_full_optimizer_state(parameter, "exp_avg_sq")
    return moment
