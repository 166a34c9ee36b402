"""The containers of ``nn.Transformer`` with a plain forward: in eval, torch's own turn into one opaque call.

An encoder of torch's looks at the values of its masks, may turn its input into a nested tensor, and calls
``torch._transformer_encoder_layer_fwd``. What is computed is no more than this.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from linger.ops._composed import Router


def encoder(
    route: Router, module: Any, src: Tensor, mask: Tensor | None = None, src_key_padding_mask: Tensor | None = None,
    is_causal: bool | None = None,
) -> Tensor:  # fmt: skip
    """``nn.TransformerEncoder``; ``is_causal`` None stands for no."""
    for layer in module.layers:
        src = layer(src, src_mask=mask, src_key_padding_mask=src_key_padding_mask, is_causal=bool(is_causal))
    return src if module.norm is None else module.norm(src)  # type: ignore[no-any-return]


def encoder_layer(
    route: Router, module: Any, src: Tensor, src_mask: Tensor | None = None,
    src_key_padding_mask: Tensor | None = None, is_causal: bool = False,
) -> Tensor:  # fmt: skip
    """``nn.TransformerEncoderLayer``, normalized before or after."""

    def attention(x: Tensor) -> Tensor:
        options = {"attn_mask": src_mask, "key_padding_mask": src_key_padding_mask, "is_causal": is_causal}
        return module.dropout1(module.self_attn(x, x, x, need_weights=False, **options)[0])  # type: ignore[no-any-return]

    def feed_forward(x: Tensor) -> Tensor:
        x = module.linear2(module.dropout(module.activation(module.linear1(x))))
        return module.dropout2(x)  # type: ignore[no-any-return]

    if module.norm_first:
        src = src + attention(module.norm1(src))
        return src + feed_forward(module.norm2(src))
    src = module.norm1(src + attention(src))
    return module.norm2(src + feed_forward(src))  # type: ignore[no-any-return]


def decoder(
    route: Router, module: Any, tgt: Tensor, memory: Tensor, tgt_mask: Tensor | None = None,
    memory_mask: Tensor | None = None, tgt_key_padding_mask: Tensor | None = None,
    memory_key_padding_mask: Tensor | None = None, tgt_is_causal: bool | None = None, memory_is_causal: bool = False,
) -> Tensor:  # fmt: skip
    """``nn.TransformerDecoder``; ``tgt_is_causal`` None stands for no. Its layers keep torch's forward."""
    for layer in module.layers:
        tgt = layer(
            tgt, memory, tgt_mask=tgt_mask, memory_mask=memory_mask, tgt_key_padding_mask=tgt_key_padding_mask,
            memory_key_padding_mask=memory_key_padding_mask, tgt_is_causal=bool(tgt_is_causal),
            memory_is_causal=memory_is_causal,
        )  # fmt: skip
    return tgt if module.norm is None else module.norm(tgt)  # type: ignore[no-any-return]


OPS = ()
FORWARDS: dict[type[nn.Module], Callable[..., Any]] = {
    nn.TransformerEncoder: encoder, nn.TransformerEncoderLayer: encoder_layer, nn.TransformerDecoder: decoder,
}  # fmt: skip
CONTAINERS = (nn.TransformerDecoderLayer, nn.Transformer)
