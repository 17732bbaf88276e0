"""Runs an exported bundle: preprocessing, engines, KV cache, generation. Knows a model only by its manifest.

Reading order: ``pipeline`` (the entry), ``generate`` (the step loop), ``decode`` and ``calls`` (the decoder
graph over its cache), ``answer`` and ``sampling`` (tokens), ``bundle`` and ``engine`` (files and graphs).
"""
