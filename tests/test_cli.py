"""The command line: one line on standard error and the right exit code for every mistake, and nothing but
text on standard output.
"""

import importlib.util
import io
import json
import os
import pickle
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import fill
from reference import random_gpt2
from tinygrad import Tensor
from tinygrad.nn.state import get_state_dict

import lama
from lama.checkpoints import hub
from lama.cli import main, make_parser
from lama.models.gpt import GPT, GPTConfig
from lama.tokenizers import ByteTokenizer

Run = Callable[..., tuple[int, str, str]]


def save(folder: Path, context_length: int) -> Path:
    """A random model of bytes."""
    model = GPT(GPTConfig(256, context_length, d_model=6, n_layers=1, n_heads=2, d_mlp=17), seed=None)
    fill(model)
    lama.save(folder, model, ByteTokenizer())
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save(tmp_path_factory.mktemp("models") / "tiny", 43))


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model whose context is not full for a long time."""
    return str(save(tmp_path_factory.mktemp("models") / "endless", 30011))


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    """Run a command here; its exit code, standard output and standard error."""

    def run(*argv: str) -> tuple[int, str, str]:
        capfd.readouterr()
        code = main(argv)
        return code, *capfd.readouterr()

    return run


@pytest.fixture
def nothing_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No weights, an empty cache; returns the current folder's `weights`."""
    from huggingface_hub import constants

    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    monkeypatch.setattr(hub, "REPOSITORY", tmp_path)
    monkeypatch.setattr(hub, "PACKAGE", tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "cwd" / "weights"


def assert_refused(result: tuple[int, str, str], code: int, *parts: str) -> None:
    """One line on standard error that holds all of `parts`, nothing on standard output."""
    got, out, err = result
    assert err.startswith("lama: ") and err.count("\n") == 1 and err.endswith("\n"), err
    for part in parts:
        assert part in err
    assert (got, out) == (code, "")


def copy(folder: str, to: Path) -> Path:
    to.mkdir()
    for path in Path(folder).iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    return to


# --- wrong usage


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["-p", ""],
            "prompt must not be empty; got nothing from the command line. Give some text to continue",
        ),
        (
            [],
            "give one prompt: -p TEXT, -p - for standard input, or --prompt-file FILE",
        ),
        (["-p", "x", "--prompt-file", "y"], "give one prompt"),
        (
            ["-p", "x" * 44],
            "prompt must have at most 43 tokens, the context; got 44. Shorten it or pass --window",
        ),
        (["-p", "x", "--temperature", "-1"], "temperature must be 0 (greedy) or above; got -1.0"),
        (["-p", "x", "--temperature", "nan"], "temperature must be 0 (greedy) or above; got nan"),
        (["-p", "x", "--top-p", "0"], "top_p must be above 0 and at most 1; got 0.0"),
        (["-p", "x", "--top-p", "1.5"], "top_p must be above 0 and at most 1; got 1.5"),
        (["-p", "x", "--top-k", "-3"], "top_k must be 0 (keep all) or above; got -3"),
        (["-p", "x", "--min-p", "2"], "min_p must be between 0 and 1; got 2.0"),
        (
            ["-p", "x", "--repetition-penalty", "0"],
            "repetition_penalty must be between 0.01 and 100; 1 changes nothing; got 0.0",
        ),
        (["-p", "x", "-n", "0"], "max_new_tokens must be at least 1; got 0"),
        (["-p", "x", "--context", "0"], "context must be at least 1; got 0"),
        (["-p", "x", "--context", "44"], "context must be from 1 to 43, the model's context_length; got 44"),
        (
            ["-p", "xxx", "--context", "2"],
            "prompt must have at most 2 tokens, the context; got 3. Shorten it",
        ),
        (["-p", "x", "--num-samples", "0"], "num_samples must be at least 1; got 0"),
        (["-p", "x", "--seed", "-1"], "seed must be 0 or above; got -1"),
        (["-p", "x", "--stop", ""], "stop must be a non-empty string"),
        (["-p", "x", "--nonsense"], "unrecognized arguments: --nonsense. See lama generate --help"),
        (
            ["-p", "x", "--temprature=1"],
            "unrecognized arguments: --temprature=1. Did you mean --temperature? See lama generate --help",
        ),
        (["-p", "x", "--temp", "1"], "unrecognized arguments: --temp 1"),  # nothing is abbreviated
        (
            ["Once", "upon"],
            "unrecognized arguments: Once upon. A prompt is one argument of -p: -p 'Once upon'. See",
        ),
        (
            ["-p", "Once", "upon"],
            "unrecognized arguments: upon. A prompt is one argument of -p: -p upon. See lama generate",
        ),
        (["-p", r"a\q", "--escape"], r"--escape reads \n, \t, \r, \\ and \uXXXX; got \q in -p"),
        (["-p", "a", "--stop", "b\\", "--escape"], "and \\uXXXX; got \\ in --stop"),
        (["-p", r"a\u12", "--escape"], r"got \u in -p"),
        (
            ["-p", r"\ud83d!", "--escape"],
            r"-p must be valid Unicode with --escape; got half of a character, '\ud83d!'",
        ),
        (
            ["-p", "x", "-n", "many"],
            "argument -n/--max-new-tokens: invalid int value: 'many'. See lama generate --help",
        ),
        (["-p", "x", "--dtype", "int2"], "argument --dtype: invalid choice: 'int2'"),
        (["-p", "x", "--device", "ABACUS"], "device must be one that tinygrad can open here"),
    ],
)
def test_wrong_usage_of_generate_exits_2(run, tiny, argv, message):
    assert_refused(run("generate", "-m", tiny, *argv), 2, message)


