"""Trackers: what reaches TensorBoard's files, Weights & Biases and Trackio."""

import struct
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from lama.errors import LamaError, UsageError
from lama.training.trackers import PACKAGES, open_tracker

CONFIG = {"steps": 3, "corpus": ("a.txt",), "learning_rate": 2e-3}


def track(kind: str, folder: Path) -> None:
    tracker = open_tracker(kind, folder, "shakespeare", CONFIG)
    tracker.log(1, {"loss": 4.5, "mfu": None})
    tracker.log(2, {"loss": 3.25, "mfu": 0.5})
    tracker.log(2, {"validation_loss": 3.5})
    tracker.log(3, {"mfu": None})
    tracker.close()


@pytest.fixture
def stand_in(monkeypatch):
    """A module in the place of wandb or trackio that remembers its calls."""

    def install(name: str) -> list[tuple[object, ...]]:
        calls: list[tuple[object, ...]] = []
        module = ModuleType(name)
        run = SimpleNamespace(
            log=lambda numbers, step: calls.append(("log", numbers, step)),
            finish=lambda: calls.append(("finish",)),
        )

        def init(**options):
            calls.append(("init", options))
            return run

        module.init = init
        monkeypatch.setitem(sys.modules, name, module)
        return calls

    return install


LOGGED = [
    ("log", {"loss": 4.5}, 1),
    ("log", {"loss": 3.25, "mfu": 0.5}, 2),
    ("log", {"validation_loss": 3.5}, 2),
    ("finish",),
]


def test_wandb_gets_a_run_with_settings_and_its_numbers(stand_in, tmp_path):
    calls = stand_in("wandb")
    track("wandb", tmp_path / "run")
    options = {"project": "lama", "name": "shakespeare", "dir": str(tmp_path / "run"), "config": CONFIG}
    assert calls == [("init", options), *LOGGED]
    assert (tmp_path / "run").is_dir()


def test_trackio_gets_a_run_with_settings_and_its_numbers(stand_in, tmp_path):
    calls = stand_in("trackio")
    track("trackio", tmp_path)
    assert calls == [("init", {"project": "lama", "name": "shakespeare", "config": CONFIG}), *LOGGED]


def records(path: Path) -> list[bytes]:
    """Of a TFRecord file: eight bytes of length, four of checksum, the record, four of checksum."""
    content, found = path.read_bytes(), []
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        found.append(content[12 : 12 + length])
        content = content[16 + length :]
    return found


def test_tensorboard_finds_settings_and_numbers_in_the_event_file(tmp_path):
    pytest.importorskip(
        "tensorboardX", reason="the package tensorboardX (extra `tensorboard`) is not installed"
    )
    from tensorboardX.proto.event_pb2 import Event

    track("tensorboard", tmp_path)
    (file,) = (tmp_path / "tensorboard").iterdir()
    events = [Event.FromString(record) for record in records(file)]
    values = [(event.step, value) for event in events for value in event.summary.value]
    scalars = [
        (step, value.tag, value.simple_value) for step, value in values if value.HasField("simple_value")
    ]
    assert scalars == [(1, "loss", 4.5), (2, "loss", 3.25), (2, "mfu", 0.5), (2, "validation_loss", 3.5)]
    (text,) = [value.tensor.string_val[0].decode() for _, value in values if value.HasField("tensor")]
    assert '\n     "learning_rate": 0.002\n' in text


def test_a_tracker_that_is_not_installed_says_how_to_get_it(tmp_path, monkeypatch):
    for kind, package in PACKAGES.items():
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(
            LamaError,
            match=rf"^tracking with {kind} needs the package {package} \(.*\)\. Run: pip install {package}$",
        ):
            open_tracker(kind, tmp_path, "run", {})


def test_a_tracker_that_does_not_begin_says_why_in_one_line(tmp_path, monkeypatch):
    module = ModuleType("wandb")

    def init(**_):
        raise RuntimeError("No key.\nSee the documentation")

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    with pytest.raises(
        LamaError, match=r"^wandb could not start: No key\. Correct this, or leave --track out$"
    ):
        open_tracker("wandb", tmp_path, "run", {})


def test_an_unknown_tracker_is_refused_by_name(tmp_path):
    with pytest.raises(UsageError, match="must be one of tensorboard, wandb, trackio; got 'paper'"):
        open_tracker("paper", tmp_path, "run", {})


def test_trackers_import_neither_their_libraries_nor_tinygrad_before_they_are_asked_for():
    code = (
        f"import sys, lama.training.trackers; assert not {{'tinygrad', *{list(PACKAGES.values())}}} "
        f"& set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
