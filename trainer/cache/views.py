"""Parts of a cached split: the dev cut, and the first rows for a short evaluation.

Owns: which rows belong to which part. It is decided by the hash of a row's input text, never by its place in the file:
the same text always falls on the same side, in every encoding of the same rows, and in every task made of them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.cache.store import CachedSplit
from trainer.errors import DataError
from trainer.tasks.spec import TextOf
from trainer.window.hashing import mix

_CUT, _LIMIT, _HELD_OUT = 1, 2, 3  # salts: the rows of a short evaluation are not the first ones of the cut


class SplitView:
    """Some rows of a cached split (all of them without `indices`), read like the split itself."""

    def __init__(self, split: CachedSplit, indices: NDArray[np.int64] | None) -> None:
        self.split = split
        self.indices = indices

    def __len__(self) -> int:
        return len(self.split) if self.indices is None else len(self.indices)

    def column(self, name: str) -> NDArray[Any]:
        values = self.split.column(name)
        return values if self.indices is None else values[self.indices]

    def rows(self, indices: NDArray[np.int64]) -> list[dict[str, Any]]:
        return self.split.rows(self._inner(indices))

    def references(self, indices: NDArray[np.int64]) -> list[Any]:
        return self.split.references(self._inner(indices))

    def _inner(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        return indices if self.indices is None else self.indices[indices]


def cut_dev(split: CachedSplit, share: float, rows: int, seed: int) -> tuple[SplitView, SplitView]:
    """Cut dev rows from a train split: those whose salted key is smallest.

    Rows of equal input text stay together. Dev gets at most `rows` rows and at most `share` of all, but at least one
    row. Of the text of another task the rows are cut that are cut of that task: a long one's several pieces count once.

    Returns:
        The rows to train on, and the dev rows; together all rows, each once, in the file's order.

    Raises:
        DataError: every input text is repeated in too many rows.
    """
    keys = split.column("key")
    if isinstance(split.spec, TextOf):
        first = np.flatnonzero(np.diff(split.column("row"), prepend=-1))
        cut = _smallest_share(keys[first], share, rows, mix(seed, _CUT, keys[first]))
        chosen = np.isin(keys, keys[first[cut]])
    else:
        cut = _smallest_share(keys, share, rows, mix(seed, _CUT, keys))
        chosen = np.zeros(len(split), bool)
        chosen[cut] = True
    if not len(cut):
        most = max(1, min(rows, int(share * len(split))))
        raise DataError(
            f"task '{split.spec.name}': has no dev source, and none can be cut from its train source: of its "
            f"{len(split)} rows, each input text is repeated in more than {most}; give it a `dev` source"
        )
    return SplitView(split, np.flatnonzero(~chosen)), SplitView(split, np.flatnonzero(chosen))


def cut_held_out(train: SplitView, share: float, rows: int, seed: int) -> tuple[SplitView, SplitView]:
    """Cut the rows of a held-out gradient from the rows that are left to train on, as `cut_dev` cuts dev rows.

    Returns:
        The rows to train on, and the held-out rows, of which there may be none.
    """
    keys = train.column("key")
    chosen = np.zeros(len(keys), bool)
    chosen[_smallest_share(keys, share, rows, mix(seed, _HELD_OUT, keys))] = True
    return _some(train, ~chosen), _some(train, chosen)


def _smallest_share(keys: NDArray[np.uint64], share: float, rows: int, order: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Which of `keys` are cut: those smallest in `order`. Nothing where each is repeated too often."""
    most = max(1, min(rows, int(share * len(keys))))
    taken = _smallest(order, most, min(4 * most + 64, len(order)))
    if not len(taken):  # the texts near the front are all repeated too often
        taken = _smallest(order, most, len(order))
    return taken


def without(view: SplitView, other: SplitView) -> SplitView:
    """The rows of `view` whose input text is that of no row of `other`.

    Raises:
        DataError: none is left.
    """
    kept = ~np.isin(view.column("key"), other.column("key"))
    if not kept.any():
        raise DataError(
            f"task '{view.split.spec.name}': every row of its train source also stands among its dev rows, so there "
            "is no text to train on; give the task folder other dev rows"
        )
    return _some(view, kept)


def _some(view: SplitView, kept: NDArray[np.bool_]) -> SplitView:
    indices = np.arange(len(kept)) if view.indices is None else view.indices
    return SplitView(view.split, indices[kept])


def _smallest(order: NDArray[np.uint64], most: int, among: int) -> NDArray[np.int64]:
    """Rows in ascending `order`, in whole groups of equal value, as long as they fit into `most` rows.

    Only the first `among` rows (and what is equal to the last of them) are looked at: sorting all of a large corpus for
    a few hundred rows takes long.
    """
    near = np.flatnonzero(order <= np.partition(order, among - 1)[among - 1])
    _, group, sizes = np.unique(order[near], return_inverse=True, return_counts=True)
    taken = np.zeros(len(sizes), bool)
    left = most
    for i, size in enumerate(sizes.tolist()):
        if size <= left:
            taken[i] = True
            left -= size
    return near[taken[group]]


def limit(view: SplitView, rows: int, seed: int) -> SplitView:
    """At most `rows` rows of a view, those with the smallest salted key; 0 is all."""
    if not rows or rows >= len(view):
        return view
    order = mix(seed, _LIMIT, view.column("key"))
    first = np.sort(np.argsort(order, kind="stable")[:rows])
    return SplitView(view.split, first if view.indices is None else view.indices[first])