@pytest.mark.parametrize(
    "argv", [["--temperature", "-1"], ["-n", "0"], ["--seed", "-1"], ["--stop", ""], ["--num-samples", "0"]]
)
def test_wrong_usage_is_refused_before_a_model_is_looked_for(run, nothing_here, argv):
    assert_refused(run("generate", "-m", "gpt2", "--offline", "-p", "x", *argv), 2)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["explode"], "invalid choice: 'explode'"),
        (["fly"], "invalid choice: 'fly' (choose from generate, chat, serve, train, "),
        (["generat"], "argument VERB: invalid choice: 'generat'. Did you mean generate? See lama --help"),
        (["help", "trian"], "invalid choice: 'trian'. Did you mean train?"),
        (
            ["classify", "predikt"],
            "invalid choice: 'predikt' (choose from train, eval, predict). Did you mean predict?",
        ),
        (
            ["train", "--schedule", "cosin"],
            "invalid choice: 'cosin' (choose from cosine, constant, noam, wsd). Did you mean cosine?",
        ),
        (["generate", "--json=yes"], "argument --json: takes no value. See lama generate --help"),
        (["x" * 5000], "invalid choice: 'xxx"),
        (["generate", "x" * 5000], "unrecognized arguments: xxx"),
        (["generate", "-n", "7" * 5000], "invalid int value: '777"),
        (["generate", "--dtype", "x" * 5000], "invalid choice: 'xxx"),
        (["generate", "--json=" + "x" * 5000], "takes no value"),
        (["train\n"], r"invalid choice: 'train\n'. Did you mean train?"),
    ],
)
def test_wrong_usage_of_other_verbs_exits_2(run, argv, message):
    result = run(*argv)
    assert_refused(result, 2, message)
    assert len(result[2]) < 500


def test_version_and_help_are_on_standard_output(capsys):
    for argv, told in (
        (["--version"], f"lama {lama.__version__}\n"),
        (["-V"], f"lama {lama.__version__}\n"),
        (["help"], "`lama help VERB`"),
        (["help", "train"], "usage: lama train "),
        (["help", "classify", "predict"], "usage: lama classify predict "),
    ):
        with pytest.raises(SystemExit) as exit:
            main(argv)
        out, err = capsys.readouterr()
        assert exit.value.code == 0 and told in out and err == ""


def test_lama_alone_names_five_things_to_do(capsys):
    assert main([]) == 0
    out, err = capsys.readouterr()
    assert err == "" and len(re.findall(r"^  lama ", out, re.MULTILINE)) == 5 and len(out.splitlines()) < 15


def test_help_of_every_verb_begins_with_two_examples_that_it_has(capsys):
    parser = make_parser()
    for name, verb in parser.verbs.items():
        first, second, third = verb.format_help().splitlines()[:3]
        assert first == "examples:" and second.startswith(f"  lama {name}"), name
        for line in (second, third):
            words = shlex.split(line.partition(" > ")[0].partition(" < ")[0])
            parser.parse_args(words[1:])
            assert words[0] == "lama" and capsys.readouterr().err == ""


