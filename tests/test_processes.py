"""Training by several processes on MPI: the same bits as one, faults, and refusals.

Tests with `mpiexec` are skipped where MPI cannot start.
"""

import os
import re
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from helpers import CATS
from tinygrad import Tensor

from lama.cli import main
from lama.cli import processes as launching
from lama.cli import training as commands
from lama.cli.processes import Launch, Report, is_passed, words_without
from lama.errors import LamaError, UsageError
from lama.models.gpt import GPTConfig
from lama.ops import square_parts
from lama.training import budget, prepare, sums
from lama.training.exchange import bucket_names, bucket_of, owners_of
from lama.training.folder import RunFolder
from lama.training.launched import MARK
from lama.training.loop import check_processes
from lama.training.prepare import new_session, resumed_run
from lama.training.processes import Processes
from lama.training.session import Session
from lama.training.settings import RunConfig
from lama.training.settings.base import TrainingConfig
from lama.training.sums import TreeSum, add_rows, numbers_of_processes

SETTINGS: dict[str, object] = {
    "d_model": 8,
    "n_layers": 1,
    "n_heads": 2,
    "batch_size": 8,
    "context_length": 8,
}
SETTINGS |= {"accumulation": 4, "warmup": 2, "dropout": 0.1, "steps": 120, "evaluate_every": 30}
WORKER = Path(__file__).with_name("mpi_worker.py")


# --- sums in a tree


def tree(leaves: list[np.ndarray]) -> np.ndarray:
    """The specification: neighbours are added, then their sums; a last one without a neighbour stays."""
    while len(leaves) > 1:
        pairs = [leaves[i : i + 2] for i in range(0, len(leaves), 2)]
        leaves = [pair[0] + pair[1] if len(pair) == 2 else pair[0] for pair in pairs]
    return leaves[0]


def leaves(n: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [(rng.standard_normal((3, 7)) * 10.0 ** rng.integers(-3, 3)).astype(np.float32) for _ in range(n)]


@pytest.mark.parametrize("on_host", [True, False], ids=["on the host", "by tinygrad"])
@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 8, 12])
def test_parts_are_added_in_a_fixed_tree(n: int, on_host: bool, monkeypatch: pytest.MonkeyPatch):
    if not on_host:
        monkeypatch.setattr(sums, "host_array", lambda tensor: None)
    given, total = leaves(n), TreeSum(n)
    gradient = {"w": Tensor.zeros(3, 7).contiguous().realize()}
    for _ in range(2):  # the second batch overwrites the first one's sums
        for i, leaf in enumerate(given):
            gradient["w"].assign(Tensor(leaf)).realize()
            total.add(i, gradient)
        assert gradient["w"].numpy().tobytes() == tree(given).tobytes()


@pytest.mark.parametrize(("n", "parts"), [(2, 4), (4, 4), (3, 12), (6, 12), (4, 32)])
def test_subtrees_of_processes_add_up_to_the_tree(n: int, parts: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sums, "IN_CACHE", 5)
    given = leaves(parts)
    size = parts // n
    rows = np.stack([tree(given[i : i + size]).reshape(-1) for i in range(0, parts, size)])
    assert add_rows(rows).tobytes() == tree(given).tobytes()


def test_processes_get_subtrees_or_everything():
    assert [numbers_of_processes(n) for n in (1, 4, 6, 12)] == [[1], [1, 2, 4], [1, 3, 6], [1, 3, 6, 12]]

    team = Processes.__new__(Processes)
    team.size = 2
    with pytest.raises(UsageError, match="can be shared among 1, 3 processes; got 2"):
        check_processes(TrainingConfig(batch_size=6, accumulation=3), team)


def test_squares_of_single_tensors_add_up_to_those_of_all():
    tensors = [Tensor(leaf).realize() for leaf in leaves(9)]
    found = [square_parts([t]).numpy() for t in tensors]
    total = np.zeros_like(found[0])
    for part in found:
        total += part
    assert square_parts(tensors).numpy().tobytes() == total.tobytes()


