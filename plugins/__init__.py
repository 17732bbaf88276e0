"""Operators of our own: one folder per operator, with its mathematics, reference, kernel and cases.

The operators the graphs use today are defined as ONNX functions in ``deepstitch.export.functions``; no kernel
of ours is needed to run them.
"""