def test_help_lists_every_verb_once_in_a_group():
    parser = make_parser()
    text = parser.format_help()
    for name in parser.verbs:
        assert len(re.findall(rf"^  {name} ", text, re.MULTILINE)) == 1, name
    assert "look inside:\n  attention " in text


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_knows_verbs_and_options(shell, capsys):
    pytest.importorskip("shtab")
    assert main(["completion", shell]) == 0
    out = capsys.readouterr().out
    assert "generate" in out and "--max-new-tokens" in out


def test_missing_libraries_of_helpers_are_one_line(run, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert_refused(run("completion", "bash"), 1, "completion needs shtab; pip install 'lama[completion]'")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert_refused(run("course"), 1, "lama course opens JupyterLab, which is not installed; pip install")


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["generate", "--help"])
    assert exit.value.code == 0
    out, err = capsys.readouterr()
    words = "--prompt --prompt-file --model --max-new-tokens --temperature --top-k --top-p --min-p "
    words += "--repetition-penalty --seed --stop"
    for option in (
        *words.split(),
        "--num-samples",
        "--window",
        "--dtype",
        "--device",
        "--offline",
        "--no-stream",
        "--json",
        "--verbose",
    ):
        assert option in out
    assert err == ""


# --- input that cannot be used


def test_prompt_file_that_cannot_be_read_is_named(run, tiny, tmp_path):
    generate = ["generate", "-m", tiny, "--prompt-file"]
    assert_refused(
        run(*generate, str(tmp_path / "none")),
        1,
        f"prompt file must be readable; got {tmp_path / 'none'} (No such file",
    )
    assert_refused(run(*generate, str(tmp_path)), 1, "prompt file must be readable", "directory")
    (tmp_path / "latin").write_bytes("caf\xe9s".encode("latin-1"))
    assert_refused(
        run(*generate, str(tmp_path / "latin")),
        1,
        f"prompt must be UTF-8 text; got byte 0xe9 at offset 3 of {tmp_path / 'latin'}",
    )
    (tmp_path / "empty").touch()
    assert_refused(
        run(*generate, str(tmp_path / "empty")),
        2,
        f"prompt must not be empty; got nothing from {tmp_path / 'empty'}",
    )


def test_prompt_that_was_not_utf8_on_the_command_line_is_refused(run, tiny):
    assert_refused(
        run("generate", "-m", tiny, "-p", b"caf\xe9".decode("utf-8", "surrogateescape")),
        1,
        "got byte 0xe9 at offset 3 of the command",
    )


def test_standard_input_that_is_not_utf8_is_refused(run, tiny, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfeh\x00")))
    assert_refused(
        run("generate", "-m", tiny, "-p", "-"),
        1,
        "prompt must be UTF-8 text; got byte 0xff at offset 0 of standard input",
    )


def test_unknown_model_is_answered_with_near_names(run, nothing_here):
    assert_refused(
        run("generate", "-m", "gtp2", "-p", "x"), 1, "got 'gtp2'. Did you mean gpt2", "Looked in: "
    )


def test_path_without_a_model_is_named(run, tmp_path):
    assert_refused(
        run("generate", "-m", str(tmp_path / "none"), "-p", "x"),
        1,
        f"got {str(tmp_path / 'none')!r}, which does not exist",
    )
    assert_refused(
        run("generate", "-m", str(tmp_path), "-p", "x"),
        1,
        f"got {str(tmp_path)!r}, a folder without config.json",
    )


def test_gpt2_that_cannot_be_had_is_an_error_when_asked_for(run, nothing_here):
    assert_refused(run("generate", "-m", "gpt2", "--offline", "-p", "x"), 1, "gpt2")


def test_truncated_safetensors_are_refused(run, tiny, tmp_path):
    weights = copy(tiny, tmp_path / "cut") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5])
    assert_refused(run("generate", "-m", str(tmp_path / "cut"), "-p", "x"), 1, str(weights))
    weights.write_bytes(b"")
    assert_refused(run("generate", "-m", str(tmp_path / "cut"), "-p", "x"), 1, str(weights))


def test_pickle_that_would_run_code_is_refused(run, tiny, tmp_path):
    class Attack:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)

    folder = copy(tiny, tmp_path / "evil")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Attack()))
    assert_refused(
        run("generate", "-m", str(folder), "-p", "x"),
        1,
        "must hold tensors only; got posix.system in its pickle",
    )
    assert not (tmp_path / "ran").exists()


