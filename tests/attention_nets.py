"""Networks with attention, gates and normalizations, as people write them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Encoder(nn.Module):
    """(N, 24, 28) rows or frames -> (N, 10): learned positions, 2 layers of 4 heads with GELU, the mean over time."""

    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Linear(28, 32)
        self.positions = nn.Parameter(torch.randn(1, 24, 32) * 0.1)
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.1, activation="gelu", batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.norm = nn.LayerNorm(32)
        self.out = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = self.encoder(self.into(x) + self.positions)
        return self.out(self.norm(y).mean(1))


class Tokens(nn.Module):
    """(N, 16, 12) scores -> (N, 16): the best of 16 at each of 12 steps as tokens, causal attention by hand, tied output."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, 24)
        self.positions = nn.Embedding(12, 24)
        self.qkv, self.out = nn.Linear(24, 72), nn.Linear(24, 24)
        self.norm = nn.LayerNorm(24)
        self.register_buffer("future", torch.ones(12, 12).triu(1).bool())

    def forward(self, x: Tensor) -> Tensor:
        y = self.embedding(x.argmax(1)) + self.positions(torch.arange(12, device=x.device))
        q, k, v = (t.unflatten(-1, (4, 6)).transpose(1, 2) for t in self.qkv(self.norm(y)).chunk(3, dim=-1))
        scores = (q @ k.transpose(-2, -1) / 6**0.5).masked_fill(self.future, float("-inf"))
        y = y + self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        return (y @ self.embedding.weight.t())[:, -1]


class ConformerBlock(nn.Module):
    """(N, T, C) -> (N, T, C): half feed-forwards around self-attention and a gated depthwise convolution."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.LayerNorm(size), nn.Linear(size, 2 * size), nn.SiLU(), nn.Linear(2 * size, size))
        self.norm, self.attention = nn.LayerNorm(size), nn.MultiheadAttention(size, 4, batch_first=True)
        self.gate_norm = nn.LayerNorm(size)
        self.convolution = nn.Sequential(
            nn.Conv1d(size, 2 * size, 1),
            nn.GLU(dim=1),
            nn.Conv1d(size, size, 7, padding=3, groups=size),
            nn.BatchNorm1d(size),
            nn.SiLU(),
            nn.Conv1d(size, size, 1),
        )
        self.second = nn.Sequential(nn.LayerNorm(size), nn.Linear(size, 2 * size), nn.SiLU(), nn.Linear(2 * size, size))
        self.last = nn.LayerNorm(size)

    def forward(self, x: Tensor) -> Tensor:
        x = x + 0.5 * self.first(x)
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        x = x + self.convolution(self.gate_norm(x).transpose(1, 2)).transpose(1, 2)
        return self.last(x + 0.5 * self.second(x))


class Conformer(nn.Module):
    """(N, 20, 32) mel frames -> (N, 20, 12) log-probabilities."""

    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Linear(32, 24)
        self.block = ConformerBlock(24)
        self.out = nn.Linear(24, 12)

    def forward(self, x: Tensor) -> Tensor:
        return F.log_softmax(self.out(self.block(self.into(x))), dim=-1)


class SqueezeExcite(nn.Module):
    """A gate per channel from the mean of the image."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(channels, channels // 4, 1), nn.Conv2d(channels // 4, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate = F.adaptive_avg_pool2d(x, 1)
        return x * F.hardsigmoid(self.expand(F.relu(self.reduce(gate))))


class MobileNetV3(nn.Module):
    """(N, 3, 16, 16) -> (N, 10): two inverted residuals with squeeze-and-excite and hardswish."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.Hardswish())
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(16, 32, 1, bias=False),
                nn.BatchNorm2d(32),
                nn.Hardswish(inplace=True),
                nn.Conv2d(32, 32, 5, padding=2, groups=32, bias=False),
                nn.BatchNorm2d(32),
                nn.Hardswish(inplace=True),
                SqueezeExcite(32),
                nn.Conv2d(32, 16, 1, bias=False),
                nn.BatchNorm2d(16),
            )
            for _ in range(2)
        )
        self.out = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.out(x.mean((2, 3)))


class SpeechNet(nn.Module):
    """(N, 1, 16, 40) spectrogram -> (N, 20, 9): strided convolutions with clipped ReLU, attention over time, softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(1, 8, 3, stride=(2, 2), padding=1),
            nn.BatchNorm2d(8),
            nn.Hardtanh(0, 20),
            nn.Conv2d(8, 8, 3, stride=(2, 1), padding=1),
            nn.BatchNorm2d(8),
            nn.Hardtanh(0, 20),
        )
        self.into = nn.Linear(32, 24)
        self.query, self.key, self.value = nn.Linear(24, 24), nn.Linear(24, 24), nn.Linear(24, 24)
        self.norm, self.out = nn.LayerNorm(24), nn.Linear(24, 9)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        n, c, f, t = y.size()
        y = torch.tanh(self.into(y.permute(0, 3, 1, 2).reshape(n, t, c * f)))
        attended = F.scaled_dot_product_attention(self.query(y), self.key(y), self.value(y))
        return F.softmax(self.out(self.norm(y + attended)), dim=-1)


ATTENTION_NETS: dict[str, tuple[type[nn.Module], tuple[int, ...]]] = {
    "Encoder": (Encoder, (24, 28)),
    "Tokens": (Tokens, (16, 12)),
    "Conformer": (Conformer, (20, 32)),
    "MobileNetV3": (MobileNetV3, (3, 16, 16)),
    "SpeechNet": (SpeechNet, (1, 16, 40)),
}
