"""A step kept on the disk: the same numbers, nothing captured, and never for a model or a code that it was
not made by.
"""

from typing import Any

import numpy as np
import pytest
from tinygrad import Context, Tensor
from tinygrad.nn.state import get_state_dict

from lama.generation import Runner
from lama.models.gpt import GPT, GPTConfig
from lama.runtime import replay as plan
from lama.runtime.kernel import is_fast

CONFIG = GPTConfig(vocab_size=23, context_length=19, d_model=22, n_layers=2, n_heads=2)
PROMPT = np.array([[3, 1, 4, 1, 5]])


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """tinygrad's cache, empty."""
    if not is_fast(Tensor.empty(1)):
        pytest.skip("steps are kept where C kernels run")
    kept: dict[str, Any] = {}
    monkeypatch.setattr(plan, "diskcache_get", lambda table, key: kept.get(key))
    monkeypatch.setattr(plan, "diskcache_put", lambda table, key, value: kept.setdefault(key, value))
    return kept


def logits(model: GPT, batch: int = 1, jit: bool = True) -> np.ndarray:
    """After a prompt, and after each of some tokens."""
    decoder = Runner(model, batch, jit)
    rows = [decoder.prefill(np.repeat(PROMPT, batch, 0))]
    rows += [decoder.decode(np.arange(batch) + t) for t in (9, 2, 6)]
    return np.array(rows)


def no_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("a step that was on the disk was captured again")

    monkeypatch.setattr(Runner, "_computed", fail)


@pytest.mark.parametrize("batch", [1, 3])
def test_step_from_the_disk_gives_the_numbers_of_the_captured_one(
    disk: dict[str, Any], monkeypatch: pytest.MonkeyPatch, batch: int
):
    captured = logits(GPT(CONFIG), batch)
    assert len(disk) == 2
    np.testing.assert_allclose(captured, logits(GPT(CONFIG), batch, jit=False), rtol=1e-4, atol=1e-5)
    no_capture(monkeypatch)
    np.testing.assert_array_equal(logits(GPT(CONFIG), batch), captured)


@pytest.mark.parametrize(("jit", "kept"), [(0, 0), (2, 2)])
def test_tinygrads_switch_changes_no_number(disk: dict[str, Any], jit: int, kept: int):
    """JIT=0 captures nothing, JIT=2 captures without a graph."""
    expected = logits(GPT(CONFIG))
    disk.clear()
    with Context(JIT=jit):
        np.testing.assert_allclose(logits(GPT(CONFIG)), expected, rtol=1e-4, atol=1e-5)
    assert len(disk) == kept


def test_step_from_the_disk_reads_the_weights_of_the_model_at_hand(
    disk: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    first, expected = logits(GPT(CONFIG)), logits(GPT(CONFIG, seed=1), jit=False)
    no_capture(monkeypatch)
    np.testing.assert_allclose(logits(GPT(CONFIG, seed=1)), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(logits(GPT(CONFIG)), first)


def test_step_is_not_that_of_another_model_code_or_number_of_threads(
    disk: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    logits(GPT(CONFIG))
    logits(GPT(GPTConfig(**{**vars(CONFIG), "activation": "relu"})))  # the same shapes
    assert len(disk) == 4
    model = GPT(CONFIG)
    for parameter in get_state_dict(model).values():
        parameter.replace(parameter.cast("half").contiguous().realize())
    logits(model)
    assert len(disk) == 6
    monkeypatch.setattr(plan, "threads", lambda: 77)
    logits(GPT(CONFIG))
    assert len(disk) == 8
    monkeypatch.setattr(plan, "code_digest", lambda: "another code")
    no_capture(monkeypatch)
    with pytest.raises(AssertionError, match="captured again"):
        logits(GPT(CONFIG))


def test_step_that_reads_what_nobody_gives_is_not_kept(disk: dict[str, Any]):
    weight, constant = (Tensor(np.full((2, 3), x, np.float32)).realize() for x in (2, 5))
    for given, kept in (({"w": weight}, 0), ({"w": weight, "c": constant}, 1)):
        inputs = {"tokens": (2, 3), "n": (1,)}
        step = plan.CachedStep(
            lambda tokens, n: (tokens * weight + constant + n).realize(), inputs, given, "test"
        )
        for value in (1, 4):
            found = step(tokens=np.array([[1, 2, 3], [4, 5, 6]]), n=np.array([value]))
            assert found.tolist() == [
                [7 + value, 9 + value, 11 + value],
                [13 + value, 15 + value, 17 + value],
            ]
        assert len(disk) == kept


def test_what_made_a_step_is_lamas_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Any):
    monkeypatch.setattr(plan, "source_digest", plan.source_digest.__wrapped__)
    before = plan.code_digest.__wrapped__()
    assert before == plan.code_digest.__wrapped__()
    (tmp_path / "kernels").mkdir()
    monkeypatch.setattr(plan, "__file__", str(tmp_path / "kernels" / "plan.py"))
    assert plan.code_digest.__wrapped__() != before


def test_step_like_another_shares_its_calls_and_memory_but_not_its_state(disk: dict[str, Any]):
    steps: list[plan.CachedStep] = []
    captured: list[float] = []
    for value, like in ((2.0, None), (3.0, 0), (4.0, 0)):
        weight = Tensor(np.full(7, value, np.float32)).realize()

        def function(weight: Tensor = weight, value: float = value) -> Tensor:
            captured.append(value)
            return ((weight * 2).contiguous() + 1).realize()

        steps.append(
            plan.CachedStep(function, {}, {"w": weight}, "test", None if like is None else steps[like])
        )
        assert steps[-1]().tolist() == [2 * value + 1] * 7
    assert [step().tolist()[0] for step in steps] == [5, 7, 9] and captured == [2]
    other = plan.CachedStep(lambda: (weight - 1).realize(), {}, {"w": weight}, "another", steps[0])
    assert other().tolist() == [3] * 7
