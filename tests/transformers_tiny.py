"""Tiny networks of the transformer and ConvNeXt families, for images of 12 x 10 pixels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class _Block(nn.Module):
    """A pre-norm transformer block around PyTorch's own attention."""

    def __init__(self, features: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(features), nn.LayerNorm(features)
        self.attention = nn.MultiheadAttention(features, heads, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(features, 2 * features), nn.GELU(), nn.Linear(2 * features, features))

    def forward(self, x):
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    """Patches, a class token, a position embedding, two blocks; heads of 10 features are no multiple of anything."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 20, 2, 2)
        self.token = nn.Parameter(torch.randn(1, 1, 20) / 2)
        self.position = nn.Parameter(torch.randn(1, 31, 20) / 2)
        self.blocks = nn.Sequential(_Block(20, 2), _Block(20, 2))
        self.norm, self.head = nn.LayerNorm(20), nn.Linear(20, 6)

    def forward(self, x):
        x = self.patches(x).flatten(2).permute(0, 2, 1)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.position
        return self.head(self.norm(self.blocks(x))[:, 0])


class _WindowBlock(nn.Module):
    """Attention within windows of 3 x 3 pixels, shifted or not, by matmul or by einsum and cosine similarity."""

    def __init__(self, features: int, heads: int, shift: int, cosine: bool) -> None:
        super().__init__()
        self.heads, self.shift, self.cosine = heads, shift, cosine
        self.norm1, self.norm2 = nn.LayerNorm(features), nn.LayerNorm(features)
        self.qkv, self.proj = nn.Linear(features, 3 * features), nn.Linear(features, features)
        self.bias = nn.Parameter(torch.randn(1, heads, 9, 9) / 2)
        self.temperature = nn.Parameter(torch.rand(heads, 1, 1) + 1)
        self.mlp = nn.Sequential(nn.Linear(features, 2 * features), nn.GELU(), nn.Linear(2 * features, features))

    def attend(self, x):
        n, h, w, c = x.shape
        x = F.pad(x, (0, 0, 0, -w % 3, 0, -h % 3))
        rows, cols = x.shape[1] // 3, x.shape[2] // 3
        x = torch.roll(x, (-self.shift, -self.shift), (1, 2)) if self.shift else x
        x = x.view(n, rows, 3, cols, 3, c).permute(0, 1, 3, 2, 4, 5).reshape(n * rows * cols, 9, c)
        q, k, v = self.qkv(x).view(n * rows * cols, 9, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        if self.cosine:
            scores = torch.einsum("bhid,bhjd->bhij", F.normalize(q, dim=-1), F.normalize(k, dim=-1)) * self.temperature
        else:
            scores = (q * (c // self.heads) ** -0.5) @ k.transpose(-2, -1)
        weights = (scores + self.bias).softmax(-1)
        x = self.proj((weights @ v).transpose(1, 2).reshape(n * rows * cols, 9, c))
        x = x.view(n, rows, cols, 3, 3, c).permute(0, 1, 3, 2, 4, 5).reshape(n, rows * 3, cols * 3, c)
        x = torch.roll(x, (self.shift, self.shift), (1, 2)) if self.shift else x
        return x[:, :h, :w]

    def forward(self, x):
        x = x + self.attend(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class WindowTransformer(nn.Module):
    """Channels-last windows with padding and shifts, then patch merging."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.norm = nn.Conv2d(3, 12, 1), nn.LayerNorm(12)
        self.blocks = nn.Sequential(_WindowBlock(12, 3, 0, False), _WindowBlock(12, 3, 1, True))
        self.merge, self.reduction = nn.LayerNorm(48), nn.Linear(48, 16)
        self.pool, self.head = nn.AdaptiveAvgPool2d(1), nn.Linear(16, 5)

    def forward(self, x):
        x = self.blocks(self.norm(self.patches(x).permute(0, 2, 3, 1)))
        x = torch.cat([x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)], -1)
        x = self.reduction(self.merge(x)).permute(0, 3, 1, 2)
        return self.head(self.pool(x).flatten(1))


class _ConvNextBlock(nn.Module):
    """Depthwise convolution, layer norm and a linear pair over channels, scaled by a learnt factor per channel."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.depth = nn.Conv2d(features, features, 5, padding=2, groups=features)
        self.norm, self.up, self.down = (
            nn.LayerNorm(features),
            nn.Linear(features, 3 * features),
            nn.Linear(3 * features, features),
        )
        self.scale = nn.Parameter(torch.rand(features, 1, 1) + 0.5)

    def forward(self, x):
        y = self.norm(self.depth(x).permute(0, 2, 3, 1))
        return x + self.scale * self.down(F.gelu(self.up(y))).permute(0, 3, 1, 2)


class ConvNext(nn.Module):
    """Two blocks between a stem and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 11, 2, 2), nn.LayerNorm(11)
        self.blocks = nn.Sequential(_ConvNextBlock(11), _ConvNextBlock(11))
        self.last, self.head = nn.LayerNorm(11), nn.Linear(11, 5)

    def forward(self, x):
        x = self.norm(self.stem(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.head(self.last(self.blocks(x).mean((2, 3))))
