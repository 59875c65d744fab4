"""Lines of standard input, as the commands that answer each line read them."""

import io
import subprocess
import sys

import pytest

from lama.cli import main
from lama.cli.lines import answer_lines, at_once, in_batches, input_text
from lama.errors import LamaError, UsageError


def stdin(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding="utf-8"))


@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n"])
def test_input_text_has_line_feeds_and_no_last_end(monkeypatch, end):
    stdin(monkeypatch, b"one\n\n two \r\nthree" + end)
    assert input_text() == "one\n\n two \nthree"


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
        input_text()
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(UsageError, match=r"^standard input must be open for -; got none"):
        input_text()


def shout(texts: list[str]) -> list[str]:
    """The answers of a command that does not know the letter x."""
    assert texts and all(text.strip() for text in texts)
    if any("x" in text for text in texts):
        raise LamaError("no x, please")
    return [text.upper() for text in texts]


def answered(monkeypatch, capsys, content: bytes, most: int = 3) -> tuple[int, str, str]:
    stdin(monkeypatch, content)
    code = answer_lines(shout, most)
    return code, *capsys.readouterr()


def test_every_line_has_its_line_whatever_is_wrong_with_another(monkeypatch, capsys):
    content = b"\xef\xbb\xbfa\nx\n\n \t\nb\r\n\xff\nc\rd\n\xe2\x80\xa8e\n" + b"f" * (1 << 20) + b"g\nh"
    lines = ["A", "", "", "", "B", "", r"C\rD", r"\u2028E", "", "H"]
    for most in (1, 3, 100):
        code, out, err = answered(monkeypatch, capsys, content, most)
        assert (code, out.split("\n")) == (1, [*lines, ""])
        assert err.splitlines() == [
            "lama: line 2: no x, please",
            "lama: line 6: the text must be UTF-8; got byte 0xff",
            "lama: line 9: a line must have at most 1,048,576 bytes; got more",
        ]


def test_lines_that_are_all_answered_exit_with_0(monkeypatch, capsys):
    assert answered(monkeypatch, capsys, b"") == (0, "", "")
    assert answered(monkeypatch, capsys, b"\n\r\n  \n") == (0, "\n\n\n", "")
    assert answered(monkeypatch, capsys, b"a\nb\n") == (0, "A\nB\n", "")
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(UsageError, match=r"^standard input must be open for -; got none"):
        answer_lines(shout, 1)


def test_line_is_answered_before_the_next_one_comes():
    code = "from lama.cli.lines import answer_lines; answer_lines(lambda texts: texts, 16)"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin and process.stdout
        for text in ("one\n", "two\n"):
            process.stdin.write(text)
            process.stdin.flush()
            assert process.stdout.readline() == text


def test_fill_wants_a_guess_or_more(capfd):
    assert main(["fill", "nowhere", "a [MASK]", "-n", "0"]) == 2
    assert capfd.readouterr().err == "lama: n must be at least 1; got 0\n"
