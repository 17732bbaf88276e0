"""Compiles the operators: for a GPU, and for the CPU through the host shim."""
