"""Several texts in a row: what a model learns of them is what it learns of each alone."""

import numpy as np
import pytest
from test_kernels import both, ran  # noqa: F401  (fixtures)
from tinygrad import Tensor
from tinygrad.nn.state import get_state_dict

from lama.data.packing import PackedRows
from lama.dropout import no_dropout
from lama.models.gpt import GPT, GPTConfig
from lama.training.loss import language_model_loss
from lama.training.recompute import blockwise_gradients

T, V = 24, 19
SHAPE = {"vocab_size": V, "context_length": T, "d_model": 24, "n_layers": 1, "n_heads": 4, "d_mlp": 31}
MODELS = {
    "learned positions": {},
    "rope, shared heads, windows": {
        "positions": "rope",
        "n_kv_heads": 2,
        "windows": (5,),
        "norm_kind": "rms",
        "gated": True,
        "qk_norm": "head",
        "bias": False,
    },
}
LENGTHS = [9, 25, 4, 9, 4, 9, 25, 4]  # few, as each is compiled


def texts() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, their ends, and which count."""
    rng = np.random.default_rng(0)
    ids = rng.integers(1, V, sum(LENGTHS)).astype(np.uint8)
    counted = (rng.random(len(ids)) < 0.6).astype(np.uint8)
    return ids, np.cumsum(LENGTHS), counted


def loss_and_gradients(
    model: GPT, arrays: tuple[np.ndarray | None, ...]
) -> tuple[float, dict[str, np.ndarray]]:
    loss = language_model_loss(model, *(None if array is None else Tensor(array) for array in arrays))
    parameters = get_state_dict(model)
    gradients = loss.gradient(*parameters.values())
    Tensor.realize(loss, *gradients)
    return loss.item(), dict(zip(parameters, (g.numpy() for g in gradients), strict=True))


@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
def test_packed_texts_have_the_loss_and_gradients_of_each_alone(both, options):  # noqa: F811
    ids, ends, counted = texts()
    model = GPT(GPTConfig(**SHAPE, **options), seed=1)
    packed = PackedRows(ids, ends, counted, T, seed=3)
    rows = packed.epoch(0)
    assert len(rows) < len(LENGTHS) - 2 and max(map(len, rows)) >= 3
    loss, gradients = loss_and_gradients(model, packed.arrays(rows))
    # The texts of each length, without padding: the sum of their losses, and of their gradients.
    total, sums = 0.0, dict.fromkeys(gradients, 0.0)
    for length in set(LENGTHS):
        places = np.array([end - length for end, n in zip(ends, LENGTHS, strict=True) if n == length])
        places = places[:, None] + np.arange(length)
        inputs, targets = ids[places[:, :-1]].astype(np.int32), ids[places[:, 1:]].astype(np.int32)
        weights = counted[places[:, 1:]].astype(np.float32) * inputs.size
        some, found = loss_and_gradients(model, (inputs, targets, None, weights))
        total += some
        sums = {name: sums[name] + gradient for name, gradient in found.items()}
    n = sum(int(counted[end - length + 1 : end].sum()) for end, length in zip(ends, LENGTHS, strict=True))
    assert loss == pytest.approx(total / n, rel=1e-6)
    for name, gradient in gradients.items():
        np.testing.assert_allclose(gradient, sums[name] / n, atol=2e-6 * np.abs(sums[name] / n).max() + 1e-8)


def test_rows_that_are_not_packed_have_the_same_loss_and_so_have_recomputed_ones():
    ids, ends, counted = texts()
    model = GPT(GPTConfig(**SHAPE, **MODELS["rope, shared heads, windows"]), seed=1)
    losses, gradients = [], []
    for packing in (True, False):
        rows = PackedRows(ids, ends, counted, T, 3, packing)
        arrays = rows.arrays(rows.epoch(0))
        assert packing or [len(row) for row in rows.epoch(0)] == [1] * len(LENGTHS)
        loss, found = loss_and_gradients(model, arrays)
        losses.append(loss)
        gradients.append(found)
        wanted = get_state_dict(model).values()
        again, by_id = blockwise_gradients(model, list(map(Tensor, arrays)), 0.0, no_dropout, 1.0, wanted)
        losses.append(again.item())
        gradients.append({name: by_id[id(p)].numpy() for name, p in get_state_dict(model).items()})
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-6)
    for found in gradients[1:]:
        for name, gradient in found.items():
            most = np.abs(gradients[0][name]).max()
            np.testing.assert_allclose(gradient, gradients[0][name], atol=2e-6 * most + 1e-8)


def test_every_epoch_has_every_text_once_in_an_order_of_its_own():
    rng = np.random.default_rng(1)
    lengths = rng.integers(2, 65, size=5000)
    ends = np.cumsum(lengths)
    ids, counted = np.zeros(ends[-1], np.uint8), np.ones(ends[-1], np.uint8)
    rows = PackedRows(ids, ends, counted, 64, seed=5)
    epochs = [rows.epoch(i) for i in range(3)]
    for epoch in epochs:
        assert sorted(i for row in epoch for i in row) == list(range(5000))
        assert all(sum(lengths[i] - 1 for i in row) <= 64 for row in epoch)
        assert (lengths - 1).sum() / (64 * len(epoch)) > 0.97  # how full they are
    assert epochs[0] != epochs[1] != epochs[2]
    assert PackedRows(ids, ends, counted, 64, seed=5).epoch(1) == epochs[1]
    assert PackedRows(ids, ends, counted, 64, seed=6).epoch(1) != epochs[1]
    # Batches go through the epochs one after another, whichever is asked for first.
    flat = [row for epoch in epochs for row in epoch]
    other = PackedRows(ids, ends, counted, 64, seed=5)
    for number in (len(flat) - 1, 0, len(epochs[0])):
        assert other.row(number) == flat[number]
    assert rows.steps(2, 7) == -(-(len(epochs[0]) + len(epochs[1])) // 7)