def test_config_that_disagrees_with_the_tensors_is_refused(run, tiny, tmp_path):
    config = copy(tiny, tmp_path / "other") / "config.json"
    fields = json.loads(config.read_text())
    fields["config"] |= {"d_mlp": 19, "n_layers": 2}
    config.write_text(json.dumps(fields))
    assert_refused(
        run("generate", "-m", str(tmp_path / "other"), "-p", "x"),
        1,
        "blocks.1.",
        "blocks.0.mlp.up.weight",
        "19",
        "17",
    )


def test_config_that_is_not_json_is_refused(run, tiny, tmp_path):
    config = copy(tiny, tmp_path / "other") / "config.json"
    config.write_text("{")
    assert_refused(run("generate", "-m", str(tmp_path / "other"), "-p", "x"), 1, str(config))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_refused(run, tmp_path, bad):
    model = GPT(GPTConfig(256, 43, d_model=6, n_layers=1, n_heads=2, d_mlp=17))
    parameter = get_state_dict(model)["blocks.0.mlp.up.weight"]
    parameter.assign(
        Tensor(np.where(np.arange(17 * 6).reshape(17, 6) == 50, np.float32(bad), parameter.numpy()))
    ).realize()
    lama.save(tmp_path / "bad", model, ByteTokenizer())
    assert_refused(
        run("generate", "-m", str(tmp_path / "bad"), "-p", "x"),
        1,
        "must be finite; got NaN or infinity in blocks.0.mlp.up.weight",
    )


def test_traceback_is_shown_where_it_is_asked_for(run, tmp_path):
    wrong = ["generate", "-v", "-m", str(tmp_path / "none"), "-p", "x"]
    assert_refused(run(*wrong), 1, "model must be")
    code, out, err = run(*wrong, "--traceback")
    assert (code, out) == (1, "")
    assert err.startswith("Traceback (most recent call last):") and err.splitlines()[-1].startswith(
        "lama: model must be"
    )


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (KeyError("x" * 5000), "unexpected KeyError: 'xxx"),
        (
            RecursionError("maximum recursion depth exceeded"),
            "unexpected RecursionError: maximum recursion depth exceeded. ",
        ),
        (
            ValueError("two\nlines"),
            "unexpected ValueError: two. Please report it with the output of --traceback; `lama doctor` "
            "checks the installation",
        ),
        (
            FileNotFoundError(2, "No such file or directory", "a/b"),
            "lama: cannot read or write a/b: No such file or directory\n",
        ),
        (
            FileNotFoundError(2, "No such file or directory"),
            "lama: cannot read or write the current folder: No such file or directory\n",
        ),
        (
            OSError(28, "No space left on device"),
            "lama: cannot read or write standard output or an open file: No space left on device\n",
        ),
        (
            UnicodeEncodeError("utf-8", "a\udcffb", 1, 2, "surrogates not allowed"),
            r"texts and names must be valid Unicode; got '\udcffb'",
        ),
    ],
)
def test_error_that_no_verb_expects_is_one_line(run, monkeypatch, error, told):
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr("lama.cli.generate.run", fail)
    result = run("generate")
    assert_refused(result, 1, told)
    assert len(result[2]) < 500
    assert run("generate", "--traceback")[2].startswith("Traceback")


# --- generation


def test_memory_that_is_not_enough_is_one_line(run, tiny, monkeypatch):
    def full(*_: Any) -> None:
        raise MemoryError("Allocation of 1.00 TB failed on CUDA")

    monkeypatch.setattr("lama.cli.generate.run", full)
    code, text, err = run("generate", "-m", tiny)
    assert (code, text) == (1, "")
    assert err == (
        "lama: out of memory: Allocation of 1.00 TB failed on CUDA. Use a smaller model or batch\n"
    )


def test_text_is_all_there_is_on_standard_output(run, tiny):
    code, streamed, err = run("generate", "-m", tiny, "-p", "Once upon", "-n", "9", "--seed", "3")
    assert (code, err) == (0, "")
    model, tokenizer = lama.load(tiny)
    assert streamed == f"Once upon{lama.generate(model, tokenizer, 'Once upon', max_new_tokens=9, seed=3)}\n"
    assert run("generate", "-m", tiny, "-p", "Once upon", "-n", "9", "--seed", "3", "--no-stream") == (
        0,
        streamed,
        "",
    )


