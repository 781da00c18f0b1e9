"""The sampler: which examples every micro-batch of every optimizer step holds, planned before it runs."""

from trainer.window.planner import MicroBatch, Planner, Pool, Window

__all__ = ["MicroBatch", "Planner", "Pool", "Window"]
