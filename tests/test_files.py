"""Small files from elsewhere: what is within the limits is read as it is, all else is one clear line."""

import os

import pytest

from lama.errors import LamaError, quoted
from lama.files import (
    DEEPEST,
    LARGEST,
    checked,
    field,
    parse_json,
    parse_json_lines,
    parse_toml,
    read_file,
    read_json,
    read_object,
)


def test_json_within_the_limits_is_read_as_it_is():
    assert parse_json(b'{"a": [1, -2.5, 1e3, true, null, "\\ud83d\\ude42"]}', "x") == {
        "a": [1, -2.5, 1000.0, True, None, "\U0001f642"]
    }
    assert parse_json(b"[" * DEEPEST + b"]" * DEEPEST, "x") is not None
    assert parse_json(b"1" * 40, "x") == int("1" * 40)


@pytest.mark.parametrize(
    ("content", "wrong"),
    [
        (b"{", "Expecting property name enclosed in double quotes at line 1, column 2"),
        (b"", "Expecting value at line 1, column 1"),
        (b"\xff", "byte 0xff at offset 0, which is not UTF-8"),
        (b"[" * 101 + b"]" * 101, "over 100 levels"),
        (b"[" * 100_000, "over 100 levels"),
        (b'{"a":' * 5000 + b"1" + b"}" * 5000, "over 100 levels"),
        (b"9" * 41, "a whole number of 41 digits"),
        (b"-" + b"9" * 5000, "a whole number of 5,001 digits"),
        (b"[NaN]", "the number NaN, which is not finite"),
        (b"[-Infinity]", "the number -Infinity, which is not finite"),
        (b"[1e999]", "the number 1e999, which is not finite"),
        (b'{"\\ud800": 1}', "half of a character, '\\ud800'"),
        (b'["\\uDFFF"]', "half of a character"),
        (b'["\xed\xa0\x80"]', "byte 0xed at offset 2, which is not UTF-8"),
        ('["\\ud800"]'.encode("utf-16"), "half of a character"),
    ],
    ids=range(15),
)
def test_json_beyond_the_limits_is_one_line(content, wrong):
    with pytest.raises(LamaError) as error:
        parse_json(content, "x.json")
    message = str(error.value)
    assert message.startswith("x.json must be valid JSON; got ") and wrong in message
    assert len(message) < 300 and "\n" not in message


@pytest.mark.parametrize(
    "text",
    ["a = ", "a = " + "[" * 2000 + "]" * 2000, "a = " + "9" * 5000, "a = inf", "a = 1\na = 2"],
    ids=range(5),
)
def test_toml_beyond_the_limits_is_one_line(text):
    assert parse_toml("a = [1.5, 'x']", "x") == {"a": [1.5, "x"]}
    with pytest.raises(LamaError, match=r"^x.toml must be valid TOML; got: .{1,250}$"):
        parse_toml(text, "x.toml")


def test_files_are_regular_small_and_there(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")  # to open one that nobody writes would wait for ever
    with open(tmp_path / "sparse", "wb") as file:
        file.truncate(LARGEST + 1)
    cases = {
        "pipe": "must be a regular file; got a pipe",
        "sparse": "must have at most 67,108,864 bytes; got 67,108,865",
        "none": "cannot be read: No such file",
        "n" * 300: "cannot be read: File name too long",
        "\0": "cannot be read: embedded null byte",
    }
    for name, wrong in cases.items():
        with pytest.raises(LamaError) as error:
            read_file(tmp_path / name)
        assert wrong in str(error.value)
        assert len(str(error.value)) < 400
    with pytest.raises(
        LamaError, match=r"cannot be read: Is a directory|must be a regular file; got a folder"
    ):
        read_file(tmp_path)
    (tmp_path / "list.json").write_text("[1]")
    assert read_json(tmp_path / "list.json") == [1]
    with pytest.raises(LamaError, match=r"list.json must be an object; got \[1\]$"):
        read_object(tmp_path / "list.json")


def test_fields_are_checked_by_type():
    fields = {"n": 3, "x": 0.5, "yes": True, "name": "a", "none": None}
    assert field(fields, "n", int, "f") == 3
    assert field(fields, "n", float, "f") == 3.0 and type(field(fields, "n", float, "f")) is float
    assert field(fields, "none", int, "f", 7) == 7
    assert field(fields, "other", str, "f", "d") == "d"
    for key, kind, wrong in (
        ("yes", int, "yes in f must be a whole number; got True"),
        ("yes", float, "yes in f must be a number; got True"),
        ("x", int, "x in f must be a whole number; got 0.5"),
        ("n", str, "n in f must be a text; got 3"),
        ("none", dict, "none in f must be an object; got None"),
        ("other", int, "f must have other; got n, x, yes, name, none"),
    ):
        with pytest.raises(LamaError) as error:
            field(fields, key, kind, "f")
        assert str(error.value) == wrong
    with pytest.raises(LamaError, match="must be a number"):
        checked(10**400, float, "x")


def test_a_value_in_a_message_is_short_and_on_one_line():
    assert quoted("a\nb") == "'a\\nb'"
    assert quoted("it's", plain=True) == "it's"
    assert quoted("a\nb\x1b[1m", plain=True) == "a\\nb\\x1b[1m"
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    for value in ("a" * 10**7, b"\xff" * 10**6, ["x" * 1000] * 10, 10**5000, deep, {"k": deep}):
        assert len(quoted(value)) <= 203 and quoted(value).isprintable()


def test_json_lines_are_one_object_each():
    assert parse_json_lines([b'{"a": 1}', b'{"a": 2}'], "log") == [{"a": 1}, {"a": 2}]
    for lines in ([b'{"a": 1}, {"a": 2}'], [b'{"a": 1', b'"b": 2}']):
        with pytest.raises(LamaError, match="log must have one object a line; got"):
            parse_json_lines(lines, "log")
    for lines in ([b"{}", b""], [b"{}", b"5"]):
        with pytest.raises(LamaError):
            parse_json_lines(lines, "log")