def test_prompt_comes_from_a_file_or_standard_input_as_it_is(run, tiny, tmp_path, monkeypatch):
    prompt = "zwei\nZeilen – ünd mehr\n"
    options = ["-m", tiny, "-n", "5", "--temperature", "0"]
    (tmp_path / "prompt").write_text(prompt, encoding="utf-8")
    expected = run("generate", "-p", prompt, *options)
    assert expected[0] == 0 and expected[1].startswith(prompt)
    assert run("generate", "--prompt-file", str(tmp_path / "prompt"), *options) == expected
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(prompt.encode())))
    assert run("generate", "-p", "-", *options) == expected


def test_json_is_one_object_with_all_that_was_asked(run, tiny):
    code, out, err = run(
        "generate", "-m", tiny, "-p", "né", "-n", "7", "--seed", "3", "--num-samples", "2", "--json"
    )
    assert (code, err) == (0, "") and out.count("\n") == 1
    report: dict[str, Any] = json.loads(out)
    assert list(report) == ["model", "prompt", "prompt_tokens", "samples", "timing"]
    assert (report["model"], report["prompt"], report["prompt_tokens"]) == (tiny, "né", [110, 195, 169])
    model, tokenizer = lama.load(tiny)
    for sample, seed in zip(report["samples"], (3, 4), strict=True):
        expected = lama.generate(model, tokenizer, "né", max_new_tokens=7, seed=seed)
        assert sample == {"text": str(expected), "tokens": expected.tokens, "finish_reason": "length"}
        assert len(sample["tokens"]) == 7
    assert report["samples"][0] != report["samples"][1]
    assert list(report["timing"]) == ["load_s", "first_token_s", "tokens_per_s"]
    assert all(value > 0 for value in report["timing"].values())


def test_json_of_one_token_has_no_rate(run, tiny):
    assert (
        json.loads(run("generate", "-m", tiny, "-p", "x", "-n", "1", "--json")[1])["timing"]["tokens_per_s"]
        is None
    )


def test_num_samples_are_the_texts_of_successive_seeds(run, tiny):
    both = run("generate", "-m", tiny, "-p", "x", "-n", "5", "--seed", "3", "--num-samples", "2")[1]
    assert both == "".join(
        run("generate", "-m", tiny, "-p", "x", "-n", "5", "--seed", seed)[1] for seed in "34"
    )


def test_stop_ends_the_text(run, tiny):
    options = ["-m", tiny, "-p", "x", "-n", "20", "--temperature", "0", "--json"]
    text = json.loads(run("generate", *options)[1])["samples"][0]["text"]
    stop = text[5]
    sample = json.loads(run("generate", *options, "--stop", "not in it", "--stop", stop)[1])["samples"][0]
    assert (sample["text"], sample["finish_reason"]) == (text[: text.index(stop)], "stop")


def test_full_context_ends_the_text_and_window_goes_on_and_says_so(run, tiny):
    options = ["-m", tiny, "-p", "x" * 40, "-n", "9", "--json"]
    note = "lama: the context of 43 tokens is full; --window continues\n"
    code, out, err = run("generate", *options)
    sample = json.loads(out)["samples"][0]
    assert (code, err, len(sample["tokens"]), sample["finish_reason"]) == (0, note, 4, "context")
    code, out, err = run("generate", *options, "--window")
    assert (code, err) == (0, "lama: context of 43 tokens is full; continued with the last 21\n")
    assert len(json.loads(out)["samples"][0]["tokens"]) == 9
    code, out, err = run("generate", "-m", tiny, "-p", "x" * 5, "-n", "9", "--context", "7", "--window")
    assert (code, err) == (0, "lama: context of 7 tokens is full; continued with the last 3\n" * 2)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_generates(run, tiny, dtype):
    code, out, err = run("generate", "-m", tiny, "-p", "x", "-n", "3", "--dtype", dtype, "-v", "--json")
    assert code == 0 and len(json.loads(out)["samples"][0]["tokens"]) == 3
    assert f"{dtype} on " in err


def test_verbose_tells_what_ran_on_standard_error(run, tiny):
    code, out, err = run("generate", "-m", tiny, "-p", "x", "-n", "3", "-v")
    assert code == 0 and "GPT, " not in out
    assert f"lama: {tiny}: GPT, " in err and "lama: first token after " in err and "tokens/s" in err


