"""lama's GPT, its training and generation in plain PyTorch: the peer of bench_training.py and bench_gpu.py.

Two shapes: GPT-2's (learned positions, LayerNorm) and Llama's (rotary positions, RMSNorm, a gated MLP, fewer
heads of keys and values); both pre-norm, with tied embeddings. Initialisation is lama's; training is that of
nanoGPT: AdamW (PyTorch's fused one, its fastest) with decay on matrices only, clipping. Windows and learning
rates come from lama, so that both do the same work. Generation has keys and values in buffers of a fixed
size, as in gpt-fast, so that torch.compile sees one shape.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from lama.models.gpt import GPTConfig
from lama.rotary import Rope
from lama.training.loop import Batches
from lama.training.schedule import learning_rate
from lama.training.settings.base import TrainingConfig

ACTIVATIONS = {
    "gelu": functional.gelu,
    "gelu_new": functional.gelu,  # exact, as in nanoGPT: PyTorch's tanh takes longer on a CPU
    "silu": functional.silu,
}


def new_norm(shape: GPTConfig) -> nn.Module:
    if shape.norm_kind == "rms":
        return nn.RMSNorm(shape.d_model, shape.norm_epsilon)
    return nn.LayerNorm(shape.d_model, shape.norm_epsilon, bias=shape.bias)


def rope_table(shape: GPTConfig) -> Tensor:
    """Row p has the cosines, then the sines, of position p: (context_length, d_head)."""
    angles = np.arange(shape.context_length)[:, None] * Rope(shape.d_head, shape.rope_theta).frequencies()
    return torch.from_numpy(np.concatenate([np.cos(angles), np.sin(angles)], 1).astype(np.float32))


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Rotate number i of a head, (B, H, T, d), with number i + d / 2, by the cosines and sines of `table`."""
    (cos, sin), (first, second) = table.chunk(2, -1), x.float().chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).type_as(x)


class Block(nn.Module):
    def __init__(self, shape: GPTConfig, dropout: float):
        super().__init__()
        self.dropout, self.d_head, self.grouped = dropout, shape.d_head, shape.n_heads > shape.n_kv_heads
        self.widths = [n * shape.d_head for n in (shape.n_heads, shape.n_kv_heads, shape.n_kv_heads)]
        self.activation = ACTIVATIONS[shape.activation]
        self.ln1, self.ln2 = new_norm(shape), new_norm(shape)
        self.qkv = nn.Linear(shape.d_model, sum(self.widths), shape.bias)
        self.out = nn.Linear(self.widths[0], shape.d_model, shape.bias)
        self.gate = nn.Linear(shape.d_model, shape.d_mlp, shape.bias) if shape.gated else None
        self.up = nn.Linear(shape.d_model, shape.d_mlp, shape.bias)
        self.down = nn.Linear(shape.d_mlp, shape.d_model, shape.bias)
        self.register_buffer("cache", None, persistent=False)

    def forward(self, x: Tensor, table: Tensor | None, positions: Tensor | None = None) -> Tensor:
        """x, (B, T, d_model), through the block; with `positions`, (T,), those of its tokens in the cache."""
        rate = self.dropout if self.training else 0.0
        x = x + functional.dropout(self.attended(self.ln1(x), table, positions, rate), rate)
        return x + functional.dropout(self.mlp(self.ln2(x)), rate)

    def mlp(self, x: Tensor) -> Tensor:
        up = self.up(x)
        return self.down(self.activation(up) if self.gate is None else self.activation(self.gate(x)) * up)

    def attended(self, x: Tensor, table: Tensor | None, positions: Tensor | None, rate: float) -> Tensor:
        parts = self.qkv(x).split(self.widths, dim=-1)
        q, k, v = (part.unflatten(-1, (-1, self.d_head)).transpose(1, 2) for part in parts)
        if table is not None:
            q, k = rotate(q, table), rotate(k, table)
        mask = None
        if positions is not None:
            self.cache[0].index_copy_(2, positions, k)
            self.cache[1].index_copy_(2, positions, v)
            if x.shape[1] == 1:  # a prompt is alone in the cache
                k, v = self.cache[0], self.cache[1]
                mask = (torch.arange(k.shape[2], device=x.device) <= positions)[None]  # (1, S)
        z = functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=rate, is_causal=mask is None, enable_gqa=self.grouped
        )  # (B, H, T, d_head)
        return self.out(z.transpose(1, 2).flatten(2))