@pytest.mark.parametrize(
    ("gigabytes", "processes", "sharing", "message"),
    [
        (14, 1, 1, ""),
        (14, 4, 4, r"training needs over \d+ GB for weights, .*; this machine has 14 GB for 4 processes\."),
        (8, 1, 1, r"training needs over \d+ GB for weights, .*; this machine has 8 GB\."),
        (8, 4, 1, ""),
    ],
)
def test_processes_of_one_machine_share_its_memory(
    gigabytes: int, processes: int, sharing: int, message: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(budget, "memory_bytes", lambda: gigabytes * 10**9)
    config = RunConfig(batch_size=16, accumulation=16, context_length=8)
    shape = GPTConfig(1000, context_length=8, d_model=1024, n_layers=24, n_heads=8)
    with pytest.raises(UsageError, match=message) if message else nullcontext():
        budget.check_memory(config, shape, processes, sharing)


# --- buckets and owners


def test_buckets_hold_each_parameter_once_last_ones_first():
    sizes = {"embed": 9_000_000, "blocks.0.a": 2_000_000, "blocks.0.b": 3, "blocks.1.a": 3_000_000, "f": 5}
    assert bucket_names(sizes) == [["f", "blocks.1.a"], ["blocks.0.b", "blocks.0.a"], ["embed"]]


def test_a_bucket_is_cut_by_owners_where_that_is_about_equal():
    sizes = {"a": 10, "b": 9, "c": 30}
    owners = owners_of(sizes, 2)
    assert owners == {"a": 1, "b": 1, "c": 0}
    even, uneven = bucket_of(["a", "b"], sizes, {"a": 0, "b": 1}, 2), bucket_of(["c", "a"], sizes, owners, 2)
    assert (even.cuts, even.owned) == ((0, 10, 19), (0, 10, 19))
    assert (uneven.names, uneven.cuts, uneven.owned) == (("c", "a"), (0, 20, 40), (0, 30, 40))


# --- the launching command


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--processes", "0"], "--processes must be at least 1; got 0"),
        (["--processes", "2", "--devices", "2"], "--processes and --devices exclude each other"),
        (["--hosts", "a,b"], "--hosts and --restarts belong to --processes above 1"),
        (["--processes", "2", "--timeout", "0"], "--timeout must be above 0 seconds; got 0"),
        (["--processes", "2", "--restarts", "-1"], "--restarts must be at least 0; got -1"),
    ],
)
def test_wrong_numbers_are_refused_before_anything_starts(flags: list[str], message: str, capsys):
    assert main(["train", *flags]) == 2
    assert message in capsys.readouterr().err