def test_default_model_is_the_one_that_ships_where_gpt2_cannot_be_had(run, tiny, nothing_here, monkeypatch):
    monkeypatch.setattr("lama.checkpoints.smollm2.place", lambda: nothing_here / "none")
    nothing_here.mkdir()
    copy(tiny, nothing_here / "lama-bpe")
    code, out, err = run("generate", "--offline", "-p", "x", "-n", "3")
    assert code == 0 and out.startswith("x")
    lacking = (
        "lama: GPT-2 weights not found and not downloadable, nor SmolLM2; using the bundled model lama-bpe."
    )
    assert err.startswith(lacking) and err.count("\n") == 1
    assert "weights/gpt2/" in err


def test_default_model_is_gpt2_where_it_is(run, tiny, nothing_here):
    nothing_here.mkdir()
    copy(tiny, nothing_here / "gpt2")
    code, out, err = run("generate", "--offline", "-p", "x", "-n", "3", "--json")
    assert (code, err, json.loads(out)["model"]) == (0, "", "gpt2")


def test_escapes_are_read_where_they_are_asked_for(run, tiny):
    options = ["-m", tiny, "-n", "1", "--json"]
    code, out, err = run("generate", *options, "-p", r"a\n\tb\\n\r\u00e9\ud83d\ude42 \u4e2D", "--escape")
    assert (code, err, json.loads(out)["prompt"]) == (0, "", "a\n\tb\\n\ré🙂 中")
    whole = json.loads(run("generate", *options[:2], "-n", "9", "--json", "-p", "a")[1])["samples"][0]["text"]
    stop = f"\\u{ord(whole[1]):04x}"
    sample = json.loads(
        run("generate", *options[:2], "-n", "9", "--json", "-p", "a", "--escape", "--stop", stop)[1]
    )["samples"][0]
    assert (sample["text"], sample["finish_reason"]) == (whole[: whole.index(whole[1])], "stop")


@pytest.mark.parametrize(
    ("argv", "hint"),
    [
        (["-p", r"Q: a\nA:"], r"-p contains a literal \n; --escape reads it as an escape sequence"),
        (["-p", r"caf\u00e9"], r"-p contains a literal \u00e9; --escape"),
        (["-p", "x", "--stop", r"\nuser"], r"--stop contains a literal \n; --escape"),
        (["-p", r"\nabla C:\temp \usepackage \q"], ""),
        (["-p", "a\nb", "--stop", "\n"], ""),
    ],
)
def test_backslash_that_was_probably_meant_is_hinted_at(run, tiny, argv, hint):
    code, out, err = run("generate", "-m", tiny, "-n", "1", *argv)
    assert code == 0 and out.startswith(argv[1]) and err.count("\n") == bool(hint) and hint in err


def test_prompt_from_a_terminal_is_asked_for(run, tiny, monkeypatch):
    class Terminal(io.TextIOWrapper):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdin", Terminal(io.BytesIO(b"ab")))
    code, out, err = run("generate", "-m", tiny, "-p", "-", "-n", "1")
    assert (code, out[:2], err) == (
        0,
        "ab",
        "lama: reading the prompt from the terminal; Ctrl-D on an empty line ends it\n",
    )


def test_warnings_are_one_line_each_on_standard_error(run, tmp_path):
    config = random_gpt2.make_config(vocab_size=256, n_positions=13, n_embd=10, n_layer=1, n_head=2)
    weights = random_gpt2.make_weights(config) | {"score.weight": np.ones((2, 10), np.float32)}
    folder = random_gpt2.write_folder(tmp_path / "hf", config, weights)
    heads = "score.weight, which belong to heads for other tasks"
    left_out = f"lama: {folder / 'model.safetensors'}: left out {heads}\n"
    larger = f"lama: the tokenizer of {folder} is larger than the model, 50,257 tokens for vocab_size=256: "
    larger += "text with a token from id 256 on"
    for _ in range(2):  # in each command anew
        code, out, err = run(
            "generate", "-m", str(folder), "--tokenizer", "gpt2", "-p", "a", "-n", "1", "--json"
        )
        assert (
            code == 0
            and json.loads(out)["prompt_tokens"] == [64]
            and err == f"{left_out}{larger} will be refused\n"
        )
    code, out, err = run("generate", "-m", str(folder), "--tokenizer", "gpt2", "-p", "Hello", "-n", "1")
    assert (code, out, err.count("\n")) == (
        1,
        "",
        3,
    ) and "the text must be made of the model's tokens; got 'Hello', id 15496" in err
    code, out, err = run(
        "quantize", "-m", str(folder), "--tokenizer", "bytes", "--to", "int8", "--out", str(tmp_path / "int8")
    )
    assert (code, err) == (0, left_out)  # once, though the model is loaded twice
    assert run("eval", "-m", str(folder), "--tokenizer", "bytes", "--text", "kjv", "--stride", "99")[0] == 2


