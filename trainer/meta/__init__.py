"""End-task-aware training: how much each task counts, learned online from held-out rows of the one that matters.

Owns: the method of META-TARTAN (2109.07437) on sharded models. `held_out.py` makes the held-out gradient, through a
head that `dev_head.py` fits; `trainer.engine.alignment` reads training's gradients against it; `weights.py` turns
readings into weights; `controller.py` says when.
"""

from trainer.meta.controller import Controller

__all__ = ["Controller"]
