"""The compiler: which one is found, what is set, and what is said where there is none."""

import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tinygrad.helpers import getenv

import lama.runtime.compiler as compilers
from lama.errors import LamaError
from lama.runtime.compiler import Compiler, ensure_compiler, explain, find_compiler

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="fake compilers are shell scripts")

ZIG = compilers._zig()
needs_zig = pytest.mark.skipif(ZIG is None, reason="ziglang is not installed")
ONE_PLUS_TWO = "from tinygrad import Tensor; print((Tensor([1, 2, 3]) + 2).tolist())"


def script(path: Path, text: str = "echo fake clang 1.2.3") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty PATH folder, no $CC, caches of one's own."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("CC", "so that it is put back also if it was not set")
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield folder
    getenv.cache_clear()  # what tinygrad remembers of a fake compiler


def python(code: str, tmp_path: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Run Python with an empty tinygrad cache and an empty PATH."""
    base = {
        "PATH": str(tmp_path),
        "HOME": str(tmp_path),
        "CACHEDB": str(tmp_path / "tinygrad.db"),
        "XDG_CACHE_HOME": str(tmp_path / "xdg"),
    }
    root = str(Path(compilers.__file__).parents[2])
    return subprocess.run(
        [sys.executable, "-c", code],
        env=base | {"PYTHONPATH": root} | env,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )


def test_cc_is_taken_first(bare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script(bare / "clang")
    mine = script(tmp_path / "mine" / "cc")
    monkeypatch.setenv("CC", str(mine))
    assert find_compiler() == Compiler(str(mine), "$CC")


def test_cc_is_looked_up_on_path(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = script(bare / "my-clang")
    monkeypatch.setenv("CC", "my-clang")
    assert find_compiler() == Compiler(str(mine), "$CC")


@pytest.mark.parametrize("cc", ["nowhere", "/nowhere/clang", "clang -O3"])
def test_cc_that_is_not_executable_is_one_clear_error(
    cc: str, bare: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script(bare / "clang")
    monkeypatch.setenv("CC", cc)
    with pytest.raises(LamaError, match=f"CC must name one executable.*got CC={cc}"):
        find_compiler()


def test_clang_on_path_is_taken_before_numbered_ones(bare: Path) -> None:
    clang = script(bare / "clang")
    script(bare / "clang-19")
    assert find_compiler() == Compiler(str(clang), "PATH")


def test_newest_numbered_clang_is_taken(bare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "other"
    for name in ("clang-9", "clang-16", "clang-format-21", "clang-tidy", "clang-cpp"):
        script(bare / name)
    newest = script(other / "clang-18")
    (other / "clang-23").write_text("not executable")
    monkeypatch.setenv("PATH", os.pathsep.join([str(bare), "/nowhere", str(other)]))
    assert find_compiler() == Compiler(str(newest), "PATH")


@needs_zig
@needs_zig
def test_clang_that_is_too_old_is_taken_only_where_there_is_no_other(
    bare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "llvm-14" / "bin").mkdir(parents=True)
    (bare / "clang").symlink_to(script(tmp_path / "llvm-14" / "bin" / "clang"))  # as Debian has it
    assert find_compiler().kind == "ziglang"
    monkeypatch.setattr(compilers, "_zig", lambda: None)
    assert find_compiler() == Compiler(str(bare / "clang"), "PATH")
    assert find_compiler() != Compiler(str(script(bare / "clang-17")), "PATH") == find_compiler()


def test_ziglang_compiles_where_there_is_no_clang(bare: Path, tmp_path: Path) -> None:
    found = find_compiler()
    assert found.kind == "ziglang"
    assert Path(found.path).parent == tmp_path / "cache" / "lama"
    assert stat.S_IMODE(Path(found.path).stat().st_mode) == 0o755
    assert "clang version" in found.version
    assert found.probe() is None
    assert sorted(os.listdir(tmp_path)) == ["bin", "cache"]  # zig leaves no cache of its own


@needs_zig
def test_wrapper_is_written_once_and_repaired(bare: Path) -> None:
    path = Path(find_compiler().path)
    before = path.stat().st_mtime_ns, path.read_text()
    assert (Path(find_compiler().path).stat().st_mtime_ns, path.read_text()) == before
    for damaged in (b"half of i", b"\xff\xfe"):
        path.write_bytes(damaged)
        assert Path(find_compiler().path).read_text() == before[1]
    assert os.listdir(path.parent) == [path.name]


def test_wrappers_of_two_environments_do_not_clash_and_paths_are_quoted(bare: Path, tmp_path: Path) -> None:
    zigs = [script(tmp_path / name / "zig", f'echo {n} "$@"') for n, name in enumerate(("one", "it's $two"))]
    wrappers = [compilers._wrapper(zig) for zig in zigs]
    said = [subprocess.check_output([wrapper, "a  b", "-"], text=True).strip() for wrapper in wrappers]
    assert said == ["0 clang a  b -", "1 clang a  b -"]


def test_wrapper_goes_to_a_private_folder_where_the_cache_cannot_be_written(
    bare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a file"))
    wrapper = compilers._wrapper(script(tmp_path / "zig"))
    assert subprocess.check_output([wrapper], text=True) == "fake clang 1.2.3\n"
    assert stat.S_IMODE(wrapper.parent.stat().st_mode) == 0o700


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="files in memory are Linux's")
def test_wrapper_is_in_memory_where_nothing_can_be_written(
    bare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none_left(**_: str) -> str:
        raise FileNotFoundError(2, "No usable temporary directory found")

    (tmp_path / "a file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a file"))
    monkeypatch.setattr("tempfile.mkdtemp", none_left)
    wrapper = compilers._wrapper(script(tmp_path / "zig"))
    assert subprocess.check_output([wrapper], text=True) == "fake clang 1.2.3\n"
    monkeypatch.delattr(os, "memfd_create")
    with pytest.raises(LamaError, match="no folder to put the compiler's script in; set XDG_CACHE_HOME"):
        compilers._wrapper(tmp_path / "zig")


def test_no_compiler_says_what_to_install(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilers, "_zig", lambda: None)
    with pytest.raises(LamaError, match=r"needs a C compiler.*pip install ziglang") as caught:
        find_compiler()
    assert "\n" not in str(caught.value)


def test_no_compiler_is_no_failure_on_another_device(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilers, "_zig", lambda: None)
    monkeypatch.setattr(compilers, "needs_compiler", lambda: False)
    ensure_compiler()
    assert "CC" not in os.environ
    monkeypatch.setattr(compilers, "needs_compiler", lambda: True)
    with pytest.raises(LamaError, match="needs a C compiler"):
        ensure_compiler()


@pytest.mark.parametrize(
    ("device", "needs"),
    [("CPU", True), ("CPU:CLANG", True), ("CPU:LLVM", False), ("NULL", False), ("PYTHON", False)],
)
def test_only_the_cpu_device_needs_a_compiler(device: str, needs: bool, tmp_path: Path) -> None:
    done = python(
        "from lama.runtime.compiler import needs_compiler; print(needs_compiler())", tmp_path, DEV=device
    )
    assert (done.stdout.strip(), done.stderr) == (str(needs), "")


def test_ensure_compiler_sets_cc_and_is_idempotent(bare: Path) -> None:
    clang = script(bare / "clang", "exit 9")  # not run
    ensure_compiler()
    ensure_compiler()
    assert os.environ["CC"] == str(clang)


@needs_zig
def test_fresh_process_computes_without_clang(tmp_path: Path) -> None:
    done = python(
        f"from lama.runtime.compiler import ensure_compiler; ensure_compiler(); {ONE_PLUS_TWO}", tmp_path
    )
    assert (done.stdout, done.stderr, done.returncode) == ("[3, 4, 5]\n", "", 0)


@needs_zig
@pytest.mark.parametrize("device", ["", "CPU"])
def test_compiler_is_seen_also_after_tinygrad_has_looked_for_one(device: str, tmp_path: Path) -> None:
    code = f"""
from lama.runtime.compiler import ensure_compiler, explain
try:
    {ONE_PLUS_TWO}
except Exception as error:
    print(explain(error))
ensure_compiler()
{ONE_PLUS_TWO}"""
    first, second = python(code, tmp_path, DEV=device).stdout.splitlines()
    assert first == (
        "tinygrad was used before lama.runtime.compiler.ensure_compiler() and found no clang; call that first"
    )
    assert second == "[3, 4, 5]"


@pytest.mark.parametrize("device", ["", "CPU"])
def test_compiler_that_is_not_clang_is_explained(device: str, tmp_path: Path) -> None:
    gcc = script(
        tmp_path / "gcc",
        'if [ "$1" = --version ]; then echo "gcc 12"; else echo "gcc: error: --target?" >&2; exit 1; fi',
    )
    code = f"""
from lama.runtime.compiler import ensure_compiler, explain
ensure_compiler()
try:
    {ONE_PLUS_TWO}
except Exception as error:
    print(explain(error))"""
    done = python(code, tmp_path, CC=str(gcc), DEV=device)
    assert done.stdout == (
        f"the C compiler must be a clang that works; got CC={gcc} (gcc 12): gcc: error: --target?. "
        f"Unset CC and lama finds a clang itself\n"
    )


def test_other_errors_are_not_explained(bare: Path) -> None:
    script(bare / "clang")
    assert explain(ValueError("d_model must be a multiple of n_heads")) is None
    assert explain(subprocess.CalledProcessError(1, ["git", "-c", "x"])) is None
    assert explain(FileNotFoundError(2, "No such file", "corpus.txt")) is None


def test_variable_of_the_environment_that_tinygrad_cannot_read_is_explained(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LAMA_TEST", "x" * 5000)
    for default, kind in ((0, "a whole number"), (0.5, "a number")):
        with pytest.raises(ValueError) as caught:
            getenv("LAMA_TEST", default)
        told = explain(caught.value) or ""
        assert told.startswith(f"LAMA_TEST in the environment must be {kind}; got 'xxx") and len(told) < 300


def test_probe_says_what_is_wrong(tmp_path: Path) -> None:
    assert (
        Compiler(str(script(tmp_path / "silent", "exit 0")), "PATH").probe()
        == "exit status 0, 0 bytes of output"
    )
    assert "does not run" in (Compiler(str(tmp_path / "gone"), "PATH").probe() or "")
    assert Compiler(str(tmp_path / "gone"), "PATH").version.startswith("unknown")


@pytest.mark.parametrize(
    "code",
    [
        "from lama import GPT, GPTConfig; GPT(GPTConfig(7, 5, 6, 1, 2))",
        "import lama; lama.load('lama-bpe', offline=True)",
        "from lama.layers import Linear; Linear(2, 3)",
    ],
)
def test_first_use_of_lama_finds_a_compiler_by_itself(tmp_path: Path, code: str) -> None:
    env = {name: value for name, value in os.environ.items() if name not in ("CC", "DEV")} | {
        "CACHEDB": str(tmp_path / "cache.db")
    }
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
