"""Numbers about a run: metrics and baselines, the metrics log, progress, the final table and the picture."""
