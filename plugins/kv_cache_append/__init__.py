"""New keys and values into the KV cache, in place where the new cache is the old one's memory."""
