"""The device that lama chooses, and the flags for where and how a command computes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import lama
from lama.cli import main
from lama.errors import UsageError
from lama.runtime import device
from lama.runtime.compiler import find_compiler

GENERATE = ["generate", "-p", "a", "-n", "2", "--temperature", "0", "-m"]


def python(code: str, *flags: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {
        name: value
        for name, value in os.environ.items()
        if name not in ("DEV", "LAMA_THREADS", "LAMA_REFERENCE")
    }
    return subprocess.run(
        [sys.executable, "-c", code, *flags], env=clean | environment, capture_output=True, text=True
    )


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere tinygrad chooses")
def test_cpu_is_chosen_without_asking_drivers_where_nothing_looks_like_a_gpu():
    code = (
        "import sys; from lama.runtime import device; device._signs_of_faster = lambda: False; "
        "device.open_device()\n"
    )
    done = python(
        code
        + (
            "from tinygrad import Device; print(Device.DEFAULT, [m for m in sys.modules if 'ops_nv' in m "
            "or 'ops_amd' in m])"
        )
    )
    assert done.stdout == "CPU []\n", done.stderr


@pytest.mark.parametrize("given", [{"DEV": "NULL"}, {"CUDA": "1"}])
def test_choice_is_left_to_tinygrad_where_a_device_is_named(given: dict[str, str]):
    code = (
        "from lama.runtime import device; from tinygrad.helpers import DEV; device.choose_device(); "
        "print(DEV)"
    )
    done = python(code, **given)
    assert done.stdout.strip() == given.get("DEV", ""), done.stderr


def test_the_first_faster_device_that_opens_is_chosen():
    """NULL and PYTHON, devices of tinygrad's for tests, stand for GPUs; the first of these has no driver."""
    code = """
from lama.runtime import device
device.FASTER, device._signs_of_faster = ("NV", "NULL", "PYTHON"), lambda: True
device.choose_device()
import os
from tinygrad import Device
print(Device.DEFAULT, os.environ["DEV"], device.device_reason())
"""
    done = python(code)
    assert done.stdout == "NULL NULL known to be faster than the CPU\n", done.stderr


def test_choice_that_tinygrad_has_made_stays():
    code = "from tinygrad import Device; Device.DEFAULT; from lama.runtime.device import *; choose_device(); "
    done = python(code + "print(device_reason())")
    assert done.stdout == "tinygrad's choice, for a tensor made before lama's first\n", done.stderr


def test_looking_for_a_compiler_does_not_leave_the_choice_to_tinygrad():
    code = """
from lama.runtime import compiler, device
device.FASTER, device._signs_of_faster = ("NULL",), lambda: True
from tinygrad import Device
print(compiler.needs_compiler(), Device.DEFAULT)
"""
    done = python(code)
    assert done.stdout == "False NULL\n", done.stderr


def test_a_gpu_is_seen_by_its_device_files(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os.path, "exists", lambda path: path == "/dev/kfd")
    assert device._signs_of_faster()


@pytest.mark.parametrize(
    ("given", "code", "told"),
    [
        ({"DEV": "FOO"}, 2, "CPU); got DEV=FOO (unknown)"),
        ({"DEV": "", "CUDA": "1"}, 2, "CPU); got DEV= (CUDA=1 is deprecated, use DEV=CUDA instead)"),
        ({"DEV": "a:b:c:d"}, 1, "DEV or --device must name a device, such as CPU or CUDA; got 'a:b:c:d'"),
        (
            {"DEBUG": "abc"},
            1,
            "DEBUG in the environment must be a whole number; got 'abc'. Correct or unset it",
        ),
        ({"LAMA_THREADS": "65000"}, 2, "LAMA_THREADS or --threads must be a whole number from 1 to "),
        (
            {"DEFAULT_FLOAT": "foo"},
            1,
            "unexpected AttributeError: 'DTypes' object has no attribute 'foo'. Please report",
        ),
    ],
)
def test_environment_that_cannot_be_followed_is_one_line(
    given: dict[str, str], code: int, told: str, tiny_gpt2: Path
):
    done = python(
        "import sys; from lama.cli import main; sys.exit(main(sys.argv[1:]))",
        *GENERATE,
        str(tiny_gpt2),
        **given,
    )
    assert (done.returncode, done.stdout) == (code, ""), done.stderr
    assert done.stderr.startswith("lama: ") and told in done.stderr and done.stderr.count("\n") == 1


def test_environment_that_cannot_be_followed_is_a_lama_error_from_python():
    done = python(
        "import lama\ntry: lama.load('lama-bpe')\nexcept lama.LamaError as error: print(error)", JIT=""
    )
    assert (done.stdout, done.stderr) == (
        "JIT in the environment must be a whole number; got ''. Correct or unset it\n",
        "",
    )


def test_device_that_python_names_must_be_here(tiny_gpt2: Path):
    with pytest.raises(
        UsageError, match=r"device must be one that tinygrad can open here \(.*CPU\); got 'GPU' \(unknown\)"
    ):
        lama.load(tiny_gpt2, device="GPU")
    for name in ("FOO:1", "", "\0", 5, ("CPU",), "DISK", "disk:x", "x" * 5000):
        with pytest.raises(UsageError, match="device must be ") as caught:
            device.check_device(name)
        assert len(str(caught.value)) < 400


def test_device_that_python_names_may_be_another_of_the_cpu(tiny_gpt2: Path):
    assert lama.load(tiny_gpt2, device="cpu:1")[0].embed.weight.device == "CPU:1"


def test_no_color_may_have_any_value(tiny_gpt2: Path):
    done = python(
        "import sys; from lama.cli import main; sys.exit(main(sys.argv[1:]))",
        *GENERATE,
        str(tiny_gpt2),
        NO_COLOR="yes",
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_threads_and_reference_are_what_the_environment_says(tiny_gpt2: Path):
    code = (
        "import sys; from lama.cli import main; code = main(sys.argv[1:]); from lama.runtime.threads "
        "import threads\n"
    )
    code += (
        "from lama.runtime.kernel import is_fast; from tinygrad import Tensor; print(threads(), "
        "is_fast(Tensor.empty(1)))"
    )
    compiler = find_compiler().path
    found = [
        python(code, *GENERATE, str(tiny_gpt2), *flags, CC=compiler)
        for flags in ([], ["--threads", "3"], ["--reference"])
    ]
    texts = [done.stdout.splitlines()[:-1] for done in found]
    assert texts[0] == texts[1] == texts[2] and texts[0], found
    assert [done.stdout.splitlines()[-1].split()[1] for done in found] == ["True", "True", "False"]
    assert found[1].stdout.splitlines()[-1].split()[0] == "3"


@pytest.mark.parametrize("verb", [[*GENERATE, "x"], ["eval", "-m", "x", "--text", "y"], ["train"]])
@pytest.mark.parametrize(
    ("value", "told"),
    [
        ("0", "--threads must be a whole number from 1 to "),
        ("-1", "cores; got -1"),
        ("20000", "cores; got 20000"),
        ("99999999999999999999", "got 99999999999999999999"),
        ("two", "invalid int value: 'two'"),
    ],
)
def test_threads_must_be_a_number_that_the_machine_can_use(
    verb: list[str], value: str, told: str, capsys: pytest.CaptureFixture[str]
):
    before = os.environ.get("LAMA_THREADS")
    assert main([*verb, f"--threads={value}"]) == 2
    assert os.environ.get("LAMA_THREADS") == before
    err = capsys.readouterr().err
    assert told in err and err.count("\n") == 1
