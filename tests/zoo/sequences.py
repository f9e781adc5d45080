"""Decoders of series and sequences, and of volumes."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvae.likelihoods import Categorical, Gaussian

from .entry import Entry


class Series(nn.Module):
    """A time series by Conv1d: Linear, upsampling, dilated convolutions with residual connections."""

    def __init__(self, width: int, length: int = 32) -> None:
        super().__init__()
        c = 8 * width
        self.fc = nn.Linear(4, c * (length // 4))
        self.up = nn.ConvTranspose1d(c, c, 4, 2, 1)
        self.dilated = nn.ModuleList(nn.Conv1d(c, c, 3, padding=d, dilation=d) for d in (1, 2))
        self.out = nn.Conv1d(c, 2, 5, padding=2, padding_mode="replicate")

    def forward(self, z: Tensor) -> Tensor:
        h = self.fc(z).unflatten(1, (-1, 8)) if z.dim() == 2 else z
        h = F.relu(self.up(h))
        h = F.interpolate(h, scale_factor=2, mode="linear", align_corners=False)
        for layer in self.dilated:
            h = h + F.relu(layer(h))
        return self.out(h)


class Volume(nn.Module):
    """A volume by transposed Conv3d with BatchNorm, the last layer trilinear."""

    def __init__(self, width: int) -> None:
        super().__init__()
        c = 4 * width
        self.fc = nn.Linear(5, 2 * c * 8)
        self.net = nn.Sequential(
            nn.Unflatten(1, (2 * c, 2, 2, 2)),
            nn.ConvTranspose3d(2 * c, c, 4, stride=2, padding=1),
            nn.BatchNorm3d(c),
            nn.LeakyReLU(0.2),
            nn.Upsample(scale_factor=2, mode="trilinear", align_corners=False),
            nn.Conv3d(c, 1, 3, padding=1),
        )

    def forward(self, z: Tensor) -> Tensor:
        return self.net(F.relu(self.fc(z)))


class LSTM(nn.Module):
    """The code repeated along time, through an LSTM (Fabius, van Amersfoort 2015, and most of GitHub since)."""

    def __init__(self, width: int, steps: int = 6) -> None:
        super().__init__()
        self.steps, h = steps, 12 * width
        self.initial, self.lstm = nn.Linear(4, h), nn.LSTM(4, h, num_layers=2, batch_first=True)
        self.out = nn.Linear(h, 3)

    def forward(self, z: Tensor) -> Tensor:
        state = torch.tanh(self.initial(z)).expand(2, -1, -1).contiguous()
        h, _ = self.lstm(z.unsqueeze(1).repeat(1, self.steps, 1), (state, torch.zeros_like(state)))
        return self.out(h)


class GRULoop(nn.Module):
    """A GRU cell in a loop that feeds its own output back."""

    def __init__(self, width: int, steps: int = 5) -> None:
        super().__init__()
        self.steps, h = steps, 12 * width
        self.initial, self.cell, self.out = nn.Linear(4, h), nn.GRUCell(3, h), nn.Linear(h, 3)

    def forward(self, z: Tensor) -> Tensor:
        h = self.initial(z)
        y, found = z.new_zeros(z.shape[0], 3), []
        for _ in range(self.steps):
            h = self.cell(y, h)
            y = self.out(h)
            found.append(y)
        return torch.stack(found, dim=1)


class Transformer(nn.Module):
    """Tokens from the code, sines and cosines added (a buffer), a transformer's layers, logits of each token."""

    def __init__(self, width: int, tokens: int = 5) -> None:
        super().__init__()
        d = 8 * width
        self.tokens = tokens
        self.inp = nn.Linear(4, tokens * d)
        angles = torch.arange(tokens)[:, None] * torch.exp(torch.arange(0, d, 2) * (-math.log(1e4) / d))
        self.register_buffer("positions", torch.stack([angles.sin(), angles.cos()], -1).flatten(1)[None])
        layer = nn.TransformerEncoderLayer(d, 2, 2 * d, dropout=0.1, batch_first=True, activation="gelu")
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(d, 6)

    def forward(self, z: Tensor) -> Tensor:
        h = self.inp(z).view(z.size(0), self.tokens, -1) + self.positions
        return self.head(self.encoder(h)).flatten(1)


class CrossAttention(nn.Module):
    """Learned queries that look at tokens of the code (a Perceiver's decoder), pre-norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        d = 8 * width
        self.keys = nn.Linear(2, d)
        self.queries = nn.Parameter(0.5 * torch.randn(7, d))
        self.norm, self.attention = nn.LayerNorm(d), nn.MultiheadAttention(d, 2, batch_first=True)
        self.mlp, self.out = (
            nn.Sequential(nn.Linear(d, 2 * d), nn.GELU(), nn.Linear(2 * d, d)),
            nn.Linear(d, 4),
        )

    def forward(self, z: Tensor) -> Tensor:
        context = self.norm(self.keys(z.reshape(len(z), -1, 2)))
        h = self.queries.expand(z.shape[0], -1, -1)
        h = h + self.attention(h, context, context, need_weights=False)[0]
        h = h + self.mlp(h)
        return self.out(h)


ENTRIES = [
    Entry("time-series", Series, (4,), Gaussian(0.5)),
    Entry("volume", Volume, (5,)),
    Entry("lstm", LSTM, (4,), Gaussian(0.5)),
    Entry("gru-loop", GRULoop, (4,), Gaussian(0.5)),
    Entry("transformer", Transformer, (4,), Categorical(6)),
    Entry("cross-attention", CrossAttention, (6,), Gaussian(0.5)),
]
