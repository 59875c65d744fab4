"""Every internal name of tinygrad that lama uses, and what lama expects of it: an upgrade fails with a list.

`lama/runtime/internals.py` imports these names; docs/tinygrad.md says how to move to another release.
"""

import ast
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tinygrad import Device, Tensor, TinyJit, UOp, dtypes

import lama
from lama.runtime import internals, opening, release
from lama.runtime.compiler import ensure_compiler

PACKAGE_PARENT = str(Path(lama.__file__).parents[1])
PUBLIC = {"Tensor", "UOp", "dtypes", "Device", "Context", "TinyJit"}


@pytest.fixture(scope="module", autouse=True)
def cpu() -> Any:
    ensure_compiler()
    return Device["CPU"]


def parameters(function: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(function).parameters)


def captured_step() -> Any:
    """A captured step of one kernel, and its input."""
    x = Tensor([1.0, 2.0], device="CPU").realize()
    step: Any = TinyJit(lambda x: (x + 1).realize())
    step.cnt = 1
    step(x)
    return step.captured, x


def memory() -> Any:
    """The memory of a realised tensor's buffer."""
    return Tensor([1.0], device="CPU").realize().uop.buffer.get_buf("CPU")


def program() -> Any:
    """The loaded program of a captured step's kernel."""
    from tinygrad.engine.realize import get_runtime

    (call,) = captured_step()[0].linear.src
    loaded = get_runtime("CPU", call.src[0])
    return getattr(loaded, "program", loaded)


CONTRACT: dict[str, Callable[[], Any]] = {
    # internal name or replaced function -> an assertion
    "BufferSpec(external_ptr=)": lambda: internals.BufferSpec(external_ptr=3).external_ptr == 3,
    "Compiled": lambda: isinstance(internals.device_of("CPU"), internals.Compiled),
    "Memory": lambda: isinstance(memory(), internals.Memory),
    "Program and CallableProgram": lambda: isinstance(program(), internals.CallableProgram),
    "Buffer(device, size, dtype, opaque=)": lambda: (
        parameters(internals.Buffer.__init__)[1:5] == ["device", "size", "dtype", "opaque"]
    ),
    "Buffer.ensure_allocated": lambda: callable(internals.Buffer.ensure_allocated),
    "Buffer.is_allocated": lambda: callable(internals.Buffer.is_allocated),
    "Buffer.copy_from": lambda: callable(internals.Buffer.copy_from),
    "Buffer.get_buf(device).va_addr": lambda: memory().va_addr > 0,
    "Buffer.as_memoryview(allow_zero_copy=, force_zero_copy=)": lambda: (
        {"allow_zero_copy", "force_zero_copy"} <= set(parameters(internals.Buffer.as_memoryview))
    ),
    "Buffer.base, .offset, .nbytes": lambda: all(
        hasattr(internals.Buffer, name) for name in ("base", "nbytes")
    ),
    "MultiBuffer": lambda: inspect.isclass(internals.MultiBuffer),
    "LRUAllocator.free_cache": lambda: callable(internals.LRUAllocator.free_cache),
    "TinyELF(lib, name, target, signature)": lambda: (
        parameters(internals.TinyELF)[:4] == ["lib", "name", "target", "signature"]
    ),
    "TinyELF.name, .lib, .signature": lambda: (
        set(internals.TinyELF.__annotations__) >= {"name", "lib", "signature"}
    ),
    "DType": lambda: isinstance(dtypes.float32, internals.DType),
    "AddrSpace.ALU": lambda: internals.AddrSpace.ALU is not None,
    "GraphRunner.supports_uop(batch_devs, new_call)": lambda: (
        parameters(internals.GraphRunner.supports_uop) == ["batch_devs", "new_call"]
    ),
    "GraphRunner.updated_vars": lambda: callable(internals.GraphRunner.updated_vars),
    "GraphRunner(linear, input_uops)": lambda: (
        parameters(internals.GraphRunner.__init__)[1:3] == ["linear", "input_uops"]
    ),
    "capturing": lambda: isinstance(internals.capturing, list),
    "get_call_arg_uops": lambda: callable(internals.get_call_arg_uops),
    "get_graph_runtime": lambda: callable(internals.get_graph_runtime),
    "resolve_params": lambda: callable(internals.resolve_params),
    "DEBUG, PROFILE, NUM_CPU_THREADS as ContextVar": lambda: all(
        isinstance(v, internals.ContextVar)
        for v in (internals.DEBUG, internals.PROFILE, internals.NUM_CPU_THREADS)
    ),
    "ContextVar._cache": lambda: "DEBUG" in internals.ContextVar._cache,
    "diskcache_get(table, key)": lambda: parameters(internals.diskcache_get) == ["table", "key"],
    "diskcache_put(table, key, val)": lambda: (
        parameters(internals.diskcache_put)[:3] == ["table", "key", "val"]
    ),
    "getenv": lambda: internals.getenv("LAMA_NO_SUCH_VARIABLE", 7) == 7,
    "getenv.cache_clear": lambda: callable(internals.getenv.cache_clear),
    "Estimates(ops=)": lambda: internals.Estimates(ops=3).ops == 3,
    "KernelInfo(name, estimates=)": lambda: (
        internals.KernelInfo("x", estimates=internals.Estimates()).name == "x"
    ),
    "ProgramInfo": lambda: (
        {"globals", "outs", "ins", "target", "global_size", "vars"}
        <= set(dir(internals.ProgramInfo)) | set(internals.ProgramInfo.__annotations__)
    ),
    "Ops": lambda: all(
        hasattr(internals.Ops, name)
        for name in [
            "PROGRAM",
            "LINEAR",
            "SOURCE",
            "CUSTOM_FUNCTION",
            "PARAM",
            "RESHAPE",
            "PERMUTE",
            "SHRINK",
            "EXPAND",
            "COPY",
            "CONTIGUOUS",
            "BUFFER",
        ]
    ),
    "CPUProgram(device, elf)": lambda: parameters(type(program()))[:2] == ["dev", "obj"],
    "UOp.param(slot, dtype, shape, vmin_vmax=, name=, addrspace=)": lambda: (
        {"vmin_vmax", "name", "addrspace"} <= set(parameters(UOp.param))
    ),
    "UOp.new_buffer(device, size, dtype)": lambda: (
        parameters(UOp.new_buffer)[:3] == ["device", "size", "dtype"]
    ),
    "UOp.to_elf": lambda: callable(UOp.to_elf),
    "UOp.has_buffer_identity(after_ok=)": lambda: "after_ok" in parameters(UOp.has_buffer_identity),
    "UOp.marg": lambda: Tensor.empty(2, 3).permute(1, 0).uop.marg == (1, 0),
    "Tensor.custom_kernel(*, fxn, grad_fxn)": lambda: (
        {"fxn", "grad_fxn"} <= set(parameters(Tensor.custom_kernel))
    ),
    "TinyJit.cnt = 1 captures at once": lambda: captured_step()[0] is not None,
    "captured.linear.src": lambda: len(captured_step()[0].linear.src) == 1,
    "captured._written_uops": lambda: hasattr(captured_step()[0], "_written_uops"),
    "device.compiler.compile_cached": lambda: callable(Device["CPU"].compiler.compile_cached),
    "device.renderer.target": lambda: Device["CPU"].renderer.target is not None,
    "device.renderer is a ClangRenderer": lambda: type(Device["CPU"].renderer).__name__ == "ClangRenderer",
    "dtypes.float32.fmt": lambda: np.dtype(dtypes.float32.fmt) == np.float32,
}


