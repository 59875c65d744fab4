"""Dropout: how many it keeps, which, and that the C kernel and its plain twin agree in every bit."""

import numpy as np
import pytest
from helpers import normal
from test_kernels import both, needs_c, ran, results  # noqa: F401  (fixtures)
from tinygrad import Tensor, TinyJit, dtypes

from lama.ops import dropout
from lama.runtime import kernel as program


def key_of(number: int, row: int = 0) -> Tensor:
    return Tensor([number, row], dtype=dtypes.uint32).realize()


def mix(x: int) -> int:
    x = (x ^ x >> 16) * 0x7FEB352D % 2**32
    x = (x ^ x >> 15) * 0x846CA68B % 2**32
    return x ^ x >> 16


def keeps(i: int, rate: float, key: int, site: int) -> bool:
    """The formula of the docstring, in plain Python."""
    seed = mix((key + site * 0x9E3779B9) % 2**32)
    return mix((mix(i ^ seed) + seed) % 2**32) >= int(rate * 2**32)


@pytest.mark.parametrize("shape", [(3, 5, 7), (2, 16), (3,)])
@pytest.mark.parametrize(
    ("rate", "key", "site"), [(0.1, 0, 0), (0.25, 2**32 - 1, 2**32 - 1), (0.9, 123456789, 17)]
)
def test_dropout_and_its_gradient_follow_the_formula(both, shape, rate, key, site):  # noqa: F811
    x, dy = Tensor(normal(*shape)), normal(*shape, seed=1)
    y, dx = results(dropout(x, rate, key_of(key), site), dy, x)
    mask = np.array([keeps(i, rate, key, site) for i in range(y.size)]).reshape(shape)
    scale = np.float32(1 / (1 - rate))
    assert (y == np.where(mask, x.numpy() * scale, 0)).all()
    assert (dx == np.where(mask, dy * scale, 0)).all()


def test_dropout_keeps_its_share_and_each_place_key_and_site_on_its_own(both):  # noqa: F811
    n, rate = 200_003, 0.2
    ones = Tensor.ones(n).contiguous().realize()
    masks = np.array(
        [
            dropout(ones, rate, key_of(key), site).numpy() > 0
            for key, site in ((0, 0), (0, 1), (1, 0), (1, 1), (2, 0))
        ]
    )
    deviation = np.sqrt(n * rate * (1 - rate))
    assert (np.abs(masks.sum(1) - n * (1 - rate)) < 4 * deviation).all()
    centred = masks - (1 - rate)
    for i, mask in enumerate(centred):
        others = [centred[j] for j in range(len(centred)) if j != i] + [
            np.roll(mask, shift) for shift in (1, 2, 64, 4096)
        ]
        assert (np.abs(np.array(others) @ mask) < 5 * n * rate * (1 - rate) / np.sqrt(n)).all()


@needs_c
def test_dropout_kernel_equals_its_plain_twin_bit_for_bit(ran, monkeypatch):  # noqa: F811
    x, key = Tensor(normal(41, 53)), key_of(987654321)
    fast = dropout(x, 0.3, key, 5).numpy()
    monkeypatch.setattr(program, "_reference", lambda: True)
    assert (dropout(x, 0.3, key, 5).numpy() == fast).all()
    assert len(ran) == 1


def test_parts_of_a_batch_drop_what_the_whole_batch_drops(both):  # noqa: F811
    x = normal(7, 5, 11)
    whole = dropout(Tensor(x), 0.4, key_of(9), 2).numpy()
    parts = [
        dropout(Tensor(x[start:end]), 0.4, key_of(9, start), 2).numpy() for start, end in ((0, 3), (3, 7))
    ]
    assert (np.concatenate(parts) == whole).all() and (whole == 0).any()


def test_dropout_under_jit_follows_the_key():
    @TinyJit
    def dropped(x: Tensor, key: Tensor) -> Tensor:
        return dropout(x, 0.5, key, 3).realize()

    x = Tensor(normal(7, 11)).realize()
    outs = [dropped(x, key_of(number)).numpy() for number in (1, 2, 3, 4, 1)]
    assert all((outs[i] != outs[j]).any() for i in range(4) for j in range(i))
    assert (outs[4] == outs[0]).all()


def test_dropout_at_rate_zero_changes_nothing():
    x = normal(3, 37)
    assert (dropout(Tensor(x), 0.0, key_of(1), 0).numpy() == x).all()


@pytest.mark.parametrize("rate", [-0.1, 1.0])
def test_dropout_names_a_rate_that_is_none(rate):
    with pytest.raises(ValueError, match=f"rate must be at least 0 and below 1; got rate={rate}"):
        dropout(Tensor(normal(3)), rate, key_of(0), 0)


@needs_c
def test_dropout_kernel_serves_plain_float32_on_the_cpu_and_nothing_else(ran):  # noqa: F811
    x, key = Tensor(normal(3, 37)), key_of(1)
    dropout(x, 0.5, key, 0)
    assert len(ran) == 1 and ran.pop().startswith("lama_dropout_")
    dropout(x.cast(dtypes.float16), 0.5, key, 0)
    dropout(Tensor.empty(3, 37, device="NULL"), 0.5, Tensor.empty(2, dtype=dtypes.uint32, device="NULL"), 0)
    assert not ran
