"""The parts of `benchmarks/kernels.py`: what is compared, how it is timed, and on what."""