def test_under_a_launcher_one_process_speaks_and_hosts_are_refused(monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setenv("PMI_SIZE", "2")
    said = "lama: the launcher chooses the hosts; got --hosts a,b. Leave it out\n"
    for rank, line in ("0", said), ("1", ""):
        monkeypatch.setenv("PMI_RANK", rank)
        assert main(["train", "--hosts", "a,b"]) == 2
        assert capsys.readouterr().err == line


def test_another_mpiexec_than_mpichs_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys):
    other = tmp_path / "mpiexec"
    other.write_text("#!/bin/sh\necho 'mpiexec (OpenRTE) 4.1'\n")
    other.chmod(0o755)
    monkeypatch.setattr(launching.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(launching.shutil, "which", lambda name, path: str(other))
    assert main(["train", "--processes", "2"]) == 2
    assert f"needs the mpiexec of MPICH; got {other}. Start lama under your own" in capsys.readouterr().err


def test_hosts_that_do_not_answer_are_named_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    ssh = tmp_path / "ssh"
    ssh.write_text('#!/bin/sh\necho "ssh: Permission denied" >&2\n[ "$1" = a ]\n')
    ssh.chmod(0o755)
    monkeypatch.setenv("HYDRA_LAUNCHER_EXEC", str(ssh))
    launch = Launch.__new__(Launch)
    launch.hosts = ["a", "b", "c"]
    with pytest.raises(LamaError, match=r"got no answer from b, c\. Try: ssh b true$"):
        launch.run()


def test_without_mpi_the_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(launching.importlib.util, "find_spec", lambda name: None)
    assert main(["train", "--processes", "2"]) == 2
    assert capsys.readouterr().err.strip().endswith("pip install 'lama[mpi]'")


def test_the_launchers_options_are_taken_out_of_the_command():
    words = [
        "train",
        "x.toml",
        "--processes",
        "4",
        "--out",
        "o",
        "--hosts=a,b",
        "--restart",
        "--restarts",
        "2",
    ]
    kept = ["train", "x.toml", "--out", "o", "--restart"]
    assert list(words_without(words, "--processes", "--hosts", "--restarts")) == kept


def test_the_banner_of_mpiexec_becomes_one_line():
    report = Report(processes=[("a", 11), ("b", 12)])
    banner = "=====\n=   BAD TERMINATION OF ONE\n=   PID 12 RUNNING AT b\n=   EXIT CODE: 9\n"
    banner += "[proxy:0@a] HYD_pmcd_pmip_control_cmd_cb (pmip_cb.c:490): assert (!closed) failed\n"
    assert all(report.read(line) for line in banner.splitlines(keepends=True))
    assert not report.read("lama: a line\n")
    assert report.lost(255) == "process 1 on b was lost (SIGKILL), and all have ended"  # 255 is ssh's


def test_a_restart_resumes_the_run_that_only_the_first_host_sees():
    launch = Launch.__new__(Launch)
    launch.args = Namespace(device=None, threads=3, track=None, timeout=60.0, reference=False)
    launch.hosts, launch.count, launch.words, launch.report = [], 2, ["train", "x.toml"], Report()
    assert launch.report.read(MARK + '{"folder": "/nowhere/run", "step": 0}\n')
    assert launch._choose_again()
    assert launch.words == ["train", "x.toml", "--restart", "--out", "/nowhere/run"]
    assert launch.report.read(MARK + '{"step": 30}\n')
    assert launch._choose_again()
    assert launch.words == ["train", "--resume", "/nowhere/run", "--threads=3", "--timeout=60.0"]


def test_a_restart_where_the_run_is_not_found_ends_with_the_command_to_resume(capsys):
    launch = Launch.__new__(Launch)
    launch.args = Namespace(device=None, threads=None, track=None, timeout=60.0, reference=False, restarts=1)
    launch.hosts, launch.count, launch.words = [], 2, ["train", "x.toml"]
    launch.options, launch.report, launch._received = ["--processes", "2"], Report(), []
    codes = iter([9, 2])

    def run_once() -> int:
        launch.report = Report("out/x", 30, told=True)
        return next(codes)

    launch._run_once = run_once
    assert launch.run() == 138
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1] == "lama: resume with: lama train --resume out/x --processes 2"


def test_a_launch_that_starts_no_process_is_an_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(launching, "answers", lambda host: True)
    launch = Launch.__new__(Launch)
    launch.args, launch.hosts, launch._received = Namespace(restarts=0), ["a", "b"], []
    launch.report, launch._run_once = Report(), lambda: 255
    with pytest.raises(LamaError, match="could not start processes on a, b; got exit code 255"):
        launch.run()


def test_after_a_closed_output_the_same_events_are_drained(corpus, tmp_path: Path, monkeypatch, capsys):
    begun: list[Session] = []
    begin = Session.__iter__

    def counted(session: Session) -> Iterator[object]:
        begun.append(session)
        return begin(session)

    def closed(session: Session, args: Namespace, events: Iterator[object]) -> None:
        next(events)
        raise BrokenPipeError

    monkeypatch.setattr(Session, "__iter__", counted)
    monkeypatch.setattr(commands, "watch", closed)
    settings = [f"--{name.replace('_', '-')}={value}" for name, value in SETTINGS.items()]
    out = tmp_path / "out"
    assert main(["train", "--corpus", str(corpus), "--out", str(out), "--device", "CPU", *settings]) == 141
    assert "stopped after step 1 of 120; resume with" in capsys.readouterr().err
    assert len(begun) == 1


def test_secrets_of_the_environment_stay_on_their_host():
    names = ["PATH", "LAMA_THREADS", "DEV", "HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET", "BASH_FUNC_x%%"]
    assert [name for name in names if is_passed(name)] == names[:3]


