"""Prefixes on disk: found again by a new process, bounded, and never trusted."""

import warnings
from pathlib import Path

import numpy as np
import pytest
from helpers import fill
from test_engine import drained

from lama.errors import LamaError, LamaWarning
from lama.generation.decoder import Runner
from lama.generation.engine import Engine, Request
from lama.generation.prefix_store import PrefixStore
from lama.models.gpt import GPT, GPTConfig

TEXT = list(range(5, 95))


@pytest.fixture(scope="module")
def model() -> GPT:
    made = GPT(GPTConfig(97, 120, d_model=32, n_layers=2, n_heads=2), seed=None)
    fill(made)
    return made


def engine_on(folder: Path, model: GPT, most: int = 10**8, rows: int = 1, spare: int = 0) -> Engine:
    runner = Runner(model, rows + spare)
    return Engine(model, rows, runner=runner, reuse=True, store=PrefixStore(folder, runner, most))


def answer(engine: Engine, prompt: list[int]) -> tuple[int, list[int | None]]:
    """The tokens of the prompt that were held, and the new ones."""
    number = engine.submit(Request(prompt, 5))
    events = [event for event in drained(engine) if event.request == number]
    return events[0].cached_tokens, [event.token for event in events]


def test_a_new_engine_finds_what_an_earlier_one_computed(model, tmp_path):
    first = engine_on(tmp_path, model)
    _, expected = answer(first, [*TEXT, 1])
    first.close()
    for _ in range(2):
        again = engine_on(tmp_path, model)
        assert answer(again, [*TEXT, 1]) == (len(TEXT), expected)
        assert answer(again, [*TEXT[:80], 1])[0] == 80
        again.close()
    assert len(list(tmp_path.glob("*/*.safetensors"))) == 2


def test_a_row_that_is_given_up_is_written(model, tmp_path):
    engine = engine_on(tmp_path, model)
    answer(engine, TEXT)
    answer(engine, TEXT[::-1])
    engine.close()
    again = engine_on(tmp_path, model)
    assert answer(again, [*TEXT, 1])[0] >= len(TEXT)
    assert answer(again, [*TEXT[::-1], 1])[0] >= len(TEXT)


def test_a_longer_text_replaces_its_beginning(model, tmp_path):
    for text in (TEXT[:70], TEXT):
        engine = engine_on(tmp_path, model)
        engine.submit(Request(text, 1))
        list(drained(engine))
        engine.close()
    (path,) = tmp_path.glob("*/*.safetensors")
    short = engine_on(tmp_path, model)
    assert short.store.longest(np.array(TEXT))[0] == len(TEXT) - 1
    assert path.exists()


def test_the_folder_is_bounded_and_the_oldest_goes(model, tmp_path):
    rng = np.random.default_rng(0)
    texts = [rng.integers(97, size=90).tolist() for _ in range(4)]
    size = 2 * 2 * 2 * 90 * 16 * 4
    for text in texts:
        engine = engine_on(tmp_path, model, most=int(2.5 * size))
        engine.submit(Request(text, 1))
        list(drained(engine))
        engine.close()
    held = engine_on(tmp_path, model)
    assert [held.store.longest(np.array(text))[0] > 80 for text in texts] == [False, False, True, True]


@pytest.mark.parametrize("damage", ["cut", "flip numbers", "flip tokens", "tokens", "garbage"])
def test_damaged_files_are_dropped_with_a_line(model, tmp_path, damage):
    engine = engine_on(tmp_path, model)
    _, expected = answer(engine, TEXT)
    engine.close()
    (path,) = tmp_path.glob("*/*.safetensors")
    content = bytearray(path.read_bytes())
    if damage == "cut":
        del content[len(content) // 2 :]
    elif damage.startswith("flip"):  # the tokens are the last
        content[-100 if damage == "flip tokens" else -2000] ^= 1
    elif damage == "tokens":
        from safetensors.numpy import save

        content = bytearray(save({"tokens": np.zeros(500, np.int32), "cache": np.zeros(3, np.float32)}))
    else:
        content = bytearray(b"\xff" * 1000)
    path.write_bytes(content)
    with pytest.warns(LamaWarning, match="removed a damaged file of prefixes"):
        again = engine_on(tmp_path, model)
        assert answer(again, TEXT) == (0, expected)
    assert not path.exists()
    again.close()


def test_other_weights_have_another_folder(model, tmp_path):
    other = GPT(model.config, seed=1)
    assert Runner(model).digest() == Runner(model).digest() != Runner(other).digest()


def test_a_folder_that_cannot_be_written_is_one_line(model, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(LamaError, match=r"the folder of --cache-dir must be writable; got .*file"):
        engine_on(tmp_path / "file", model)


def test_without_room_nothing_is_written(model, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine = engine_on(tmp_path, model, most=1000)
        answer(engine, TEXT)
        engine.close()
    assert not list(tmp_path.glob("*/*.safetensors"))
