"""Finding models: paths, `weights/`, the cache, and a hub that sometimes misbehaves (a server on
127.0.0.1).
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from reference import random_gpt2
from reference.hub_server import COMMIT, Hub

from lama.checkpoints import NotFound, find, hub, load, load_model
from lama.errors import LamaError

CONFIG = random_gpt2.make_config(**random_gpt2.TINY)
WEIGHTS = random_gpt2.make_weights(CONFIG)
REPOSITORY = "openai-community/gpt2"


@pytest.fixture(autouse=True)
def nothing_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty cache, no weights, and a hub that nobody answers at."""
    from huggingface_hub import constants

    for name in ("cwd", "repository"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    monkeypatch.setattr(hub, "REPOSITORY", tmp_path / "repository")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    use(monkeypatch, "http://127.0.0.1:9")


def use(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}"
    )


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with a tiny gpt2."""
    server = Hub()
    use(monkeypatch, server.url)
    folder = random_gpt2.write_folder(tmp_path / "source", CONFIG, random_gpt2.with_prefix(WEIGHTS))
    server.repositories[REPOSITORY] = {path.name: path.read_bytes() for path in folder.iterdir()} | {
        "vocab.json": b"{}",
        "README.md": b"hello",
        "pytorch_model.bin": b"not needed",
        "onnx/model.onnx": b"not needed",
    }
    yield server
    server.close()


def test_find_takes_a_folder_and_a_file(tmp_path: Path):
    folder = random_gpt2.write_folder(tmp_path / "a", CONFIG, WEIGHTS)
    assert find(folder) == hub.Found(folder, "path", (str(folder),))
    assert find(str(folder / "model.safetensors")).path == folder / "model.safetensors"


def test_find_looks_in_both_weights_folders_first(tmp_path: Path, server: Hub):
    here, there = tmp_path / "cwd" / "weights" / "gpt2", tmp_path / "repository" / "weights" / "gpt2"
    random_gpt2.write_folder(here, CONFIG, WEIGHTS)
    found = find("gpt2")
    assert (found.path, found.origin, found.looked) == (here, "weights", (str(there), str(here)))
    random_gpt2.write_folder(there, CONFIG, WEIGHTS)
    assert find("gpt2").path == there
    assert server.requests == []


def test_find_downloads_only_what_is_needed(server: Hub, capfd: pytest.CaptureFixture):
    found = find("gpt2")
    assert found.origin == "download" and found.path.name == COMMIT
    assert sorted(server.downloads()) == ["config.json", "model.safetensors", "vocab.json"]
    assert found.looked[-1] == f"{server.url}/{REPOSITORY}"
    assert np.array_equal(load_model(found.path).embed.weight.numpy(), WEIGHTS["wte.weight"])
    output = capfd.readouterr()
    assert output.out == ""
    # The progress bar.
    assert "model.safetensors" in output.err or "Downloading" in output.err or "Fetching" in output.err


def test_find_uses_the_cache_without_asking_the_hub(server: Hub):
    downloaded = find("gpt2")
    server.requests.clear()
    for options in ({}, {"offline": True}, {"revision": "main"}, {"revision": COMMIT}):
        found = find("gpt2", **options)
        assert (found.path, found.origin) == (downloaded.path, "cache")
    assert server.requests == []


@pytest.mark.parametrize("name", ["gpt2", "distilgpt2"])
def test_find_looks_in_the_cache_under_the_bare_name_too(tmp_path: Path, name: str):
    snapshot = tmp_path / "hub" / f"models--{name}" / "snapshots" / COMMIT
    random_gpt2.write_folder(snapshot, CONFIG, WEIGHTS)
    (tmp_path / "hub" / f"models--{name}" / "refs").mkdir()
    (tmp_path / "hub" / f"models--{name}" / "refs" / "main").write_text(COMMIT)
    found = find(name)
    assert (found.path, found.origin) == (snapshot, "cache")


def test_find_downloads_torch_files_where_there_is_nothing_better(server: Hub, tmp_path: Path):
    random_gpt2.write_torch(tmp_path, WEIGHTS)
    server.repositories["somebody/small"] = {
        "config.json": json.dumps(CONFIG).encode(),
        "pytorch_model.bin": (tmp_path / "pytorch_model.bin").read_bytes(),
    }
    model = load_model(find("somebody/small").path)
    assert np.array_equal(model.embed.weight.numpy(), WEIGHTS["wte.weight"])


def test_find_downloads_all_shards(server: Hub, tmp_path: Path):
    folder = random_gpt2.write_folder(tmp_path / "sharded", CONFIG, WEIGHTS, random_gpt2.write_shards)
    server.repositories["somebody/sharded"] = {path.name: path.read_bytes() for path in folder.iterdir()}
    found = find("somebody/sharded")
    assert np.array_equal(load_model(found.path).embed.weight.numpy(), WEIGHTS["wte.weight"])
    (found.path / "model-00002-of-00003.safetensors").unlink()  # an incomplete snapshot is not used
    assert find("somebody/sharded").origin == "download"


def test_broken_download_is_resumed_where_it_stopped(server: Hub, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 100)
    server.breaks["model.safetensors"] = 1000
    found = find("gpt2")
    ranges = [
        asked
        for method, path, asked in server.requests
        if method == "GET" and path.endswith("model.safetensors")
    ]
    assert ranges == [None, "bytes=1000-"]
    assert (found.path / "model.safetensors").read_bytes() == server.repositories[REPOSITORY][
        "model.safetensors"
    ]


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_download_with_a_wrong_hash_is_refused_and_removed(server: Hub, name: str):
    content = server.repositories[REPOSITORY][name]
    server.damage[name] = content[:-1] + bytes([content[-1] ^ 1])
    with pytest.raises(
        LamaError,
        match=rf"{name} is damaged: the hub declares the hash .*, got .*\. It was removed",
    ):
        find("gpt2")
    server.damage.clear()
    assert find("gpt2").origin == "download"


def test_download_that_is_too_short_is_refused(server: Hub):
    server.damage["model.safetensors"] = server.repositories[REPOSITORY]["model.safetensors"][:-7]
    with pytest.raises(LamaError, match=r"has \d+ bytes, and the hub declares \d+\. It was removed"):
        find("gpt2")


def test_cached_file_that_was_damaged_later_is_reported(server: Hub):
    path = find("gpt2").path / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.resolve().write_bytes(content)
    with pytest.raises(
        LamaError,
        match=r"model\.safetensors is damaged: the hub declares the hash.* Delete .*blobs.* and run again",
    ):
        find("gpt2")


def test_cached_file_is_hashed_once(server: Hub, monkeypatch: pytest.MonkeyPatch):
    find("gpt2")
    monkeypatch.setattr(hub, "hash_file", lambda *_: pytest.fail("hashed again"))
    assert find("gpt2").origin == "cache"


def test_cached_file_that_others_downloaded_is_hashed(server: Hub, tmp_path: Path):
    find("gpt2")
    (tmp_path / "cache" / "lama" / "verified.json").unlink()
    assert find("gpt2").origin == "cache"
    record = json.loads((tmp_path / "cache" / "lama" / "verified.json").read_text())
    assert len(record) == 2  # config and weights


def test_revision_that_the_hub_does_not_have_is_named(server: Hub):
    with pytest.raises(NotFound, match="openai-community/gpt2 has no revision 'v9' on the hub"):
        find("gpt2", revision="v9")


def test_revision_skips_the_weights_folders(server: Hub, tmp_path: Path):
    random_gpt2.write_folder(tmp_path / "cwd" / "weights" / "gpt2", CONFIG, WEIGHTS)
    assert find("gpt2", revision=COMMIT).origin == "download"


def test_gated_repository_says_to_accept_its_licence(server: Hub):
    server.repositories["owner/gated"] = dict(server.repositories["openai-community/gpt2"])
    server.gated.add("owner/gated")
    with pytest.raises(NotFound, match=r"model owner/gated is gated; accept its licence .* and set HF_TOKEN"):
        find("owner/gated")


def test_repository_that_the_hub_does_not_have_is_named(server: Hub):
    with pytest.raises(
        NotFound,
        match=r"the hub has no public model 'nobody/nothing'\..* Looked in: .*http://127",
    ) as caught:
        find("nobody/nothing")
    assert "\n" not in str(caught.value)


def test_repository_without_weights_is_named(server: Hub):
    server.repositories["somebody/empty"] = {"README.md": b"hello"}
    with pytest.raises(
        NotFound, match=r"model somebody/empty must have model\.safetensors or .* on the hub; got README\.md"
    ):
        find("somebody/empty")


@pytest.mark.parametrize(
    ("name", "near"),
    [("gtp2", "gpt2"), ("gpt2-meduim", "gpt2-medium"), ("gpt2_xl", "gpt2-xl"), ("lama-bp", "lama-bpe")],
)
def test_unknown_name_suggests_near_ones_and_tells_where_it_looked(tmp_path: Path, name: str, near: str):
    (tmp_path / "repository" / "weights" / "lama-bpe").mkdir(parents=True)
    (tmp_path / "repository" / "weights" / "lama-bpe" / "config.json").touch()
    with pytest.raises(NotFound) as caught:
        find(name)
    message = str(caught.value)
    rule = "model must be a path, owner/name on the hub, or a name that is known here"
    assert message.startswith(f"{rule}; got '{name}'. Did you mean {near}")
    assert str(tmp_path / "cwd" / "weights" / name) in message and "\n" not in message


def test_unknown_name_like_no_other_lists_the_names():
    with pytest.raises(
        NotFound, match=r"got 'zzzzz'\. Names known here: gpt2, gpt2-large, gpt2-medium, gpt2-xl, smollm2\."
    ):
        find("zzzzz")


@pytest.mark.parametrize("name", ["/nowhere/model", "./gpt3", "a/b/c", "gone.safetensors", ""])
def test_path_that_is_not_there_is_named(name: str):
    with pytest.raises(NotFound, match="model must be a name, or the path of a folder or file; got "):
        find(name)


def test_folder_without_a_model_is_named(tmp_path: Path):
    with pytest.raises(NotFound, match=r"got '/.*', a folder without config\.json or model\.safetensors"):
        find(tmp_path / "cwd")


@pytest.mark.parametrize("how", ["option", "environment"])
def test_offline_asks_nobody_and_says_how_to_get_the_weights(
    server: Hub, monkeypatch: pytest.MonkeyPatch, how: str
):
    if how == "environment":
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    looked = r"Looked in: .*Put config\.json and model\.safetensors into weights/gpt2/"
    with pytest.raises(NotFound, match=rf"model gpt2 was not found offline\. {looked}"):
        find("gpt2", offline=how == "option")
    assert server.requests == []


def test_network_failure_is_one_line_with_a_way_out():
    with pytest.raises(NotFound) as caught:
        load("gpt2")
    message = str(caught.value)
    assert message.startswith("model gpt2 was not found and could not be downloaded: ")
    assert "Looked in: " in message and "http://127.0.0.1:9/openai-community/gpt2" in message
    assert (
        message.endswith("Put config.json and model.safetensors into weights/gpt2/ by hand.")
        and "\n" not in message
    )


def test_environment_variables_of_the_hub_are_respected(server: Hub, tmp_path: Path):
    code = "from lama.checkpoints import find; print(find('gpt2').origin)"
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"} | {
        "HF_ENDPOINT": server.url,
        "HF_HUB_CACHE": str(tmp_path / "other"),
        "PYTHONPATH": str(Path(__file__).parent.parent),
    }

    def run(**more: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-c", code], env=environment | more, capture_output=True, text=True
        )

    assert "was not found offline" in run(HF_HUB_OFFLINE="1").stderr
    assert server.requests == []
    assert run().stdout == "download\n"
    assert run(HF_HUB_OFFLINE="1").stdout == "cache\n"


def test_file_of_another_kind_and_folder_without_a_model_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    for name in ("m.txt", "x.gguf", "sub/m.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "ggufs").mkdir()
    (tmp_path / "ggufs" / "q4.GGUF").touch()
    for name, message in (
        (
            "m.txt",
            r"^cannot read m\.txt: not a weight file; "
            r"lama reads safetensors, GGUF, PyTorch's \.bin and nanoGPT's ckpt\.pt$",
        ),
        ("sub/m.txt", r"^cannot read sub/m\.txt: not a weight file"),
        ("x.gguf", r"^x\.gguf must be a GGUF file; got fewer than 24 bytes"),
        ("gone.gguf", r"^model must be a name, .*; got 'gone\.gguf', which does not exist"),
        ("ggufs", r"got 'ggufs', a folder without config\.json"),
        ("sub", r"got 'sub', a folder without config\.json or model\.safetensors"),
        ("./sub", r"got 'sub', a folder without config\.json or model\.safetensors"),
    ):
        with pytest.raises(LamaError, match=message):
            load(name, offline=True)


def test_file_called_like_a_known_model_does_not_hide_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (hub.REPOSITORY / "weights" / "mine").mkdir(parents=True)
    (hub.REPOSITORY / "weights" / "mine" / "config.json").touch()
    (tmp_path / "mine").touch()
    assert find("mine", offline=True).origin == "weights"


def test_model_without_config_in_the_current_folder_says_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.safetensors").touch()
    for name in (".", "model.safetensors"):
        got = r"got none in the current folder\. Copy it there$"
        with pytest.raises(LamaError, match=rf"must have config\.json beside its weights; {got}"):
            load(name)


@pytest.mark.parametrize(
    "name", ["a" * 300, "a/" + "b" * 300, "a" * 100_000, "x" * 300 + ".safetensors", "a\0b", "~nobody-here/x"]
)
def test_name_that_no_file_can_have_is_one_line(name: str):
    with pytest.raises(NotFound) as caught:
        find(name, offline=True)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_model_is_found_from_a_folder_that_was_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    (hub.REPOSITORY / "weights" / "mine").mkdir(parents=True)
    (hub.REPOSITORY / "weights" / "mine" / "config.json").touch()
    assert find("mine", offline=True).origin == "weights"
