"""Parts of ``benchmarks.plugins_gpu``: the card and its ceilings, the shapes, PyTorch's way of doing the same."""
