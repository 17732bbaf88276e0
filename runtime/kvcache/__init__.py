"""Keys and values of the tokens seen so far: their memory, and how much of it a new prompt can use."""

from __future__ import annotations

from deepstitch.runtime.kvcache.prefix import CachedTokens, common_prefix
from deepstitch.runtime.kvcache.static import CacheTensor, KVCache, cache_tensors

__all__ = ["CacheTensor", "CachedTokens", "KVCache", "cache_tensors", "common_prefix"]
