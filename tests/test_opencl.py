"""A device that is not the CPU: OpenCL, which Debian's `pocl-opencl-icd` brings for every processor.

The default stays the CPU; generation, training and the way between two devices are right on the other one.
"""

import os
import subprocess
import sys

import numpy as np
import pytest
from helpers import TOKENS
from tinygrad import Device, Tensor
from tinygrad.nn.state import get_state_dict

import lama
from lama.cli import main
from lama.generation import generate_tokens
from lama.models.gpt import GPT, GPTConfig
from lama.runtime.device import use_device
from lama.training.loop import Trainer, language_model_batches
from lama.training.replica import copy_to
from lama.training.settings.base import TrainingConfig

SHAPE = GPTConfig(vocab_size=23, context_length=11, d_model=12, n_layers=2, n_heads=3)
PROMPTS = ["In the beginning God", "And"]


@pytest.fixture(scope="module", autouse=True)
def opencl() -> None:
    try:
        Tensor([1.0], device="CL").realize()
    except Exception:
        pytest.skip("no OpenCL device is here: apt-get install pocl-opencl-icd")


def python(code: str, **environment: str) -> str:
    clean = {name: value for name, value in os.environ.items() if name != "DEV"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=clean | environment, capture_output=True, text=True, check=True
    )
    return done.stdout


@pytest.mark.parametrize(("named", "chosen"), [({}, "CPU"), ({"DEV": "CL"}, "CL")])
def test_opencl_is_used_only_where_it_is_named(named, chosen):
    code = (
        "from lama.runtime.device import open_device; open_device(); from tinygrad import Device; "
        "print(Device.DEFAULT)"
    )
    assert python(code, **named) == f"{chosen}\n"


# A last bit that differs may round an activation to the next of its 255 steps.
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("int8", 1e-2)])
def test_generation_gives_the_tokens_of_the_cpu(dtype, tolerance):
    models = [lama.load("lama-bpe", dtype=dtype, device=device) for device in ("CPU", "CL")]
    prompts = [models[0][1].encode(prompt) for prompt in PROMPTS]
    tokens = [list(generate_tokens(model, prompts, max_new_tokens=12)) for model, _ in models]
    assert tokens[0] == tokens[1]
    logits = [model(Tensor([prompts[0]])).numpy() for model, _ in models]  # the tokens are handed to OpenCL
    np.testing.assert_allclose(logits[1], logits[0], rtol=0, atol=tolerance * np.abs(logits[0]).max())


def test_commands_take_the_device(capsys):
    texts = []
    for device in ("CPU", "CL"):
        with_device(["generate", "-m", "lama-bpe", "-p", PROMPTS[0], "-n", "5", "--temperature", "0"], device)
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != ""


def with_device(arguments: list[str], device: str) -> None:
    previous = Device.DEFAULT
    try:
        assert main([*arguments, "--device", device]) == 0
    finally:
        use_device(previous)


def trained(*devices: str) -> tuple[list[float], dict[str, np.ndarray]]:
    """Losses and weights of three steps, dropout on."""
    config = TrainingConfig(steps=3, batch_size=6, learning_rate=1e-2, warmup=1, dropout=0.3)
    data = np.random.default_rng(0).integers(0, SHAPE.vocab_size, 211)
    previous = Device.DEFAULT
    use_device(devices[0])
    try:
        model = GPT(SHAPE)
        trainer = Trainer(
            model, language_model_batches(data, config, SHAPE.context_length), config, devices=devices
        )
        return [step.loss for step in trainer], {name: p.numpy() for name, p in get_state_dict(model).items()}
    finally:
        use_device(previous)


@pytest.fixture(scope="module")
def on_cpu() -> tuple[list[float], dict[str, np.ndarray]]:
    return trained("CPU")


@pytest.mark.parametrize("devices", [("CL",), ("CPU", "CL"), ("CL", "CPU")], ids=" and ".join)
def test_training_steps_are_those_of_the_cpu(devices, on_cpu):
    losses, weights = trained(*devices)
    np.testing.assert_allclose(losses, on_cpu[0], atol=1e-5)
    for name, value in weights.items():
        # Where a gradient is only rounding, AdamW turns it into at most one learning rate a step.
        np.testing.assert_allclose(value, on_cpu[1][name], atol=2e-2, err_msg=name)
        assert np.abs(value - on_cpu[1][name]).mean() < 1e-5, name


def test_weights_and_tokens_move_between_devices():
    model = GPT(SHAPE)
    there = copy_to(model, "CL")
    assert {p.device for p in get_state_dict(there).values()} == {"CL"}
    tokens = TOKENS % SHAPE.vocab_size
    expected = model(Tensor(tokens)).numpy()
    for device in ("CPU", "CL"):
        np.testing.assert_allclose(there(Tensor(tokens, device=device)).numpy(), expected, atol=1e-5)
        np.testing.assert_allclose(model(Tensor(tokens, device=device)).numpy(), expected, atol=1e-5)
