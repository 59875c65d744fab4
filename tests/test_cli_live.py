"""What is seen of long work, and the signals that end it."""

import os
import signal
import sys

import pytest

from lama.cli import live
from lama.cli.live import progress, stopping


class Session:
    stopped = 0

    def stop(self) -> None:
        self.stopped += 1


def test_progress_into_a_file_is_plain_lines(monkeypatch, capsys):
    assert list(progress(range(3), 3, "window")) == [0, 1, 2]
    out, err = capsys.readouterr()
    assert (
        (out, err.count("\n")) == ("", 1)
        and err.startswith("window: 3/3, 100%, ")
        and err.endswith(" window/s\n")
    )
    assert list(progress(range(3), unit="piece", label="tokenizing")) == [0, 1, 2]
    assert capsys.readouterr().err == ""  # quick, and how many there are is not known
    monkeypatch.setattr(live, "SECONDS_BETWEEN_LINES", 0)
    assert list(progress(range(1200), unit="piece", label="tokenizing"))[-1] == 1199
    assert capsys.readouterr().err.splitlines()[-1].startswith("tokenizing: 1,200, ")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_first_signal_stops_the_session_and_the_second_the_program(number, capfd, monkeypatch):
    class Second(Exception):
        pass

    def outside(number: int, frame: object) -> None:
        raise Second

    monkeypatch.setattr(live, "_forget_terminal", lambda: None)
    before = signal.signal(number, outside)
    try:
        session = Session()
        with pytest.raises(Second), stopping(session.stop) as received:
            os.kill(os.getpid(), number)
            assert (session.stopped, received) == (1, [number])
            os.kill(os.getpid(), number)
        assert signal.getsignal(number) is outside
    finally:
        signal.signal(number, before)
    assert capfd.readouterr().err == "\nstopping after this step; once more to stop at once\n"


def test_closed_terminal_takes_what_is_written_and_a_file_keeps_it(tmp_path):
    """Standard output is a pipe that nobody reads any more, standard error a file."""
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        code = 1
        try:
            os.dup2(write, 1)
            os.dup2(os.open(tmp_path / "err", os.O_WRONLY | os.O_CREAT), 2)
            for handle in (read, write):
                os.close(handle)
            signal.signal(signal.SIGHUP, signal.SIG_DFL)  # `nohup pytest` ignores it
            with stopping(Session().stop):
                os.kill(os.getpid(), signal.SIGHUP)
                os.write(1, b"lost")
                os.write(2, b"kept")
            code = 0
        finally:
            os._exit(code)
    for handle in (read, write):
        os.close(handle)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, sys.stderr
    assert (tmp_path / "err").read_text().endswith("kept")
