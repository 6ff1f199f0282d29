"""One small decoder-only transformer, of any width and depth, for teacher and student."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from models import size
from torch import Tensor, nn

HEAD = 32
"""Width of an attention head."""


class Block(nn.Module):
    """Attention and a two-layer network, each normalised before and added to its input."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = max(1, width // HEAD), dropout
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        mixed = self.attention(self.before(x))
        q, k, v = mixed.view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        seen = self.out(seen.transpose(1, 2).reshape(batch, length, width))
        x = x + F.dropout(seen, self.dropout, self.training)
        hidden = self.down(F.gelu(self.up(self.between(x)), approximate="tanh"))
        return x + F.dropout(hidden, self.dropout, self.training)


class Decoder(nn.Module):
    """Logits of the next token at every position; the head's weights are the embedding's."""

    def __init__(
        self, vocabulary: int, context: int, width: int, blocks: int, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.dropout = dropout
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, dropout) for _ in range(blocks))
        self.last = nn.LayerNorm(width)
        for name, parameter in self.named_parameters():
            if name.startswith(("tokens", "places")):
                nn.init.normal_(parameter, std=0.2)
            elif parameter.ndim > 1:
                # What is added to the stream starts smaller, the more is added.
                shrink = (2 * blocks) ** -0.5 if name.endswith(("out.weight", "down.weight")) else 1
                nn.init.normal_(parameter, std=shrink * parameter.shape[1] ** -0.5)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def hidden(self, tokens: Tensor) -> Tensor:
        """What the head takes: its logits are ``hidden @ tokens.weight.T``."""
        x = self.tokens(tokens) + self.places.weight[: tokens.shape[1]]
        x = F.dropout(x, self.dropout, self.training)
        for block in self.blocks:
            x = block(x)
        normalised: Tensor = self.last(x)
        return normalised

    def forward(self, tokens: Tensor) -> Tensor:
        return F.linear(self.hidden(tokens), self.tokens.weight)


def build(text: str, vocabulary: int, context: int, seed: int, dropout: float = 0.0) -> Decoder:
    """A network whose initial weights depend on ``seed`` and on nothing else."""
    width, blocks = size(text)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Decoder(vocabulary, context, width, blocks, dropout)
