"""Every installed runtime on the same random weights, in one run: ``python -m benchmarks.peers --help``."""
