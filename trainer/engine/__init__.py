"""DeepSpeed: sharding, precision, checkpoints and launch. We call it, we do not rebuild it."""
