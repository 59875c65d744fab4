"""Lines of standard input, as the commands that answer each line read them."""

import io
import sys

import pytest

from lama.cli import main
from lama.cli.lines import at_once, in_batches, input_lines
from lama.errors import LamaError, UsageError


def stdin(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding="utf-8"))


def test_lines_come_without_their_ends(monkeypatch):
    stdin(monkeypatch, b"one\n\n two \r\nthree")
    assert list(input_lines()) == ["one", "", " two ", "three"]


def test_batches_are_full_but_for_the_last():
    assert list(in_batches("abcde", 2)) == [["a", "b"], ["c", "d"], ["e"]]
    assert list(in_batches("", 2)) == []


def test_a_pipe_is_answered_many_lines_at_a_time_a_person_one_by_one(monkeypatch):
    stdin(monkeypatch, b"")
    assert at_once(16) == 16
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    assert at_once(16) == 1


def test_what_is_not_text_is_refused_in_one_line(monkeypatch):
    stdin(monkeypatch, b"caf\xe9\n")
    with pytest.raises(LamaError, match=r"^standard input must be UTF-8 text; got byte 0xe9$"):
        list(input_lines())
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(UsageError, match=r"^standard input must be open for -; got none"):
        list(input_lines())


def test_fill_wants_a_guess_or_more(capfd):
    assert main(["fill", "nowhere", "a [MASK]", "-n", "0"]) == 2
    assert capfd.readouterr().err == "lama: n must be at least 1; got 0\n"
