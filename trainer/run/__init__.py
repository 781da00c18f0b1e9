"""Whole jobs: what the commands do, as functions."""
