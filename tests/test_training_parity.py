"""Ten training steps of lama's from a GPT-2 checkpoint are PyTorch's: losses, gradient norms, and the weights
in the end.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference import random_gpt2
from test_gpt2_parity import SHAPES
from tinygrad.nn.state import get_state_dict

from lama.checkpoints import load_model
from lama.checkpoints.gpt2 import TRANSPOSED, gpt2_name
from lama.training.loop import Trainer
from lama.training.settings.base import TrainingConfig

TOLERANCE = 1e-4  # of losses in nats, of norms in shares; measured: 2e-6 and 1e-6 at most
# At most; 1e-6 in the mean. Measured: 8e-5, where AdamW divides a gradient of next to nothing by its size,
# and 2e-7.
OF_WEIGHTS = 1e-3
STEPS, WARMUP, PEAK, FLOOR = 10, 3, 1e-2, 1e-3
NO_DROPOUT = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}


@dataclass
class Trace:
    losses: list[float]
    norms: list[float]
    weights: dict[str, np.ndarray]
    """At the end, under GPT-2's names and in its layout."""


@pytest.fixture(scope="module")
def transformers() -> Any:
    """transformers, with PyTorch below it."""
    pytest.importorskip("torch", reason="PyTorch is not installed: pip install lama[peers]")
    return pytest.importorskip(
        "transformers", reason="transformers is not installed: pip install lama[peers]"
    )


def one_batch(shape: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Six windows: inputs and the tokens that follow them."""
    windows = (
        np.random.default_rng(7)
        .integers(0, shape["vocab_size"], (6, shape["n_positions"] + 1))
        .astype(np.int32)
    )
    return windows[:, :-1], windows[:, 1:]


def lama_trace(folder: Path, inputs: np.ndarray, targets: np.ndarray, **options: Any) -> Trace:
    config = TrainingConfig(
        steps=STEPS,
        batch_size=len(inputs),
        warmup=WARMUP,
        learning_rate=PEAK,
        min_learning_rate=FLOOR,
        beta2=0.95,
        **options,
    )
    model = load_model(folder)
    steps = list(Trainer(model, lambda step: (inputs, targets), config))
    weights = {gpt2_name(name): p.numpy() for name, p in get_state_dict(model).items()}
    weights = {name: value.T if name.endswith(TRANSPOSED) else value for name, value in weights.items()}
    return Trace([step.loss for step in steps], [step.gradient_norm for step in steps], weights)


def torch_trace(
    transformers: Any,
    folder: Path,
    inputs: np.ndarray,
    targets: np.ndarray,
    label_smoothing: float = 0.0,
    accumulation: int = 1,
) -> Trace:
    """The same in the usual lines of PyTorch."""
    import torch
    from torch.nn.functional import cross_entropy

    model = transformers.GPT2LMHeadModel.from_pretrained(folder).float().train()
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=PEAK, betas=(0.9, 0.95), eps=1e-8)

    def share_of_peak(step: int) -> float:
        done = (step - WARMUP) / (STEPS - 1 - WARMUP)
        cosine = (FLOOR + (PEAK - FLOOR) * (1 + math.cos(math.pi * done)) / 2) / PEAK
        return (step + 1) / WARMUP if step < WARMUP else cosine

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share_of_peak)
    trace = Trace([], [], {})
    for _ in range(STEPS):
        parts = []
        for x, y in zip(np.split(inputs, accumulation), np.split(targets, accumulation), strict=True):
            logits = model(torch.from_numpy(x).long()).logits
            loss = cross_entropy(
                logits.flatten(0, 1), torch.from_numpy(y).long().flatten(), label_smoothing=label_smoothing
            )
            (loss / accumulation).backward()
            parts.append(loss.item())
        trace.losses.append(float(np.mean(parts)))
        trace.norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    trace.weights = {
        name.removeprefix("transformer."): p.detach().numpy() for name, p in model.named_parameters()
    }
    return trace


def assert_same(ours: Trace, theirs: Trace) -> None:
    np.testing.assert_allclose(ours.losses, theirs.losses, atol=TOLERANCE, rtol=0)
    np.testing.assert_allclose(ours.norms, theirs.norms, rtol=TOLERANCE, atol=0)
    # Of PyTorch's steps some were clipped, and it learned.
    assert max(theirs.norms) > 1 and theirs.losses[-1] < 0.65 * theirs.losses[0]
    assert ours.weights.keys() == theirs.weights.keys()
    for name, weight in theirs.weights.items():
        off = np.abs(ours.weights[name] - weight)
        if name.endswith("c_attn.bias"):
            # The same number on all keys changes no softmax: their bias has no gradient but rounding, and of
            # that AdamW makes steps of a whole rate, here and there in other directions.
            off = np.delete(off, np.s_[len(weight) // 3 : 2 * len(weight) // 3])
        assert off.max() < OF_WEIGHTS and off.mean() < OF_WEIGHTS / 1000, name


@pytest.fixture(params=SHAPES)
def shape(request: pytest.FixtureRequest) -> dict[str, Any]:
    return SHAPES[request.param]


def checkpoint(folder: Path, shape: dict[str, Any]) -> Path:
    config = random_gpt2.make_config(**shape, **NO_DROPOUT)
    return random_gpt2.write_folder(folder, config, random_gpt2.make_weights(config, seed=5, std=0.2))


@pytest.mark.peers
def test_ten_training_steps_match_pytorch(shape: dict[str, Any], tmp_path: Path, transformers: Any):
    folder, batch = checkpoint(tmp_path, shape), one_batch(shape)
    assert_same(lama_trace(folder, *batch), torch_trace(transformers, folder, *batch))


@pytest.mark.peers
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"label_smoothing": 0.1}, {"label_smoothing": 0.1}),
        ({"accumulation": 3}, {"accumulation": 3}),
        (
            {"accumulation": 2, "recompute": True, "label_smoothing": 0.2},
            {"accumulation": 2, "label_smoothing": 0.2},
        ),
    ],
    ids=str,
)
def test_ten_training_steps_with_options_match_pytorch(
    ours: dict[str, Any], theirs: dict[str, Any], tmp_path: Path, transformers: Any
):
    folder, batch = checkpoint(tmp_path, SHAPES["gelu_new"]), one_batch(SHAPES["gelu_new"])
    assert_same(lama_trace(folder, *batch, **ours), torch_trace(transformers, folder, *batch, **theirs))