@pytest.mark.parametrize("name", CONTRACT)
def test_tinygrad_has(name):
    assert CONTRACT[name](), name


REPLACED: dict[str, Callable[[], Any]] = {
    # replaced function or variable -> an assertion
    "ops_cpu.do_to_program": lambda: callable(ops_cpu().do_to_program),
    "device.runtime_t": lambda: callable(Device["CPU"].runtime_t),
    "device.graph": lambda: hasattr(Device["CPU"], "graph"),
    "device.allocator._alloc(size, options)": lambda: (
        parameters(type(Device["CPU"].allocator)._alloc)[1:3] == ["size", "options"]
    ),
    "helpers._db_connection, with helpers._db_tables": lambda: (
        hasattr(helpers(), "_db_connection") and isinstance(helpers()._db_tables, set)
    ),
    "worker._init_worker": lambda: callable(worker()._init_worker),
    "helpers.PARALLEL.value": lambda: isinstance(helpers().PARALLEL.value, int),
    "helpers.CACHELEVEL": lambda: helpers().CACHELEVEL >= 0,
    "helpers.DEV.value, .renderer": lambda: (
        hasattr(helpers().DEV, "value") and hasattr(helpers().DEV, "renderer")
    ),
    "support.c.DLL.findlib(nm, paths, extra_paths)": lambda: (
        parameters(dll().findlib) == ["nm", "paths", "extra_paths"]
    ),
    "the renderers of ops_cpu, by module": lambda: all(
        getattr(ops_cpu(), renderer).__name__ == renderer for renderer in opening.LATER.values()
    ),
}


def helpers() -> Any:
    import tinygrad.helpers

    return tinygrad.helpers


def worker() -> Any:
    from tinygrad.engine import worker

    return worker


def ops_cpu() -> Any:
    from tinygrad.runtime import ops_cpu

    return ops_cpu


def dll() -> Any:
    from tinygrad.runtime.support.c import DLL

    return DLL


@pytest.mark.parametrize("name", REPLACED)
def test_tinygrad_has_what_lama_replaces(name):
    assert REPLACED[name](), name


def test_the_installed_release_is_a_tested_one():
    from importlib.metadata import version

    assert release.installed() == version("tinygrad")
    assert release.installed() in release.TESTED


def test_every_name_of_internals_is_in_the_contract():
    words = set(re.findall(r"\w+", " ".join(CONTRACT)))
    tree = ast.parse(inspect.getsource(internals))
    found = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    names = [alias.name for node in found if "tinygrad." in (node.module or "") for alias in node.names]
    assert len(names) > 20
    assert [name for name in names if name not in words] == []


def test_names_of_internals_are_none_with_another_release():
    code = """
from lama.runtime import release
release.is_tested = lambda: False
from lama.runtime.internals import Buffer, GraphRunner, Ops
assert Buffer is Ops is None and GraphRunner is object
"""
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": PACKAGE_PARENT})


def test_only_the_runtime_uses_more_of_tinygrad_than_its_public_names():
    package = Path(lama.__file__).parent
    found = []
    for path in package.rglob("*.py"):
        if "runtime" in path.relative_to(package).parts:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "tinygrad":
                names = {alias.name for alias in node.names}
                if node.module != "tinygrad.nn.state" and not (node.module == "tinygrad" and names <= PUBLIC):
                    found.append(
                        f"{path.relative_to(package)}: from {node.module} import {', '.join(sorted(names))}"
                    )
            elif isinstance(node, ast.Import):
                found += [
                    f"{path.relative_to(package)}: import {a.name}"
                    for a in node.names
                    if a.name.startswith("tinygrad")
                ]
    assert found == []