# --- several processes


@pytest.fixture(scope="module")
def mpiexec() -> str:
    """The path of mpiexec. Skips where MPI cannot start."""
    pytest.importorskip("mpi4py")
    path = Path(sys.executable).with_name("mpiexec")
    if not path.exists():
        pytest.skip("no mpiexec beside this Python: pip install 'lama[mpi]'")
    code = "from mpi4py import MPI; assert MPI.COMM_WORLD.size == 2"
    done = subprocess.run([path, "-n", "2", sys.executable, "-c", code], capture_output=True, timeout=120)
    if done.returncode:
        pytest.skip(f"MPI cannot start here: {done.stderr.decode()[-200:]}")
    return str(path)


def in_a_team(mpiexec: str, n: int, *words: str) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "LAMA_THREADS": "1"}
    command = [mpiexec, "-n", str(n), sys.executable, str(WORKER), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)


def trained_in_a_team(mpiexec: str, n: int, *words: str) -> list[str]:
    done = in_a_team(mpiexec, n, *words)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_four_processes_train_to_the_bits_of_one(mpiexec: str):
    assert trained_in_a_team(mpiexec, 4, "4", "adamw", "muon", "data") == ["data", "adamw", "muon"]


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("versions", r"process 0: all processes must have the same lama; got .* and 0\.0\.7 .* on \S+\."),
        ("data", r"process 1: \S+/b/data must hold the run's data or nothing; got other files\. Remove it"),
        ("unwritable", r"process 1: the folder \S+/b/data cannot be written: Not a directory"),
    ],
)
def test_what_one_process_refuses_ends_all_in_one_line(mpiexec: str, tmp_path: Path, what: str, message: str):
    done = in_a_team(mpiexec, 2, "refuse", what, str(tmp_path))
    assert done.returncode > 0
    assert re.fullmatch(f"lama: {message}.*\n", done.stderr), done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("n", "parts"), [(2, 4), (4, 8), (3, 12), (6, 6)])
def test_other_numbers_of_processes_train_to_the_bits_of_one(mpiexec: str, n: int, parts: int):
    names = ["adamw", "muon", "recompute", "lora"]
    assert trained_in_a_team(mpiexec, n, str(parts), *names) == names


def test_a_process_that_follows_opens_the_device_first(monkeypatch: pytest.MonkeyPatch):
    """With an empty cache, tinygrad would look for a compiler on PATH as soon as it computes."""
    done: list[str] = []
    monkeypatch.setattr(prepare, "open_device", lambda: done.append("open"))
    monkeypatch.setattr(Processes, "share", lambda team: done.append("share"))
    team = Processes.__new__(Processes)
    assert prepare.followed(team) is None and done == ["open", "share"]


class Training:
    """A `lama train --processes` in another process, and its ranks."""

    def __init__(self, folder: Path, *words: object, inside: Sequence[str] = ()):
        command = [*inside, sys.executable, "-m", "lama", "train", "--out", str(folder), *map(str, words)]
        self.folder = folder
        self.child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def wait_for_checkpoint(self) -> None:
        limit = time.monotonic() + 300
        while not RunFolder(self.folder).checkpoints():
            assert self.child.poll() is None, self.child.communicate()[0]
            assert time.monotonic() < limit
            time.sleep(0.05)

    def is_alive(self) -> bool:
        return self.child.poll() is None

    def ranks(self) -> dict[int, int]:
        """The process number of each rank."""
        found = {}
        for place in Path("/proc").glob("[0-9]*"):
            try:
                words, environment = (place / "cmdline").read_bytes(), (place / "environ").read_bytes()
            except OSError:
                continue
            rank = re.search(rb"PMI_RANK=(\d+)", environment)
            if rank and str(self.folder).encode() in words:
                found[int(rank[1])] = int(place.name)
        return found

    def end(self) -> tuple[int, str]:
        """The exit code and the output."""
        output = self.child.communicate(timeout=600)[0]
        return self.child.returncode, output