@pytest.mark.parametrize(
    "verb",
    ["generate -p abcabc -n 9", "lens abc", "lens abc --answer c", "attention abc", "heads", "ablate abc"],
)
def test_verbs_serve_models_with_more_rows_than_the_tokenizer_has_tokens(run, tmp_path, verb):
    model = GPT(GPTConfig(300, 16, d_model=6, n_layers=1, n_heads=2, d_mlp=17, tied=False), seed=None)
    fill(model)
    assert model.unembed is not None
    # Such rows win.
    model.unembed.weight.assign(
        Tensor.arange(300).reshape(300, 1).expand(300, 6) * model.unembed.weight.sign()
    ).realize()
    lama.save(tmp_path / "padded", model, ByteTokenizer())
    name, *rest = verb.split()
    code, out, err = run(name, "-m", str(tmp_path / "padded"), *rest)
    assert code == 0, err
    assert bool(re.search(r"<2[5-9]\d> \d", out)) == (name == "lens")


@pytest.mark.parametrize("options", [{"n_layers": 0}, {"mlp": False}], ids=str)
def test_verbs_serve_models_without_layers_or_mlps(run, tmp_path, options):
    model = GPT(
        GPTConfig(
            **{"vocab_size": 256, "context_length": 16, "d_model": 8, "n_layers": 1, "n_heads": 2} | options
        )
    )
    path = str(tmp_path / "model")
    lama.save(path, model, ByteTokenizer())
    for jit in (True, False):
        assert len(str(lama.generate(*lama.load(path), "aa", max_new_tokens=4, jit=jit))) > 0
    served, without = (0, "") if "mlp" in options else (1, "lama: the model must have layers; got n_layers=0")
    picture = str(tmp_path / "p.svg")
    pictures = [["--out", picture]] if importlib.util.find_spec("matplotlib") else [[]]
    for argv, code, message in (
        (["generate", "-m", path, "-p", "aa", "-n", "4"], 0, ""),
        (["lens", "-m", path, "ab", "--answer", "c", *pictures[0]], 0, ""),
        (
            ["attention", "-m", path, "ab"],
            2 * served,
            "lama: the model has no attention layers",
        ),
        (["heads", "-m", path], served, without),
        (["ablate", "-m", path, "abc"], served, without),
        (["ablate", "-m", path, "abc", "--neuron", "0.1"], 1, "lama: "),
        (["patch", "-m", path, "ab", "ac", "--answer", "c", "--against", "d"], served, without),
        (
            ["patch", "-m", path, "ab", "ac", "--answer", "c", "--against", "d", "--site", "mlp_out"],
            1,
            "lama: ",
        ),
    ):
        got, _, err = run(*argv)
        assert got == code and (
            err.startswith(message) and err.count("\n") == 1 if code else "lama:" not in err
        ), (argv, err)


# --- processes: signals and pipes


