"""tinygrad's cache of compiled kernels: what is kept, and that no failure of it stops anything."""

import os
import pickle
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from tinygrad import helpers
from tinygrad.engine import worker
from tinygrad.helpers import CACHELEVEL, diskcache_get, diskcache_put

import lama
from lama.runtime import kernel_cache
from lama.tokenizers import ByteTokenizer

CODE = bytes(range(256)) * 40  # more than a page of the database


@pytest.fixture(autouse=True)
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache of the test's own, not made yet; in one process as in a new one."""
    monkeypatch.setattr(helpers, "_db_connection", None)
    monkeypatch.setattr(helpers, "_db_tables", set())
    monkeypatch.setattr(worker, "_init_worker", worker._init_worker)
    monkeypatch.setattr(CACHELEVEL, "value", 2)
    monkeypatch.setenv("CACHEDB", str(tmp_path / "own" / "cache.db"))
    again()
    yield tmp_path / "own" / "cache.db"
    again()


def again() -> None:
    """What a new process begins with."""
    if isinstance(helpers._db_connection, kernel_cache.Cache) and helpers._db_connection._file:
        helpers._db_connection._file.close()
    helpers._db_connection = None
    kernel_cache.guard_cache()


def keep(*keys: str) -> None:
    for key in keys:
        diskcache_put("code", key, CODE + key.encode())


def kept(*keys: str) -> list[bool]:
    """Which are there; what is there must be right."""
    found = [diskcache_get("code", key) for key in keys]
    assert all(value in (None, CODE + key.encode()) for value, key in zip(found, keys, strict=True))
    return [value is not None for value in found]


def notes(capsys: pytest.CaptureFixture[str]) -> list[str]:
    out, err = capsys.readouterr()
    assert out == ""
    return err.splitlines()


def test_values_are_there_in_the_next_process_also_for_plain_tinygrad(
    path: Path, capsys: pytest.CaptureFixture[str]
):
    keep("a", "b")
    again()
    assert kept("a", "b", "c") == [True, True, False] and notes(capsys) == []
    again()
    with sqlite3.connect(path) as plain:
        assert (
            pickle.loads(
                plain.execute(f"SELECT val FROM code_{helpers.VERSION} WHERE key = 'a'").fetchone()[0]
            )
            == CODE + b"a"
        )
    plain.close()


def test_another_processor_compiles_again(monkeypatch: pytest.MonkeyPatch):
    keep("a")
    monkeypatch.setattr(kernel_cache, "cpu_model", lambda: "another")
    assert kept("a") == [False]
    keep("a")
    assert kept("a") == [True]


def test_guard_reaches_the_processes_that_compile():
    assert (
        isinstance(helpers.db_connection(), kernel_cache.Cache)
        and worker._init_worker is kernel_cache._start_worker
    )


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("CACHEDB", "{tmp}"),
        ("CACHEDB", "{tmp}/file/cache.db"),
        ("CACHEDB", "{tmp}/" + "a" * 300),
        ("CACHEDB", "/proc/lama/cache.db"),  # a file system that takes no files
        ("XDG_CACHE_HOME", "{tmp}/file"),
        ("XDG_CACHE_HOME", "/dev/null"),
    ],
)
def test_cache_that_cannot_be_made_costs_one_note(variable, value, tmp_path, monkeypatch, capsys):
    if value.startswith("/") and sys.platform != "linux":
        pytest.skip("/proc and /dev are Linux's")
    (tmp_path / "file").touch()
    monkeypatch.delenv("CACHEDB")
    monkeypatch.setenv(variable, value.format(tmp=tmp_path))
    keep("a", "b")
    assert kept("b", "c") == [True, False]  # in memory
    (note,) = notes(capsys)
    assert note.startswith("lama: cannot save compiled kernels in ")
    assert "they are lost when this run ends" in note
    assert sorted(os.listdir(tmp_path)) == ["file"]


