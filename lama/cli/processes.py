"""`lama train --processes N`: start the processes, watch them, and start them again after a fault."""

import argparse
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import FrameType
from typing import IO, TYPE_CHECKING, Any, TextIO

from lama.cli import Parser, explained
from lama.cli.live import HANGUP
from lama.errors import LamaError, UsageError, check_least, note
from lama.training.launched import LAUNCHED, MARK, MISSING, RETRY, follows, launched, tell_launcher

if TYPE_CHECKING:
    from lama.training.processes import Processes
    from lama.training.session import Session

Train = Callable[[argparse.Namespace, "Processes | None"], int]
Follow = Callable[[argparse.Namespace, "Processes"], int]
BANNER = re.compile(
    r"=+$|=   (BAD|PID|EXIT|CLEAN|YOU)|YOUR APPLICATION TERM|This typically|Please see the FAQ"
    r"|\[(mpiexec|proxy:\d+)@"
)
"""Lines that MPICH's mpiexec prints when a process ends; lama prints one line instead."""
SECRET = re.compile(r"TOKEN|SECRET|KEY|PASSW|CREDENTIAL|AUTH|COOKIE")
"""Names of environment variables that are not sent to other hosts."""
LAST = "LAMA_LAST"  # with -genvlist, mpiexec of MPICH 5.0 leaves out the last variable of its environment
AGAIN = 5.0  # seconds in which mpiexec must end after a fault, and in which a host must connect
OURS = {0, 1, 2, 129, 130, 141, 143}
"""Exit codes of a run that ended by itself, or that was asked to."""


def add_options(parser: Parser) -> None:
    parser.add("--processes N", "train in N processes on MPI, with the bits of one (default 1)", type=int)
    parser.add("--hosts A,B", "with --processes: the hosts to start them on, by ssh (default this one)")
    silent = "seconds after which a silent process counts as lost, and all end (default 60)"
    parser.add("--timeout SECONDS", silent, type=float, default=60.0)
    restarts = "with --processes: times to resume after a lost process, on hosts that answer (default 0)"
    parser.add("--restarts N", restarts, type=int, default=0)


def run(args: argparse.Namespace, train: Train, follow: Follow) -> int:
    """Train here, in the processes that a launcher started, or in new ones. Returns the exit code."""
    check_least("--processes", args.processes, 1)
    check_least("--restarts", args.restarts, 0)
    if args.timeout <= 0:
        raise UsageError(f"--timeout must be above 0 seconds; got {args.timeout:g}")
    several = (args.processes or 1) > 1 or launched() > 1
    if several and args.devices is not None:
        raise UsageError("--processes and --devices exclude each other: a process trains on one device")
    if launched() > 1 and LAUNCHED not in os.environ:
        if args.hosts:
            raise UsageError(f"the launcher chooses the hosts; got --hosts {args.hosts}. Leave it out")
        if args.restarts and not follows():
            note("--restarts does nothing here: another launcher than lama started the processes")
    if launched() > 1 or LAUNCHED in os.environ:
        return join(args, train, follow) if launched() > 1 else train(args, None)
    if not several:
        if args.hosts or args.restarts:
            raise UsageError("--hosts and --restarts belong to --processes above 1; got 1")
        return train(args, None)
    return Launch(args).run()


def join(args: argparse.Namespace, train: Train, follow: Follow) -> int:
    """Train as one of the processes; an error in one ends all. Returns the exit code."""
    from lama.training.processes import Processes

    team = Processes(args.timeout)
    try:
        team.meet()
        if team.rank:
            return team.close(follow(args, team))
        if LAUNCHED not in os.environ and args.processes not in (None, team.size):
            got = f"got {args.processes}. Leave it out"
            raise UsageError(f"--processes must be the number that the launcher started, {team.size}; {got}")
        code = train(args, team)
    except (Exception, KeyboardInterrupt) as error:
        code, message = explained(error)
        if team.rank or (len(set(team.hosts)) > 1 and isinstance(error.__cause__, OSError)):
            message = f"{team.hosts[team.rank]}, process {team.rank}: {message}"
        if args.traceback:
            import traceback

            traceback.print_exc()  # of the first process
        if team.rank or team.stage == "train":
            team.fail(message, code)
        note(message)
        if team.stage == "begin":
            team.share(None)
    return team.close(code)


def tell(session: "Session", team: "Processes | None") -> None:
    """Tell the command that started the processes about the run."""
    from lama.training.sums import numbers_of_processes

    config = session.config
    fitting = numbers_of_processes(config.accumulation)
    if team and config.exchange != "float32":  # another number would give other weights
        fitting = [team.size]
    about = {"folder": str(session.folder.path), "step": session.step, "fitting": fitting}
    started = list(zip(team.hosts, team.pids, strict=True)) if team else []
    tell_launcher(about | {"processes": started})


