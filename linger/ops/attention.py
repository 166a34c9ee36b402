"""Attention in calls that have a fixed-point form: linear layers, two matrix products, a mask and a softmax.

    q = x_q @ (s W_q).T + s b_q,   k = x_k @ W_k.T + b_k,   v = x_v @ W_v.T + b_v,   s = 1 / sqrt(D)   (1)
    p = softmax(masked(q @ k.T)),   out = (p @ v) @ W_o.T + b_o                                        (2)

``nn.MultiheadAttention`` packs W_q, W_k, W_v into one parameter: each third has a grid of its own and is stored under the
parameter's key and ``q``, ``k``, ``v``. The factor s is part of the first third before it is quantized, so it costs neither
a rounding nor an op; ``F.scaled_dot_product_attention`` has no such weight and multiplies q, which is exact where D is a
power of 4. ``mask`` says what becomes of masks, and of a row that is hidden as a whole. The weights that ``need_weights``
returns are those after dropout, averaged by the chip's division.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from linger.errors import LingerError
from linger.numerics import grid_of
from linger.ops._composed import Composed, Router
from linger.ops._constant import named
from linger.ops.mask import masked

Projection = tuple[Tensor, Tensor | None]


def attend(
    route: Router,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    masks: list[Tensor],
    dropout: float,
    causal: bool,
    kept: bool = False,
) -> tuple[Tensor, Tensor]:
    """Equation (2) before the last layer: q (..., L, D), k (..., D, S), v (..., S, E) -> (..., L, E) and p (..., L, S)."""
    scores = torch.matmul(q, k)
    for mask in masks:
        if grid_of(mask) is not None:
            scores = scores + mask
    masks = [mask for mask in masks if grid_of(mask) is None]
    if masks or causal:
        scores = route(masked, scores, *masks, causal=causal, kept=kept, moved=True)
    p = F.softmax(scores, dim=-1)
    p = F.dropout(p, dropout) if dropout else p
    return torch.matmul(p, v), p


def scaled_dot_product(
    route: Router, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """``F.scaled_dot_product_attention``; its bool mask is true where an entry takes part."""
    if enable_gqa:
        times = query.shape[-3] // key.shape[-3]
        key, value = repeated(key, times), repeated(value, times)
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    query = query if scale == 1 else query * scale
    masks = [] if attn_mask is None else [attn_mask]
    return attend(route, query, key.transpose(-2, -1), value, masks, dropout_p, is_causal, kept=True)[0]


def repeated(x: Tensor, times: int) -> Tensor:
    """(..., H, S, D) -> (..., H * times, S, D), every head ``times`` times in a row."""
    if times == 1:
        return x
    *lead, heads, length, size = x.shape
    return x.unsqueeze(-3).expand(*lead, heads, times, length, size).reshape(*lead, heads * times, length, size)


def projections(
    packed: Tensor | None, separate: tuple[Tensor | None, ...], bias: Tensor | None, scale: float
) -> list[Projection]:
    """Weight and bias of q, k and v; the factor ``scale`` of equation (1) is in the first."""
    size = packed.shape[0] // 3 if packed is not None else separate[0].shape[0]  # type: ignore[union-attr]
    found: list[Projection] = []
    for i, name in enumerate("qkv"):
        part = slice(i * size, (i + 1) * size)
        weight: Any = packed[part] if packed is not None else separate[i]
        b = None if bias is None else bias[part]
        if not i:
            weight, b = weight * scale, None if b is None else b * scale
        found.append((named(weight, name), None if b is None else named(b, name)))
    return found


def multihead(
    route: Router, query: Tensor, key: Tensor, value: Tensor, heads: int, layers: list[Projection], *,
    extra: tuple[Tensor, Tensor] | None = None, zero: bool = False, dropout: float = 0.0, masks: list[Tensor],
    padding: Tensor | None = None, causal: bool = False, static: tuple[Tensor | None, Tensor | None] = (None, None),
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention of ``heads`` heads without its last layer.

    Args:
        route: sends a call to its site.
        query: (L, N, E); ``key`` and ``value`` are (S, N, .).
        key: see ``query``.
        value: see ``query``.
        heads: how many; H below.
        layers: weight and bias of q, k, v.
        extra: one more key and value, (1, 1, E) each.
        zero: one more key and value that are 0.
        dropout: rate on the weights.
        masks: (L, S), (1, L, S) or (N * H, L, S) each.
        padding: (N, S).
        causal: hide later positions.
        static: k and v of the heads, (N * H, S, D), in place of projections.

    Returns:
        (L, N, E), and the weights (N, H, L, S).
    """
    length, batch = query.shape[:2]
    (q, k, v) = (F.linear(x, w, b) for x, (w, b) in zip((query, key, value), layers, strict=True))
    grown = 0
    if extra is not None:
        k, v = (torch.cat([x, more.expand(1, batch, -1)]) for x, more in zip((k, v), extra, strict=True))
        grown += 1
    q, k, v = (x.reshape(x.shape[0], batch * heads, x.shape[-1] // heads) for x in (q, k, v))
    q = q.transpose(0, 1)
    k = k.permute(1, 2, 0) if static[0] is None else static[0].transpose(-2, -1)
    v = v.transpose(0, 1) if static[1] is None else static[1]
    if zero:
        k, v = F.pad(k, (0, 1)), F.pad(v, (0, 0, 0, 1))
        grown += 1
    if padding is not None:
        spread = padding.unsqueeze(1).unsqueeze(1).expand(batch, heads, 1, padding.shape[-1])
        masks = [*masks, spread.reshape(batch * heads, 1, padding.shape[-1])]
    if grown:
        masks = [F.pad(mask, (0, grown)) for mask in masks]
    out, p = attend(route, q, k, v, masks, dropout, causal)
    size = out.shape[-1] * heads
    return out.transpose(0, 1).reshape(length, batch, size), p.reshape(batch, heads, *p.shape[-2:])


def multi_head_attention_forward(
    route: Router, query: Tensor, key: Tensor, value: Tensor, embed_dim_to_check: int, num_heads: int,
    in_proj_weight: Tensor | None, in_proj_bias: Tensor | None, bias_k: Tensor | None, bias_v: Tensor | None,
    add_zero_attn: bool, dropout_p: float, out_proj_weight: Tensor, out_proj_bias: Tensor | None, training: bool = True,
    key_padding_mask: Tensor | None = None, need_weights: bool = True, attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False, q_proj_weight: Tensor | None = None, k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None, static_k: Tensor | None = None, static_v: Tensor | None = None,
    average_attn_weights: bool = True, is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """``F.multi_head_attention_forward``"""

    def last(x: Tensor) -> Tensor:
        return F.linear(x, out_proj_weight, out_proj_bias)

    separate = (q_proj_weight, k_proj_weight, v_proj_weight)
    packed = None if use_separate_proj_weight else in_proj_weight
    return whole(
        route, last, query, key, value, num_heads, packed, separate, in_proj_bias, bias_k=bias_k, bias_v=bias_v,
        zero=add_zero_attn, dropout=dropout_p if training else 0.0, attn_mask=attn_mask, padding=key_padding_mask,
        need_weights=need_weights, average=average_attn_weights, causal=is_causal, static=(static_k, static_v),
    )  # fmt: skip


def module_forward(
    route: Router, module: Any, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None = None,
    need_weights: bool = True, attn_mask: Tensor | None = None, average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The forward of ``nn.MultiheadAttention``; never its fast path, which is one opaque call. Torch's own where it is in float."""
    if "function_bmm" in module.__dict__.get("_linger_off", ()):
        options = (key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)
        return nn.MultiheadAttention.forward(module, query, key, value, *options)
    turned = module.batch_first and query.dim() == 3
    if turned:
        query, key, value = rows_first(query, key, value)
    separate = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
    out, weights = whole(
        route, module.out_proj, query, key, value, module.num_heads, module.in_proj_weight, separate,
        module.in_proj_bias, bias_k=module.bias_k, bias_v=module.bias_v, zero=module.add_zero_attn,
        dropout=module.dropout if module.training else 0.0, attn_mask=attn_mask, padding=key_padding_mask,
        need_weights=need_weights, average=average_attn_weights, causal=is_causal,
    )  # fmt: skip
    return (out.transpose(0, 1) if turned else out), weights


def rows_first(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(N, L, E) -> (L, N, E), once for what is the same tensor."""
    q = query.transpose(0, 1)
    k = q if key is query else key.transpose(0, 1)
    return q, k, k if value is key else q if value is query else value.transpose(0, 1)


def whole(
    route: Router, last: Any, query: Tensor, key: Tensor, value: Tensor, heads: int, packed: Tensor | None,
    separate: tuple[Tensor | None, ...], bias: Tensor | None, *, bias_k: Tensor | None, bias_v: Tensor | None,
    zero: bool, dropout: float, attn_mask: Tensor | None, padding: Tensor | None, need_weights: bool, average: bool,
    causal: bool, static: tuple[Tensor | None, Tensor | None] = (None, None),
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Equations (1), (2) with the checks and the shapes of torch's own function; ``last`` is the layer behind."""
    if causal and attn_mask is None:
        raise LingerError("is_causal without attn_mask, allowed is both or neither; pass the mask, as PyTorch demands")
    if causal and padding is None and not need_weights:
        attn_mask = None
    else:
        causal = False
    batched = query.dim() == 3
    if not batched:
        query, key, value = (x.unsqueeze(1) for x in (query, key, value))
        padding = None if padding is None else padding.unsqueeze(0)
    scale = 1 / math.sqrt(query.shape[-1] // heads)
    extra = None if bias_k is None or bias_v is None else (bias_k, bias_v)
    context, p = multihead(
        route, query, key, value, heads, projections(packed, separate, bias, scale), extra=extra, zero=zero,
        dropout=dropout, masks=[] if attn_mask is None else [attn_mask], padding=padding, causal=causal, static=static,
    )  # fmt: skip
    out = last(context)
    out = out if batched else out.squeeze(1)
    if not need_weights:
        return out, None
    p = p.mean(dim=1) if average else p
    return out, p if batched else p.squeeze(0)


OPS = ()
COMPOSED = {
    F.scaled_dot_product_attention: Composed(function=scaled_dot_product, tag="function_bmm"),
    F.multi_head_attention_forward: Composed(
        function=multi_head_attention_forward, tag="function_bmm", layer=True, opaque=True
    ),
}
FORWARDS: dict[type[nn.Module], Callable[..., Any]] = {nn.MultiheadAttention: module_forward}
