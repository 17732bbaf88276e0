"""Attention over a KV cache or over packed segments, dense or over a part of the keys."""
