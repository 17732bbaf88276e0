"""One process per case: each module loads one runtime, measures figures in it and writes a JSON file.

A module here may be run by another Python than the benchmark's own, so it imports nothing but the standard library,
numpy, its runtime, and parts of this repository that need no more than that.
"""