@dataclass
class Report:
    """Facts about the processes that mpiexec runs, from the lines that they print."""

    folder: str = ""
    step: int = 0
    """The last checkpoint's step; the folder may be on a disk that only the first host sees."""
    fitting: Sequence[int] = ()
    """The numbers of processes that can share a batch."""
    began: bool = False
    """Whether the processes have found or created the run."""
    processes: list[tuple[str, int]] = field(default_factory=list)
    """The host and the process number of each process."""
    end: Callable[[], None] = lambda: None
    """End mpiexec, which otherwise waits for hosts that do not answer."""
    code: int | None = None
    """The exit code of a process that ended the others."""
    told: bool = False
    """Whether a line has given the reason for the end."""
    pid: int = 0
    host: str = ""
    """The number and the host of the process that mpiexec found dead."""
    died: int = 0
    """Its exit code or signal; mpiexec itself may end with another code, such as that of ssh."""

    def read(self, line: str) -> bool:
        """Read a line. Returns whether it was for this command, not for the screen."""
        if line.startswith(MARK):
            with suppress(ValueError):
                about: dict[str, Any] = json.loads(line.removeprefix(MARK))
                self.began |= "folder" in about
                self.folder = about.get("folder", self.folder)
                self.step = about.get("step", self.step)
                self.fitting = about.get("fitting", self.fitting)
                self.code = about.get("code", self.code)
                if "code" in about:
                    timer = threading.Timer(AGAIN, self.end)
                    timer.daemon = True
                    timer.start()
                self.processes = [(host, pid) for host, pid in about.get("processes", self.processes)]
            return True
        if found := re.match(r"=   PID (\d+) RUNNING AT (\S+)", line):
            self.pid, self.host = int(found[1]), found[2]
        if found := re.match(r"=   EXIT CODE: (\d+)", line):
            self.died = int(found[1])
        return BANNER.match(line) is not None

    def lost(self, code: int) -> str:
        """The message about a lost process."""
        numbers = [i for i, (_, pid) in enumerate(self.processes) if pid == self.pid]
        who = f"process {numbers[0]}" if numbers else "a process"
        host = f" on {self.host}" if self.host else ""
        code = self.died or code
        how = f"exit code {code}"
        number = code - 128 if code > 128 else code
        with suppress(ValueError):
            how = signal.Signals(number).name
        return f"{who}{host} was lost ({how}), and all have ended"


