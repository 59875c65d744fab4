"""lama's GPT and its training in plain PyTorch: the peer of bench_training.py.

Architecture, initialisation and optimizer are those of nanoGPT's CPU set-up: pre-norm, no biases, exact GELU,
tied embeddings, AdamW (PyTorch's fused one, its fastest) with decay on matrices only, clipping. Windows and
learning rates come from lama, so that both do the same work.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from lama.models.gpt import GPTConfig
from lama.training.loop import Batches
from lama.training.schedule import learning_rate
from lama.training.settings.base import TrainingConfig


class Block(nn.Module):
    def __init__(self, shape: GPTConfig, dropout: float):
        super().__init__()
        self.n_heads, self.dropout = shape.n_heads, dropout
        self.ln1 = nn.LayerNorm(shape.d_model, shape.norm_epsilon, bias=shape.bias)
        self.ln2 = nn.LayerNorm(shape.d_model, shape.norm_epsilon, bias=shape.bias)
        self.qkv = nn.Linear(shape.d_model, 3 * shape.d_model, shape.bias)
        self.out = nn.Linear(shape.d_model, shape.d_model, shape.bias)
        self.up = nn.Linear(shape.d_model, shape.d_mlp, shape.bias)
        self.down = nn.Linear(shape.d_mlp, shape.d_model, shape.bias)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, d_model)
        rate = self.dropout if self.training else 0.0
        parts = self.qkv(self.ln1(x)).chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for part in parts)
        z = functional.scaled_dot_product_attention(
            q, k, v, dropout_p=rate, is_causal=True
        )  # (B, H, T, d_head)
        x = x + functional.dropout(self.out(z.transpose(1, 2).flatten(2)), rate)
        return x + functional.dropout(self.down(functional.gelu(self.up(self.ln2(x)))), rate)


class GPT(nn.Module):
    """A GPT that maps inputs and targets, (B, T) each, to the mean cross-entropy."""

    def __init__(self, shape: GPTConfig, dropout: float = 0.0):
        super().__init__()
        if not shape.tied or shape.norm != "pre" or shape.positions != "learned":
            raise ValueError(f"the peer must be tied, pre-norm and with learned positions; got {shape}")
        self.dropout = dropout
        self.embed = nn.Embedding(shape.vocab_size, shape.d_model)
        self.pos_embed = nn.Embedding(shape.context_length, shape.d_model)
        self.blocks = nn.ModuleList(Block(shape, dropout) for _ in range(shape.n_layers))
        self.ln_final = nn.LayerNorm(shape.d_model, shape.norm_epsilon, bias=shape.bias)
        for name, p in self.named_parameters():
            if p.ndim >= 2:
                residual = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * shape.n_layers) if residual else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        x = self.embed(inputs) + self.pos_embed.weight[: inputs.shape[1]]
        x = functional.dropout(x, self.dropout, self.training)
        for block in self.blocks:
            x = block(x)
        logits = functional.linear(self.ln_final(x), self.embed.weight)
        return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


@dataclass
class Trainer:
    """Iterates over training steps: yields the loss and the gradient's norm of each."""

    shape: GPTConfig
    batches: Batches
    config: TrainingConfig
    compiled: bool = False

    def __post_init__(self) -> None:
        torch.manual_seed(self.config.seed)
        self.model = GPT(self.shape, self.config.dropout)
        self.function: Any = torch.compile(self.model) if self.compiled else self.model
        self.parameters = list(self.model.parameters())
        groups = [
            {"params": [p for p in self.parameters if p.ndim >= 2], "weight_decay": self.config.weight_decay},
            {"params": [p for p in self.parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(
            groups, lr=self.config.learning_rate, betas=(self.config.beta1, self.config.beta2), fused=True
        )

    def __iter__(self) -> Iterator[tuple[float, float]]:
        self.model.train()
        for step in range(self.config.steps):
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(step, self.config)
            losses = []
            parts = (np.split(part, self.config.accumulation) for part in self.batches(step))
            for inputs, targets in zip(*parts, strict=True):
                loss = self.loss(inputs, targets)
                (loss / self.config.accumulation).backward()
                losses.append(loss.item())
            norm = nn.utils.clip_grad_norm_(self.parameters, self.config.gradient_clip or math.inf).item()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            yield float(np.mean(losses)), norm

    def loss(self, inputs: np.ndarray, targets: np.ndarray) -> Tensor:
        dtype = getattr(torch, self.config.precision)
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            return self.function(torch.from_numpy(inputs).long(), torch.from_numpy(targets).long())

    def evaluate(self, windows: tuple[np.ndarray, np.ndarray], batch_size: int) -> float:
        """The mean loss over windows, (N, T) each, in whole batches only, as in lama's Evaluator."""
        self.model.eval()
        ends = range(batch_size, len(windows[0]) + 1, batch_size)
        with torch.no_grad():
            losses = [self.loss(*(part[end - batch_size : end] for part in windows)).item() for end in ends]
        self.model.train()
        return math.fsum(losses) / len(losses)
