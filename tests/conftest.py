"""What every test run needs: lama's choice of a device, and a compiler where that is the CPU."""

from pathlib import Path

import pytest


def pytest_sessionstart(session: pytest.Session) -> None:
    # Imported here and not above: jaxtyping's import hook must be in place before anything of lama is
    # imported. Opened before a test asks tinygrad for its default, which may be OpenCL on this processor.
    from lama.runtime.device import open_device

    open_device()


@pytest.fixture(scope="session")
def tiny_gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random GPT-2 of one layer and GPT-2's vocabulary, to be read only."""
    from reference import random_gpt2

    path = tmp_path_factory.mktemp("tiny-gpt2")
    config = random_gpt2.make_config(vocab_size=50257, n_embd=8, n_layer=1, n_head=2, n_positions=32)
    random_gpt2.write_folder(path, config, random_gpt2.make_weights(config))
    return path