class Launch:
    """The processes of a run on MPI, started by mpiexec."""

    def __init__(self, args: argparse.Namespace):
        """Raises UsageError where MPI is missing."""
        folders = [os.path.dirname(sys.executable), os.environ.get("PATH", os.defpath)]
        mpiexec = shutil.which("mpiexec", path=os.pathsep.join(folders))
        if importlib.util.find_spec("mpi4py") is None or mpiexec is None:
            raise UsageError(MISSING)
        about = subprocess.run([mpiexec, "--version"], capture_output=True, text=True, check=False).stdout
        if "HYDRA" not in about:
            advice = "Start lama under your own mpiexec, or put MPICH's first in PATH"
            raise UsageError(f"--processes needs the mpiexec of MPICH; got {mpiexec}. {advice}")
        self.args, self.mpiexec = args, mpiexec
        self.hosts = [host for host in (args.hosts or "").split(",") if host]
        self.count: int = args.processes
        self.words = [*words_without(args.argv, "--processes", "--hosts", "--restarts")]
        self.options = ["--processes", str(args.processes), *(["--hosts", args.hosts] if args.hosts else [])]
        self.report = Report()
        self._received: list[int] = []

    def run(self) -> int:
        """Run to the end, with restarts. Returns the exit code.

        Raises LamaError if no process starts, and for hosts that do not answer: ssh would wait for minutes.
        """
        by_ssh = os.environ.get("HYDRA_LAUNCHER", "ssh") == "ssh" and "SLURM_JOB_ID" not in os.environ
        found = answering(self.hosts) if by_ssh and self.hosts else self.hosts
        if silent := [host for host in self.hosts if host not in found]:
            got = f"got no answer from {', '.join(silent)}. Try: ssh {silent[0]} true"
            raise LamaError(f"each host must run a command by ssh without a password; {got}")
        for restart in range(self.args.restarts + 1):
            code = self._run_once()
            gone = restart > 0 and self.report.step > 0 and not self.report.began
            if self._received or (code in OURS and not gone):
                return code
            started = self.report.told or self.report.pid or self.report.processes or self.report.step
            if not started and restart == self.args.restarts:
                where = f" on {', '.join(self.hosts)}" if self.hosts else ""
                got = f"exit code {code}. See its lines above"
                raise LamaError(f"mpiexec could not start processes{where}; got {got}")
            if not self.report.told:
                note(self.report.lost(code) if self.report.pid else f"mpiexec ended with exit code {code}")
            if restart == self.args.restarts or not self._choose_again():
                if restart < self.args.restarts:
                    note(f"no restart: too few hosts answer; got {', '.join(self.hosts) or 'none'}")
                if self.report.step:
                    words = ["--resume", self.report.folder, *self.options]
                    note(f"resume with: {shlex.join(['lama', 'train', *words])}")
                return RETRY
            where = f" on {', '.join(self.hosts)}" if self.hosts else ""
            processes = "1 process" if self.count == 1 else f"{self.count} processes"
            place = f"restart {restart + 1} of {self.args.restarts}"
            begin = f"step {self.report.step}" if self.report.step else "the start"
            note(f"{place}: {processes}{where}, from {begin}")
        return code

    def _command(self) -> list[str]:
        hosts = ["-hosts", ",".join(self.hosts), "-ppn", str(self._each())] if self.hosts else []
        if self.hosts:  # the environment passes through the network in plain text
            hosts += ["-genvlist", ",".join([*filter(is_passed, os.environ), LAUNCHED])]
        return [self.mpiexec, "-n", str(self.count), *hosts, sys.executable, "-m", "lama", *self.words]

    def _each(self) -> int:
        """The number of processes on each host."""
        return -(-self.count // max(1, len(self.hosts)))

    def _run_once(self) -> int:
        self.report = Report(self.report.folder, self.report.step, self.report.fitting)
        pipe = subprocess.PIPE
        environment = {**os.environ, LAUNCHED: shlex.join(self.options), LAST: ""}
        child = subprocess.Popen(
            self._command(), stdout=pipe, stderr=pipe, env=environment, start_new_session=True
        )
        assert child.stdout is not None and child.stderr is not None
        self.report.end = child.kill
        printing = threading.Thread(target=self._print, args=(child.stdout, sys.stdout), daemon=True)
        printing.start()
        with self._passing_signals(child):
            self._print(child.stderr, sys.stderr)
            code = child.wait()
            printing.join(AGAIN)
        code = 128 - code if code < 0 else code
        return code if self.report.code is None else self.report.code

    def _print(self, lines: IO[bytes], screen: TextIO) -> None:
        """Print lines of the processes, except those for this command."""
        for content in lines:
            line = content.decode("utf-8", "surrogateescape")
            if self.report.read(line):
                continue
            self.report.told |= line.startswith("lama: ")
            try:
                screen.write(line)
                screen.flush()
            except OSError:  # closed: the processes save and end
                screen = open(os.devnull, "w")  # noqa: SIM115
                if not self._received:
                    os.kill(os.getpid(), signal.SIGTERM)

    @contextmanager
    def _passing_signals(self, child: "subprocess.Popen[bytes]") -> Iterator[None]:
        """Pass signals on to mpiexec, which sends them to all processes; a closed terminal's as SIGTERM."""

        def handle(number: int, frame: FrameType | None) -> None:
            if number == HANGUP and self._received:
                return  # a second signal would end the processes before they have saved
            self._received.append(number)
            with suppress(OSError):
                child.send_signal(signal.SIGTERM if number == HANGUP else number)

        numbers = [signal.SIGINT, signal.SIGTERM]
        if HANGUP is not None and signal.getsignal(HANGUP) is not signal.SIG_IGN:
            numbers.append(HANGUP)
        before = {number: signal.signal(number, handle) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _choose_again(self) -> bool:
        """Choose hosts that answer, the number of processes and the command. Returns whether any answers."""
        if self.hosts:
            each, self.hosts = self._each(), answering(self.hosts)
            fitting = self.report.fitting or [self.count]
            self.count = max((n for n in fitting if n <= each * len(self.hosts)), default=0)
        if "--resume" in self.words or not self.report.folder:
            return self.count > 0
        if self.report.step:
            here = ("device", "threads", "track", "timeout")
            given = {name: value for name in here if (value := getattr(self.args, name)) is not None}
            self.words = ["train", "--resume", self.report.folder]
            self.words += [f"--{name}={value}" for name, value in given.items()]
            self.words += ["--reference"] if self.args.reference else []
        else:
            self.words = [*words_without(self.words, "--out", "--restart"), "--restart"]
            self.words += ["--out", self.report.folder]
        return self.count > 0


def answering(hosts: Sequence[str]) -> list[str]:
    """The given hosts that answer; all are asked at once."""
    from concurrent.futures import ThreadPoolExecutor  # late: every verb's start would load it

    with ThreadPoolExecutor(len(hosts)) as pool:
        return [host for host, found in zip(hosts, pool.map(answers, hosts), strict=True) if found]


def answers(host: str) -> bool:
    """Whether a host runs a command by ssh, or by the launcher that HYDRA_LAUNCHER_EXEC names."""
    if host in ("localhost", "127.0.0.1", socket.gethostname()):
        return True
    ssh = ["ssh", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={AGAIN:.0f}"]
    program = [own] if (own := os.environ.get("HYDRA_LAUNCHER_EXEC")) else ssh
    try:
        done = subprocess.run([*program, host, "true"], capture_output=True, timeout=6 * AGAIN, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


def is_passed(name: str) -> bool:
    """Whether a variable of the environment goes to other hosts: secrets do not."""
    return name.isidentifier() and not SECRET.search(name.upper())


def words_without(words: Sequence[str], *options: str) -> list[str]:
    """A command's words without these options and their values; --restart has none."""
    kept, skip = [], False
    for word in words:
        if not skip and word.split("=")[0] not in options:
            kept.append(word)
        skip = not skip and word in options and word != "--restart"
    return kept