def test_empty_variable_counts_as_none(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CACHEDB", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    keep("a")
    assert (tmp_path / "caches" / "tinygrad" / "cache.db").is_file() and notes(capsys) == []


def test_home_that_does_not_exist_costs_one_note_and_makes_no_folder(tmp_path, monkeypatch, capsys):
    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("CACHEDB")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", nowhere)
    monkeypatch.chdir(tmp_path)
    keep("a", "b")
    assert kept("b") == [True] and len(notes(capsys)) == 1 and os.listdir(tmp_path) == []


def noise(path: Path) -> None:
    path.write_bytes(bytes(range(255, 0, -1)) * 40)


def half(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("damage", [noise, half])
def test_damaged_cache_is_renamed_and_a_new_one_made(damage: Callable[[Path], Any], path, capsys):
    keep("a", "b", "c")
    again()
    damage(path)
    before = path.read_bytes()
    kept("a", "b", "c")
    keep("a")
    (note,) = notes(capsys)
    (aside,) = path.parent.glob("cache.db.damaged-*[0-9]")
    assert (
        note == f"lama: the cache of compiled kernels was damaged; it is now {aside}, and a new one is made"
    )
    assert aside.read_bytes() == before
    again()
    assert kept("a", "b") == [True, False] and notes(capsys) == []


@pytest.mark.parametrize("name", ["notes.txt", "cache"])
def test_file_of_another_program_is_left_alone(name: str, tmp_path, monkeypatch, capsys):
    (tmp_path / name).write_bytes(b"not a database" * 100)
    monkeypatch.setenv("CACHEDB", str(tmp_path / name))
    keep("a", "b")
    assert kept("b") == [True] and os.listdir(tmp_path) == [name]
    (note,) = notes(capsys)
    assert "(file is not a database): they are lost when this run ends" in note


def test_threads_do_not_take_one_anothers_values():
    keep(*(keys := list(map(str, range(40)))))
    with ThreadPoolExecutor(8) as pool:
        assert all(list(pool.map(lambda key: kept(key) == [True], keys * 5)))


def test_tinygrad_can_clear_the_cache():
    keep("a")
    helpers.diskcache_clear()
    assert kept("a") == [False]


ALTERED = "CAST(substr(val, 1, 5000) || x'00' || substr(val, 5002) AS BLOB)"


@pytest.mark.parametrize("change", [f"val = {ALTERED}", "key = 'c'", "val = x''", "val = 7", "val = 'text'"])
def test_value_that_was_altered_does_not_count(change: str, path, capsys):
    keep("a", "b")
    again()
    with sqlite3.connect(path) as plain:
        plain.execute(f"UPDATE code_{helpers.VERSION} SET {change} WHERE key = 'b'")
    plain.close()
    assert kept("a", "b", "c") == [True, False, False] and notes(capsys) == []
    keep("b", "c")
    assert kept("b", "c") == [True, True]


def test_disk_that_fills_on_the_way_costs_one_note_and_holds_nobody_up(path, monkeypatch, capsys):
    keep("a")
    helpers._db_connection._file.execute("PRAGMA max_page_count = 20")
    keep(*map(str, range(20)))
    assert kept("a", "19") == [False, True]  # in memory from there on
    (note,) = notes(capsys)
    assert (
        "(database or disk is full): they are lost when this run ends. "
        "Set CACHEDB to a file in a folder that can be written"
    ) in note
    again()
    monkeypatch.setattr(kernel_cache, "WAIT", 0)
    keep("b")  # another process: nothing is locked
    assert kept("a", "b") == [True, True] and notes(capsys) == []


def test_locked_cache_costs_one_note(path, monkeypatch, capsys):
    keep("a")
    again()
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("PRAGMA locking_mode=EXCLUSIVE")
    other.execute("BEGIN EXCLUSIVE")
    monkeypatch.setattr(kernel_cache, "WAIT", 0.01)
    keep("b")
    other.close()
    assert len(said := notes(capsys)) == 1 and "(database is locked)" in said[0]


def test_command_runs_the_same_with_a_damaged_cache(tmp_path):
    model, tokenizer = lama.GPT(lama.GPTConfig(256, 8, 4, 1, 1)), ByteTokenizer()
    # From Python, too: a model opens the device.
    assert isinstance(helpers.db_connection(), kernel_cache.Cache)
    lama.save(tmp_path / "model", model, tokenizer)
    (tmp_path / "bad.db").write_bytes(b"not a database" * 100)
    command = [
        "-m",
        "lama",
        "generate",
        "-m",
        str(tmp_path / "model"),
        "-p",
        "a",
        "-n",
        "3",
        "--temperature",
        "0",
    ]
    environment = os.environ | {"CACHEDB": str(tmp_path / "bad.db")}
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"a{lama.generate(model, tokenizer, 'a', max_new_tokens=3, temperature=0)}\n"
    assert (
        done.stderr.startswith("lama: the cache of compiled kernels was damaged")
        and done.stderr.count("\n") == 1
    )
