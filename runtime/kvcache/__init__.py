"""Keys and values of the tokens seen so far."""

from __future__ import annotations

from deepstitch.runtime.kvcache.static import CacheTensor, KVCache, cache_tensors

__all__ = ["CacheTensor", "KVCache", "cache_tensors"]