def default_signals() -> None:
    """A job in the background ignores SIGINT, one under `nohup` SIGHUP."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def start(*argv: str, **options: Any) -> "subprocess.Popen[bytes]":
    """A new process of lama; Ctrl-C reaches it as it would in a terminal."""
    command = [sys.executable, "-m", "lama", *argv]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=default_signals, **options
    )


def test_ctrl_c_ends_generation_with_130_and_one_line(endless):
    process = start("generate", "-m", endless, "-p", "x", "-n", "30000")
    assert process.stdout is not None and process.stdout.read(3)[:1] == b"x"  # it is writing
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.startswith(b"lama: interrupted after ") and err.count(b"\n") == 1
    assert out.endswith(b"\n")


def test_sigterm_ends_generation_into_json_with_143_and_one_line(endless):
    process = start("generate", "-m", endless, "-p", "x", "-n", "30000", "--num-samples", "99", "--json")
    time.sleep(2)  # nothing is printed until the end
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143
    assert err.startswith(b"lama: terminated") and err.count(b"\n") == 1


def test_closed_pipe_ends_generation_with_141_and_one_line(endless):
    process = start("generate", "-m", endless, "-p", "x", "-n", "30000")
    assert process.stdout is not None and process.stderr is not None
    process.stdout.read(3)
    process.stdout.close()
    assert process.stderr.read() == b"lama: standard output was closed; stopped\n"
    assert process.wait(timeout=60) == 141


def test_pipe_that_was_closed_before_the_text_came_ends_with_141(tiny):
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "lama", "generate", "-m", tiny, "-p", "x", "-n", "2", "--json"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, b"lama: standard output was closed; stopped\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a disk that is full is Linux's /dev/full")
@pytest.mark.parametrize(
    "argv", [["generate", "-p", "x", "-n", "2", "-m"], ["--help"], ["doctor", "--help"], ["--version"]]
)
def test_full_disk_on_standard_output_is_one_line(tiny, argv):
    command = [sys.executable, "-m", "lama", *argv, *([tiny] if argv[-1] == "-m" else [])]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (
        1,
        "lama: cannot read or write standard output or an open file: No space left on device\n",
    )


@pytest.mark.parametrize(
    ("name", "code", "told"), [("SIGTERM", 143, "terminated"), ("SIGHUP", 129, "the terminal was closed")]
)
def test_signal_ends_generation_with_its_own_code_and_one_line(endless, name, code, told):
    process = start("generate", "-m", endless, "-p", "x", "-n", "30000")
    assert process.stdout is not None and process.stdout.read(3)[:1] == b"x"
    process.send_signal(getattr(signal, name))
    _, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert err.startswith(f"lama: {told} after ".encode()) and err.count(b"\n") == 1


def test_signal_that_comes_while_an_object_is_deleted_is_not_lost(run, monkeypatch):
    class Deleted:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0)

    def wait(*_: Any) -> int:
        Deleted()
        time.sleep(60)
        return 0

    monkeypatch.setattr("lama.cli.generate.run", wait)
    assert run("generate") == (143, "", "lama: terminated\n")


def test_signal_that_is_ignored_stays_so(run, monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as `nohup` does
    try:
        monkeypatch.setattr("lama.cli.generate.run", lambda args: os.kill(os.getpid(), signal.SIGHUP) or 0)
        assert run("generate") == (0, "", "")
    finally:
        signal.signal(signal.SIGHUP, before)


def test_ctrl_c_while_modules_are_imported_is_silent():
    code = """
import os, signal, sys
class Press:
    def find_spec(self, name, *_):
        if name == "argparse":
            os.kill(os.getpid(), signal.SIGINT)
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.meta_path.insert(0, Press())
from lama.__main__ import command
command("generate")"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_closed_standard_error_gets_nothing_and_standard_output_only_the_text(tiny):
    def generate(*argv: str) -> "subprocess.CompletedProcess[str]":
        command = ["sh", "-c", 'exec "$@" 2>&-', "sh", sys.executable, "-m", "lama", "generate", *argv]
        return subprocess.run(
            command, stdout=subprocess.PIPE, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"}
        )

    done = generate("-m", tiny, "-p", "x" * 40, "-n", "9", "--window")  # with a note
    assert done.returncode == 0 and done.stdout.startswith("x" * 40) and "context" not in done.stdout
    done = generate("-m", f"{tiny}/none", "-p", "x")
    assert (done.returncode, done.stdout) == (1, "")


def test_current_folder_that_was_removed_stops_no_command_that_does_not_need_it(tiny, tmp_path):
    def run(*argv: str) -> tuple[int, str, str]:
        (tmp_path / "gone").mkdir()
        command = [
            "sh",
            "-c",
            'cd "$0" && rmdir "$0" && exec "$@"',
            str(tmp_path / "gone"),
            sys.executable,
            "-m",
            "lama",
            *argv,
        ]
        root = os.pathsep.join([str(Path(lama.__file__).parents[1]), *sys.path])
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": root})
        return done.returncode, done.stdout, done.stderr

    code, out, err = run("generate", "-m", tiny, "-p", "x", "-n", "2")
    assert (code, out[:1], err) == (0, "x", "")
    assert_refused(run("generate", "-m", "here", "-p", "x"), 1, "got 'here'")


def test_text_is_utf8_whatever_the_locale(tiny):
    process = start(
        "generate",
        "-m",
        tiny,
        "-p",
        "né 🦙",
        "-n",
        "2",
        env=os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    )
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert out.startswith("né 🦙".encode())
    process = start(
        "attention",
        "-m",
        tiny,
        "né",
        env=os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    )
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, b"")
