"""PyTorch's ways of doing what the operators do, on the same card and the same numbers.

Weights are dequantized beforehand where PyTorch has no kernel for them, which it is not charged for. What can be
captured in a CUDA graph is replayed from one: a host that is slow to launch is not PyTorch's fault. ``compiled`` ways
go through torch.compile, whose kernels are Triton's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from benchmarks.gpu.shapes import BLOCK, KEY_BLOCK, Measurement
from deepstitch.plugins.common.case import Array

__all__ = ["Way", "captured", "peers_of"]

Way = Callable[[], Any]  # runs once and returns the result


def peers_of(call: Measurement, arrays: Mapping[str, Array], device: str) -> dict[str, Way]:
    """Ways to compute one call, by name; the first works in float32 on every card."""
    import torch

    with torch.no_grad():
        tensors = {name: torch.from_numpy(value).to(device) for name, value in arrays.items()}
        return _MAKERS[call.op](torch, call, tensors)


def captured(way: Way) -> Way | None:
    """Replays a way from a CUDA graph; None where it cannot be captured."""
    import torch

    try:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side), torch.no_grad():
            for _ in range(3):
                way()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph), torch.no_grad():
            result = way()
    except Exception:  # whatever PyTorch says: this way is not capturable
        torch.cuda.synchronize()
        return None

    def replay() -> Any:
        graph.replay()
        return result

    return replay


def dequantized(torch: Any, tensors: Mapping[str, Any], name: str, scales: str, stored: str) -> Any:
    """The matrix ``[..., N, K]`` in float32."""
    words = tensors[name]
    if stored in ("float32", "float16"):
        return words.float()
    if stored == "int8":
        numbers = words.view(torch.int8)
    else:
        shifts = torch.arange(0, 32, 4, device=words.device, dtype=torch.int32)
        numbers = ((words[..., None] >> shifts) & 15).flatten(-2) - 8
    values = numbers.float().unflatten(-1, (-1, BLOCK)) * tensors[scales].float()[..., None]
    return values.flatten(-2)


def _experts(torch: Any, call: Measurement, tensors: Mapping[str, Any]) -> dict[str, Way]:
    stored, k = call.attributes["weight_format"], call.attributes["top_k"]
    up32 = dequantized(torch, tensors, "gate_up", "gate_up_scales", stored)
    down32 = dequantized(torch, tensors, "down", "down_scales", stored)
    x, logits = tensors["x"], tensors["router_logits"]
    order = torch.topk(logits, k, dim=-1).indices
    rows = {int(e): (order == e).any(-1).nonzero()[:, 0] for e in order.unique()}  # known beforehand: no waiting

    def route() -> Any:
        top = torch.topk(torch.softmax(logits, -1), k, dim=-1)
        return top.values / top.values.sum(-1, keepdim=True), top.indices

    def expert(part: Any, up: Any, down: Any) -> Any:
        gate, value = (part @ up.mT).chunk(2, -1)
        return (torch.nn.functional.silu(gate) * value) @ down.mT

    def by_expert(up: Any, down: Any) -> Way:
        def way() -> Any:
            weights, indices = route()
            result = torch.zeros_like(x)
            cast = x.to(up.dtype)
            for e, chosen in rows.items():
                share = (weights[chosen] * (indices[chosen] == e)).sum(-1, keepdim=True)
                result.index_add_(0, chosen, expert(cast[chosen], up[e], down[e]).float() * share)
            return result

        return way

    def gathered(up: Any, down: Any) -> Way:
        def way() -> Any:
            weights, indices = route()
            parts = expert(x.to(up.dtype)[:, None, None, :], up[indices], down[indices])[:, :, 0]
            return (parts.float() * weights[..., None]).sum(1)

        return way

    ways = {"float32 by expert": by_expert(up32, down32)}
    half = (up32.half(), down32.half())
    ways["float16 by expert"] = by_expert(*half)
    if len(x) * k <= 64:  # each token's matrices are copied
        ways |= {"float32 gathered": gathered(up32, down32), "float16 gathered": gathered(*half)}
    return ways | _grouped(torch, x, k, route, up32, down32)


def _grouped(torch: Any, x: Any, k: int, route: Callable[[], Any], up: Any, down: Any) -> dict[str, Way]:
    """Experts as one grouped product, on cards that have it (compute capability 9.0)."""
    product = getattr(torch.nn.functional, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)
    if product is None or x.device.type != "cuda" or torch.cuda.get_device_capability() < (9, 0):
        return {}
    up16, down16 = up.bfloat16().mT, down.bfloat16().mT

    def way() -> Any:
        weights, indices = route()
        slots = indices.flatten().argsort(stable=True)
        counts = (indices.flatten()[:, None] == torch.arange(len(up), device=x.device)).sum(0)  # bincount would wait
        ends = counts.cumsum(0).to(torch.int32)
        gate, value = product(x.bfloat16()[slots // k], up16, offs=ends).chunk(2, -1)
        parts = product(torch.nn.functional.silu(gate) * value, down16, offs=ends)
        share = weights.flatten()[slots, None]
        return torch.zeros_like(x).index_add_(0, slots // k, parts.float() * share)

    return {"bfloat16 grouped": way}


def _linear(torch: Any, call: Measurement, tensors: Mapping[str, Any]) -> dict[str, Way]:
    stored, x = call.attributes["weight_format"], tensors["x"]
    full = dequantized(torch, tensors, "weight", "scales", stored)
    half = full.half()
    ways: dict[str, Way] = {"float32": lambda: x @ full.mT, "float16": lambda: (x.half() @ half.mT).float()}
    if stored == "int4" and x.device.type == "cuda" and torch.cuda.get_device_capability() >= (8, 0):
        ways |= _int4(torch, x, tensors)
    if stored == "int8" and len(x) > 16 and x.device.type == "cuda":
        ways |= _int8(torch, x, full)
    return ways


def _int4(torch: Any, x: Any, tensors: Mapping[str, Any]) -> dict[str, Way]:
    """PyTorch's product with 4-bit weights and bfloat16 activations."""
    words, scales = tensors["weight"], tensors["scales"]
    shifts = torch.arange(0, 32, 4, device=words.device, dtype=torch.int32)
    numbers = ((words[..., None] >> shifts) & 15).flatten(-2).to(torch.uint8)
    try:
        packed = torch.ops.aten._convert_weight_to_int4pack(numbers[:, ::2] << 4 | numbers[:, 1::2], 8)
    except RuntimeError:  # sizes it does not take
        return {}
    pairs = torch.stack([scales.mT, torch.zeros_like(scales.mT)], -1).bfloat16().contiguous()
    return {
        "int4, bfloat16 activations": lambda: torch.ops.aten._weight_int4pack_mm(
            x.bfloat16(), packed, BLOCK, pairs
        ).float()
    }


