"""Imports go one way, and importing lama does nothing but define names."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import lama

PACKAGE = Path(lama.__file__).parent

# Left to right; a module may import from its own layer's line only what is its own package, and from lines
# above.
LAYERS = (
    {"errors"},
    {"shapes", "figures", "files", "host", "tables", "timing"},
    {"atomic", "packages"},
    {"marker"},
    {"runtime"},
    {"lazy"},
    {"kernels"},
    {"ops"},
    {"masks", "cache", "taps", "dropout"},
    {"layers", "rotary"},
    {"attention"},
    {"embeddings", "blocks"},
    {"models", "tokenizers"},
    {"data", "checkpoints"},
    {"training", "generation", "evaluation", "interp"},
    {"experiments"},
    {"server", "course"},
    {"cli"},
    {"__main__"},
)
LEVEL = {unit: level for level, units in enumerate(LAYERS) for unit in units}
HEAVY = (
    "torch",
    "transformers",
    "huggingface_hub",
    "tiktoken",
    "matplotlib",
    "bible",
    "ziglang",
    "jaxtyping",
)


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


def unit(module: str) -> str:
    """The part of the house a module belongs to: `attention` for lama.attention, `models` for
    lama.models.gpt.
    """
    return [*module.split("."), ""][1]


def imports(path: Path) -> Iterator[str]:
    """All that a file imports, wherever in the file, as full module names."""
    package = (
        module_name(path).split(".") if path.name == "__init__.py" else module_name(path).split(".")[:-1]
    )
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*start, node.module or ""]).strip(".")
            # `from lama import compiler` imports a module, `from lama import GPT` a lazy name.
            yield from (f"{base}.{alias.name}" if base == "lama" else base for alias in node.names)


@pytest.mark.parametrize("path", modules(), ids=module_name)
def test_module_imports_nothing_from_its_right(path: Path) -> None:
    mine = unit(module_name(path))
    if not mine:
        return  # lama/__init__.py names things of all layers, and imports none of them before they are used
    assert mine in LEVEL, (
        f"{mine} must stand somewhere in the order; add it to LAYERS and to docs/architecture.md"
    )
    for name in imports(path):
        if name.split(".")[0] != "lama" or name == "lama.__version__":
            continue
        theirs = unit(name)
        assert theirs in LEVEL, (
            f"{module_name(path)} must import from modules, not from lama's lazy names; got {name}"
        )
        allowed = theirs == mine or LEVEL[theirs] < LEVEL[mine] or {theirs, mine} == {"embeddings", "blocks"}
        assert allowed, f"{module_name(path)} must not import {name}: {theirs} does not stand left of {mine}"


def test_training_and_generation_never_meet() -> None:
    for mine, other in (("training", "generation"), ("generation", "training")):
        found = [
            f"{module_name(path)} imports {name}"
            for path in (PACKAGE / mine).rglob("*.py")
            for name in imports(path)
            if unit(name) == other
        ]
        assert not found


def test_every_package_has_an_init() -> None:
    folders = {path.parent for path in modules()}
    assert [str(folder) for folder in folders if not (folder / "__init__.py").exists()] == []


def loaded_by(code: str, tmp_path: Path) -> set[str]:
    """The modules that are loaded after `code` ran in a fresh process that may open neither sockets nor files
    to write.
    """
    guard = """
import sys
def watch(event, args):
    if event.startswith(("socket.", "subprocess.", "os.mkdir", "os.rename", "os.remove")):
        raise SystemExit(f"{event} {args}")
    if event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+"):
        raise SystemExit(f"{event} {args}")
sys.dont_write_bytecode = True
sys.addaudithook(watch)
"""
    end = "\nsys.stderr.write(' '.join(sys.modules))"
    env = {"PYTHONPATH": str(PACKAGE.parent), "HOME": str(tmp_path), "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", guard + code + end], env=env, cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert list(tmp_path.iterdir()) == []
    return set(done.stderr.split())


@pytest.mark.parametrize(
    "code",
    ["import lama", "import lama.cli", "import lama.cli, lama.__main__", "import lama; lama.LamaError"],
)
def test_import_is_light_and_touches_nothing(code: str, tmp_path: Path) -> None:
    loaded = loaded_by(code, tmp_path)
    assert "lama" in loaded
    assert sorted(loaded & {*HEAVY, "tinygrad", "numpy"}) == []


def test_help_is_light(tmp_path: Path) -> None:
    code = """
import contextlib, io
from lama.cli import make_parser
with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
    make_parser().parse_args(["--help"])"""
    assert sorted(loaded_by(code, tmp_path) & {*HEAVY, "tinygrad", "numpy"}) == []


def test_importing_every_module_opens_no_device(tmp_path: Path) -> None:
    names = [module_name(path) for path in modules() if path.name != "__main__.py"]
    loaded = loaded_by(f"import {', '.join(names)}", tmp_path)
    assert sorted(loaded & set(HEAVY) - {"jaxtyping"}) == []
    assert [name for name in loaded if name.startswith("tinygrad.runtime.ops_")] == []