class GPT(nn.Module):
    """A GPT that maps inputs and targets, (B, T) each, to the mean cross-entropy."""

    def __init__(self, shape: GPTConfig, dropout: float = 0.0):
        super().__init__()
        known = shape.positions in ("learned", "rope") and shape.activation in ACTIVATIONS
        if not shape.tied or shape.norm != "pre" or not known:
            raise ValueError(f"the peer must be tied, pre-norm, with learned positions or rope; got {shape}")
        self.dropout, self.shape = dropout, shape
        self.embed = nn.Embedding(shape.vocab_size, shape.d_model)
        learned = shape.positions == "learned"
        self.pos_embed = nn.Embedding(shape.context_length, shape.d_model) if learned else None
        self.blocks = nn.ModuleList(Block(shape, dropout) for _ in range(shape.n_layers))
        self.ln_final = new_norm(shape)
        self.register_buffer("table", None if learned else rope_table(shape), persistent=False)
        for name, p in self.named_parameters():
            if p.ndim >= 2:
                residual = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * shape.n_layers) if residual else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        logits = functional.linear(self.hidden(inputs), self.embed.weight)
        return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def hidden(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        x, table = self.embed(tokens), None
        at = slice(tokens.shape[1]) if positions is None else positions
        if self.pos_embed is None:
            table = self.table[at]
        else:
            x = x + self.pos_embed.weight[at]
        x = functional.dropout(x, self.dropout, self.training)
        for block in self.blocks:
            x = block(x, table, positions)
        return self.ln_final(x)

    def new_caches(self, rows: int, length: int) -> None:
        """Give each block keys and values: (2, rows, n_kv_heads, length, d_head)."""
        shape, weight = (2, rows, self.shape.n_kv_heads, length, self.shape.d_head), self.embed.weight
        for block in self.blocks:
            block.cache = weight.new_zeros(shape)

    def logits(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """The logits, (B, vocab_size), after the last of `tokens`, (B, T): one, or a prompt from 0 on."""
        return functional.linear(self.hidden(tokens, positions)[:, -1], self.embed.weight)

    def next_token(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """The likeliest token, (B, 1), after these."""
        return self.logits(tokens, positions).argmax(-1, keepdim=True)


class Generator:
    """Greedy generation in bfloat16 by a compiled model, with the functions of bench_engines.py's engines."""

    def __init__(self, shape: GPTConfig, device: str):
        self.device = device
        self.model = GPT(shape).to(device, torch.bfloat16).eval()
        if self.model.table is not None:  # in float32
            self.model.table = rope_table(shape).to(device)
        with torch.no_grad():
            self.model.new_caches(1, shape.context_length)
        graphs = {"mode": "reduce-overhead"} if device == "cuda" else {}
        self.compiled = torch.compile(self.model.next_token, fullgraph=True, dynamic=False, **graphs)

    @torch.no_grad()
    def prefill(self, tokens: list[int], compiled: bool = True) -> float:
        began = time.perf_counter()
        fed, positions = torch.tensor([tokens]).to(self.device), torch.arange(len(tokens), device=self.device)
        self.token = (self.compiled if compiled else self.model.next_token)(fed, positions).clone()
        self.token.item()
        return time.perf_counter() - began

    @torch.no_grad()
    def decode(self, tokens: list[int], n: int) -> tuple[float, list[int]]:
        self.prefill(tokens, compiled=False)
        positions, made = torch.tensor([len(tokens)]).to(self.device), [self.token]
        began = time.perf_counter()
        for _ in range(n):
            torch.compiler.cudagraph_mark_step_begin()
            made.append(self.compiled(made[-1], positions).clone())
            positions += 1
        found = torch.cat(made).flatten().tolist()  # waits for the GPU
        return time.perf_counter() - began, found


@dataclass
class Trainer:
    """Iterates over training steps: yields the loss and the gradient's norm of each."""

    shape: GPTConfig
    batches: Batches
    config: TrainingConfig
    compiled: bool = False
    device: str = "cpu"

    def __post_init__(self) -> None:
        torch.manual_seed(self.config.seed)
        self.model = GPT(self.shape, self.config.dropout).to(self.device)
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
        tokens = (torch.from_numpy(part).long().to(self.device) for part in (inputs, targets))
        with torch.autocast(self.device, dtype=dtype, enabled=dtype != torch.float32):
            return self.function(*tokens)

    def evaluate(self, windows: tuple[np.ndarray, np.ndarray], batch_size: int) -> float:
        """The mean loss over windows, (N, T) each, in whole batches only, as in lama's Evaluator."""
        self.model.eval()
        ends = range(batch_size, len(windows[0]) + 1, batch_size)
        with torch.no_grad():
            losses = [self.loss(*(part[end - batch_size : end] for part in windows)).item() for end in ends]
        self.model.train()
        return math.fsum(losses) / len(losses)