def _int8(torch: Any, x: Any, full: Any) -> dict[str, Way]:
    """PyTorch's product of integers with one scale per row of each side: coarser than blocks."""
    steps = full.abs().amax(-1, keepdim=True) / 127
    numbers = (full / steps).round().to(torch.int8).mT

    def way() -> Any:
        scale = x.abs().amax(-1, keepdim=True) / 127
        return torch._int_mm((x / scale).round().to(torch.int8), numbers).float() * scale * steps.mT

    return {"int8 per row": way}


def _attention(torch: Any, call: Measurement, tensors: Mapping[str, Any]) -> dict[str, Way]:
    heads, kv_heads, width = (call.attributes[name] for name in ("num_heads", "kv_num_heads", "head_dim"))
    new = tensors["query"].shape[1]
    query = tensors["query"].unflatten(-1, (heads, width)).transpose(1, 2).contiguous()
    key, value = (tensors[name].float() for name in ("key_cache", "value_cache"))
    if call.attributes["kv_format"] == "int8":
        key, value = key * tensors["key_scales"][..., None], value * tensors["value_scales"][..., None]
    past = key.shape[2] - new
    positions = torch.arange(key.shape[2], device=query.device)
    seen = positions <= past + torch.arange(new, device=query.device)[:, None]
    if call.attributes["pattern"] == "dynamic":
        return {}  # the choice of blocks is part of the work, and PyTorch has no operator for it
    if "layout" in tensors:
        kept = tensors["layout"][0, 0].bool()
        rows = torch.arange(new, device=query.device) // KEY_BLOCK
        seen = seen & kept[rows][:, positions // KEY_BLOCK]
    sdpa = torch.nn.functional.scaled_dot_product_attention

    def way(dtype: Any) -> Way:
        parts = [each.to(dtype) for each in (query, key, value)]
        # a single query sees everything: no mask, so that the fastest kernel applies
        masked: dict[str, Any] = {"attn_mask": None if bool(seen.all()) else seen}
        if past == 0 and new > 1 and "layout" not in tensors:
            masked = {"is_causal": True}
        scale, shared = call.attributes["scale"], heads != kv_heads
        return lambda: sdpa(*parts, **masked, scale=scale, enable_gqa=shared).transpose(1, 2).flatten(-2).float()

    ways = {"float32": way(torch.float32), "float16": way(torch.float16)}
    if new > 1 and query.device.type == "cuda":
        ways |= _flex(torch, call, (query.half(), key.half(), value.half()), past, tensors.get("layout"))
    return ways


def _flex(torch: Any, call: Measurement, parts: Any, past: int, layout: Any) -> dict[str, Way]:
    """Block-sparse attention through torch.compile (Triton), float16."""
    try:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        kept = None if layout is None else layout[0, 0].bool()

        def visible(b: Any, h: Any, q: Any, k: Any) -> Any:
            causal = k <= q + past
            return causal if kept is None else causal & kept[q // KEY_BLOCK, k // KEY_BLOCK]

        query, key, value = parts
        mask = create_block_mask(visible, None, None, query.shape[2], key.shape[2], device=query.device)
        compiled = torch.compile(flex_attention)
        scale = call.attributes["scale"]

        def way() -> Any:
            result = compiled(query, key, value, block_mask=mask, scale=scale, enable_gqa=True)
            return result.transpose(1, 2).flatten(-2).float()

        way()
    except Exception:  # no Triton, or a card it has no code for
        return {}
    return {"float16 flex_attention, compiled": way}


def _norm_and_rope(torch: Any, call: Measurement, tensors: Mapping[str, Any]) -> dict[str, Way]:
    x, weight = tensors["x"], tensors["weight"]
    norm = torch.nn.functional.rms_norm
    if call.attributes["mode"] == "norm":

        def way() -> Any:
            return norm(x + tensors["residual"], weight.shape, weight, 1e-6)

    else:
        half = len(weight) // 2
        pair = torch.arange(half, device=x.device)
        _, height, wide = call.attributes["mrope_section"]
        axis = torch.where((pair % 3 == 1) & (pair < 3 * height), 1, 0)
        axis = torch.where((pair % 3 == 2) & (pair < 3 * wide), 2, axis)
        positions = tensors["position_ids"].float()[axis, 0].mT  # (S, half)

        def way() -> Any:
            normed = norm(x[0].unflatten(-1, (-1, len(weight))), weight.shape, weight, 1e-6)
            angle = (positions * tensors["inv_freq"])[:, None]
            first, second = normed.chunk(2, -1)
            cos, sin = angle.cos(), angle.sin()
            return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).flatten(-2)[None]

    return {"float32": way} | _compiled(torch, x, way)


def _deepstack(torch: Any, call: Measurement, tensors: Mapping[str, Any]) -> dict[str, Way]:
    hidden, embeds = tensors["hidden_states"], tensors["deepstack_embeds"].clone()
    embeds[0] = 0
    begin = call.attributes["layer"] * hidden.shape[-1]
    part = embeds[:, begin : begin + hidden.shape[-1]]
    index = tensors["deepstack_index"].long()

    def way() -> Any:
        return hidden + part[index]

    return {"float32": way} | _compiled(torch, hidden, way)


def _append(torch: Any, call: Measurement, tensors: Mapping[str, Any]) -> dict[str, Way]:
    begin, tokens = int(tensors["past_lengths"][0]), tensors["key"].shape[1]
    places = torch.arange(begin, begin + tokens, device=tensors["key"].device)
    caches = [tensors[f"past_{part}"].clone() for part in ("key", "value")]
    heads = caches[0].shape[1]

    def way() -> Any:
        for cache, part in zip(caches, ("key", "value"), strict=True):
            cache.index_copy_(2, places, tensors[part].unflatten(-1, (heads, -1)).transpose(1, 2).to(cache.dtype))
        return caches[0]

    return {"index_copy_": way}


def _compiled(torch: Any, x: Any, way: Way) -> dict[str, Way]:
    if x.device.type != "cuda":
        return {}
    try:
        made = torch.compile(way)
        made()
    except Exception:  # no Triton, or a card it has no code for
        return {}
    return {"float32, compiled": made}


_MAKERS: Mapping[str, Callable[[Any, Measurement, Mapping[str, Any]], dict[str, Way]]] = {
    "moe_experts": _experts,
    "quantized_linear": _linear,
    "sparse_attention": _attention,
    "rms_norm_rope": _norm_and_rope,
    "deepstack_add": _deepstack,
    "kv_cache_append": _append,
}


def to_numpy(result: Any) -> Array:
    """A copy in host memory."""
    return np.asarray(result.detach().float().cpu().numpy())