def weights(folder: Path) -> dict[str, bytes]:
    last = RunFolder(folder).last_checkpoint()
    files = [folder / "model.safetensors", *last.glob("*.safetensors")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "cats.txt"
    path.write_text(CATS)
    return path


@pytest.fixture(scope="module")
def wanted(corpus: Path) -> tuple[dict[str, bytes], list[float]]:
    """Weights of one process, and its held-out losses."""
    folder = RunFolder(corpus.parent / "one")
    session = new_session(folder, {"corpus": [str(corpus)], **SETTINGS}, "lama train ...")
    session.measure_start()
    list(session)
    return weights(folder.path), losses(folder)


def losses(folder: RunFolder) -> list[float]:
    return [line["validation_loss"] for line in folder.read_log() if "validation_loss" in line]


@pytest.fixture
def start(mpiexec: str, corpus: Path, tmp_path: Path) -> Iterator[Callable[..., Training]]:
    settings = [word for n, v in SETTINGS.items() for word in (f"--{n.replace('_', '-')}", v)]
    started: list[Training] = []

    def start(*words: object, processes: int = 2, inside: Sequence[str] = ()) -> Training:
        all_words = ["--corpus", corpus, *settings, "--processes", processes, *words]
        started.append(Training(tmp_path / "out", *all_words, inside=inside))
        return started[-1]

    yield start
    for training in started:
        training.child.kill()


BARE_SSH = """#!/bin/sh
# In place of ssh: run a command, as ssh does, without the environment of this process.
while [ "${1#-}" != "$1" ]; do shift; done
shift
exec env -i PATH="$PATH" HOME="$HOME" sh -c "$*"
"""


@pytest.mark.parametrize("hosts", ["", "a.invalid,b.invalid"], ids=["here", "by ssh"])
def test_a_killed_process_is_named_and_the_run_goes_on(
    start, wanted, hosts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    ssh = tmp_path / "ssh"
    ssh.write_text(BARE_SSH)
    ssh.chmod(0o755)
    monkeypatch.setenv("HYDRA_LAUNCHER_EXEC", str(ssh))
    training = start("--restarts", 1, *(["--hosts", hosts] if hosts else []))
    training.wait_for_checkpoint()
    os.kill(training.ranks()[1], signal.SIGKILL)
    code, output = training.end()
    assert code in (0, 1), output  # 1: so short a training is no better than counting
    assert re.search(r"lama: process 1 on \S+ was lost \(SIGKILL\), and all have ended\n", output)
    assert re.search(r"lama: restart 1 of 1: 2 processes( on a.invalid, b.invalid)?, from step \d+\n", output)
    assert "BAD TERMINATION" not in output
    assert (weights(training.folder), losses(RunFolder(training.folder))) == wanted


def test_sigterm_on_any_process_saves_and_another_number_goes_on(start, wanted):
    training = start()
    training.wait_for_checkpoint()
    os.kill(training.ranks()[1], signal.SIGTERM)
    code, output = training.end()
    assert code == 143, output
    assert re.search(
        r"lama: stopped by SIGTERM after step \d+ of 120; resume with: .* --processes 2\n", output
    )
    list(resumed_run(RunFolder(training.folder), {}))
    assert (weights(training.folder), losses(RunFolder(training.folder))) == wanted


def test_a_closed_terminal_of_the_launcher_saves_and_ends_all(start):
    training = start()
    training.wait_for_checkpoint()
    training.child.send_signal(signal.SIGHUP)
    code, output = training.end()
    assert code == 143, output
    assert re.search(r"lama: stopped by SIGTERM after step \d+ of 120; resume with: ", output)
    assert training.ranks() == {}


def test_a_silent_process_ends_all_with_its_name(start):
    training = start("--timeout", 2)
    training.wait_for_checkpoint()
    os.kill(training.ranks()[1], signal.SIGSTOP)
    code, output = training.end()
    assert code == 138, output
    assert re.search(r"lama: process 1 on \S+ was silent for 2 s, and all have ended\n", output)
    assert training.ranks() == {}


def test_a_number_that_does_not_fit_is_refused_in_one_line(start):
    code, output = start(processes=3).end()
    assert (code, output.count("\n")) == (2, 1)
    assert "accumulation=4 can be shared among 1, 2, 4 processes; got 3" in output


@pytest.mark.slow
def test_twenty_killed_processes_change_nothing(start, wanted):
    """A random process is killed at a random time, again and again; the end is that of the quiet run."""
    rng, killed = np.random.default_rng(0), 0
    training = start("--restarts", 40, "--evaluate-every", 5, "--keep", 40, processes=4)
    while killed < 20 and training.is_alive():
        time.sleep(rng.uniform(0.5, 3.5))  # most kills meet the start, some a step
        if ranks := training.ranks():
            os.kill(ranks[rng.choice(list(ranks))], signal.SIGKILL)
            killed += 1
    code, output = training.end()
    assert killed == 20 and code in (0, 1), output[-3000:]
    found = weights(training.folder)
    assert {name: found[name] for name in found if "step-000120" in name} == {
        name: content for name, content in wanted[0].items() if "step-000120" in name
    }


SSH = """#!/bin/sh
# In place of ssh: run a command in the network namespace that has this address, if its cable is plugged in.
while [ "${1#-}" != "$1" ]; do shift; done
case $1 in 10.77.0.1) space=A;; *) space=B;; esac
[ $space = A ] || ip -n NAME$space link show vB | grep -q "state UP" || exit 255
shift
exec ip netns exec NAME$space sh -c "$*"
"""


@pytest.fixture
def network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., str]]:
    """Two network namespaces with a cable of 1 Gbit/s between them: runs `ip` with NAME for their names."""
    name = f"lama{os.getpid()}"

    def ip(words: str, program: str = "ip") -> str:
        command = [program, *words.replace("NAME", name).split()]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    try:
        ip("netns add NAMEA")
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"network namespaces need root and iproute2: {error}")
    try:
        ip("netns add NAMEB")
        ip("link add vA netns NAMEA type veth peer name vB netns NAMEB")
        for i, side in enumerate("AB", 1):
            ip(f"-n NAME{side} addr add 10.77.0.{i}/24 dev v{side}")
            ip(f"-n NAME{side} link set lo up")
            ip(f"-n NAME{side} link set v{side} up")
        ip("-n NAMEA qdisc add dev vA root tbf rate 1gbit burst 256kb latency 50ms", program="tc")
        while "state UP" not in ip("-n NAMEB link show vB"):
            time.sleep(0.1)
        ssh = tmp_path / "ssh"
        ssh.write_text(SSH.replace("NAME", name))
        ssh.chmod(0o755)
        monkeypatch.setenv("HYDRA_LAUNCHER", "ssh")
        monkeypatch.setenv("HYDRA_LAUNCHER_EXEC", str(ssh))
        monkeypatch.setenv("HYDRA_IFACE", "vA")
        monkeypatch.setenv("UCX_TLS", "tcp")  # else it finds the memory that both sides share
        yield ip
    finally:
        for side in "AB":
            subprocess.run(["ip", "netns", "del", f"{name}{side}"], check=False, capture_output=True)


@pytest.mark.slow
def test_a_host_that_is_cut_off_is_named_and_the_other_goes_on(network, start, wanted):
    enter = ["ip", "netns", "exec", f"lama{os.getpid()}A"]
    hosts = ["--hosts", "10.77.0.1,10.77.0.2", "--timeout", 3, "--restarts", 1]
    training = start(*hosts, "--threads", 1, inside=enter)
    training.wait_for_checkpoint()
    counters = re.findall(r"RX:.*\n\s*(\d+)", network("-n NAMEA -s link show vA"))
    network("-n NAMEB link set vB down")
    code, output = training.end()
    numbers = 256 * 8 + 8 * 8 + 12 * 8 * 8 + 13 * 8 + 4 * 8  # of the model, about
    assert int(counters[0]) > 30 * 4 * numbers  # half of the gradients and half of the weights, each step
    assert code in (0, 1), output
    assert re.search(r"lama: process 1 on 10.77.0.2 was silent for 3 s, and all have ended\n", output)
    assert re.search(r"lama: restart 1 of 1: 1 process on 10.77.0.1, from step \d+\n", output)
    assert (weights(training.folder), losses(RunFolder(training.folder))) == wanted
