"""lama lens, patch, ablate and heads: tables, pictures, and one line for what they cannot do."""

import argparse
import dataclasses
import re
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import SMALL, fill

import lama
from lama.cli import main
from lama.cli.ablate import read_tokens
from lama.cli.heads import known_table
from lama.errors import LamaError
from lama.interp.answers import single_token, with_space
from lama.interp.heads import head_scores, repeated_tokens
from lama.interp.interventions import Removal, ablate, patch, random_heads
from lama.interp.labels import token_labels
from lama.interp.lens import attribute, logit_lens
from lama.interp.published import GPT2_SMALL, known_heads
from lama.models.bert import Bert, BertConfig
from lama.models.gpt import GPT, GPT2_CONFIGS, GPTConfig
from lama.tokenizers import CharacterTokenizer, gpt2_tokenizer

LETTERS = CharacterTokenizer("abcdefghij ")
B, D, E = LETTERS.encode("bde")
CLEAN, CORRUPTED = "abcabca", "dbcabca"
PNG = b"\x89PNG"


@pytest.fixture(scope="module")
def model():
    model = GPT(GPTConfig(**SMALL))
    fill(model, seed=1)
    return model


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    lama.save(path, model, LETTERS)
    return str(path)


def ids(text: str) -> list[int]:
    return LETTERS.encode(text)


def rows(text: str) -> dict[str, list[str]]:
    """The tables in a text: the cells of each row by its first."""
    split = [[cell.strip() for cell in line.split("|")] for line in text.splitlines() if "|" in line]
    return {first: cells for first, *cells in split}


def test_an_answer_is_one_token_with_a_space_before_it_where_it_needs_one():
    gpt2 = gpt2_tokenizer()
    assert gpt2.decode([single_token(gpt2, " Mary")]) == " Mary"
    assert gpt2.decode([single_token(gpt2, "Mary")]) == "Mary"
    assert gpt2.decode([single_token(gpt2, "Moses")]) == " Moses"
    with pytest.raises(
        LamaError,
        match=r"an answer must be one token; got 'Nebuchadnezzar', which is 7: N eb uch ad ne zz ar",
    ):
        single_token(gpt2, "Nebuchadnezzar")
    with pytest.raises(LamaError, match="an answer must be one token; got nothing"):
        single_token(gpt2, "")
    assert single_token(LETTERS, "b") == B and with_space(LETTERS, "b") is None
    assert with_space(CharacterTokenizer("ab"), "b") is None


def test_lens_prints_what_the_function_finds(folder, model, capsys, tmp_path):
    assert (
        main(
            [
                "lens",
                "-m",
                folder,
                CLEAN,
                "--answer",
                "b",
                "--against",
                "d",
                "--out",
                str(tmp_path / "lens.png"),
            ]
        )
        == 0
    )
    of_lens, of_parts, of_heads = (rows(table) for table in capsys.readouterr().out.split("\n\n"))
    lens, found = logit_lens(model, ids(CLEAN), B, 4), attribute(model, ids(CLEAN), B, D)
    for stage, name in enumerate(("embedding", "layer 0", "layer 1")):
        *top, rank, probability = of_lens[name]
        assert [cell.split()[0] for cell in top] == token_labels(LETTERS, lens.top[stage, -1])
        assert (rank, probability) == (str(lens.rank[stage, -1]), f"{lens.probability[stage, -1]:.2%}")
    assert of_parts["blocks.1.mlp_out"] == [f"{found.parts['blocks.1.mlp_out']:+.3f}"]
    assert of_parts["sum"] == of_parts["the model's logits"] == [f"{found.difference:+.3f}"]
    assert of_heads["layer 1"] == [f"{value:.3f}" for value in found.heads[1]]
    assert (tmp_path / "lens.png").read_bytes().startswith(PNG)


def test_lens_follows_the_model_s_own_answer_where_none_is_given(folder, model, capsys):
    assert main(["lens", "-m", folder, CLEAN]) == 0
    table = rows(capsys.readouterr().out)
    assert table["layer 1"][-2] == "1" and "sum" not in table


def test_lens_of_a_post_norm_model_has_no_attribution_and_says_why(tmp_path, capsys):
    model = GPT(GPTConfig(**SMALL, norm="post"))
    lama.save(tmp_path, model, LETTERS)
    assert main(["lens", "-m", str(tmp_path), CLEAN, "--answer", "b"]) == 0
    said = capsys.readouterr()
    assert "layer 1" in rows(said.out) and "sum" not in rows(said.out)
    assert re.fullmatch(
        r"lama: no attribution: heads' outputs must add up .* got a model with norm=post\n", said.err
    )


@pytest.mark.parametrize("site", ["resid_pre", "z"])
def test_patch_prints_what_the_function_finds(folder, model, capsys, tmp_path, site):
    picture = tmp_path / "patch.svg"
    assert (
        main(
            [
                "patch",
                folder,
                CLEAN,
                CORRUPTED,
                "--answer",
                "b",
                "--against",
                "e",
                "--site",
                site,
                "--out",
                str(picture),
            ]
        )
        == 0
    )
    out = capsys.readouterr().out
    found = patch(model, ids(CLEAN), ids(CORRUPTED), B, E, site)
    assert out.startswith(f"logit of b above e: clean {found.clean:+.3f}, corrupted {found.corrupted:+.3f}\n")
    table = rows(out)
    if site == "z":
        assert table["layer 1"] == [f"{value:.3f}" for value in found.effect[1]]
    else:
        assert (
            table["0 a / d"] == [f"{value:.3f}" for value in found.effect[:, 0]]
            and table["0 a / d"][0] == "1.000"
        )
        assert table["6 a"] == [f"{value:.3f}" for value in found.effect[:, 6]]
    assert b"<svg" in picture.read_bytes()


def test_ablate_prints_each_removal_and_all_together(folder, model, capsys, tmp_path):
    flags = [
        "--head",
        "0.1",
        "--head",
        "1.2",
        "--neuron",
        "1.16",
        "--mean",
        "--answer",
        "b",
        "--against",
        "e",
    ]
    assert main(["ablate", "-m", folder, CLEAN, *flags, "--out", str(tmp_path / "a.png")]) == 0
    table = rows(capsys.readouterr().out)
    every = Removal(((0, 1), (1, 2)), ((1, 16),))
    found = ablate(model, ids(CLEAN), [Removal(), Removal(((0, 1),)), every], mean=True)
    logits = found.logits[:, B] - found.logits[:, E]
    assert table["without"] == ["loss", "change", "logit of b above e", "change"]
    for row, i in (("head 0.1", 1), (str(every), 2)):
        changes = found.losses[i] - found.losses[0], logits[i] - logits[0]
        assert table[row] == [
            f"{found.losses[i]:.4f}",
            f"{changes[0]:+.4f}",
            f"{logits[i]:.4f}",
            f"{changes[1]:+.4f}",
        ]
    assert set(table) >= {"nothing", "head 1.2", "neuron 1.16"} and (
        tmp_path / "a.png"
    ).read_bytes().startswith(PNG)


def test_ablate_without_heads_takes_every_head_in_turn(folder, model, capsys, tmp_path):
    assert main(["ablate", "-m", folder, CLEAN, "--out", str(tmp_path / "a.png")]) == 0
    out = capsys.readouterr().out
    found = ablate(model, ids(CLEAN), [Removal(), *(Removal(((1, head),)) for head in range(3))])
    assert out.startswith(f"loss: {found.losses[0]:.4f}, and its change\n")
    assert rows(out)["layer 1"] == [f"{loss - found.losses[0]:.3f}" for loss in found.losses[1:]]


def test_ablate_gives_the_loss_on_both_copies_of_random_tokens(capsys, tmp_path):
    llama = {"norm_kind": "rms", "bias": False, "gated": True, "activation": "silu", "positions": "rope"}
    model = GPT(GPTConfig(**SMALL | llama | {"n_kv_heads": 1, "d_head": 6}), seed=None)
    fill(model, seed=1)
    lama.save(tmp_path / "llama", model, LETTERS)
    words = f"ablate {tmp_path / 'llama'} --repeated 5 --seed 3 --mean --head 0.1 --head 1.2 --draws 4"
    assert main([*words.split(), "--out", str(tmp_path / "a.svg")]) == 0
    table = rows(capsys.readouterr().out)
    (tokens,) = repeated_tokens(1, 5, 11, None, 3).tolist()
    every = Removal(((0, 1), (1, 2)))
    drawn = [Removal(heads) for heads in random_heads(every.heads, 3, 4, 3)]
    found = ablate(model, tokens, [Removal(), Removal(((0, 1),)), every, *drawn], mean=True)
    first, second = found.token_losses[:, :4].mean(-1), found.token_losses[:, 5:].mean(-1)
    assert table["without"] == ["loss, first copy", "change", "loss, second copy", "change"]
    expected = {"head 0.1": (first[1], second[1]), "head 0.1 + head 1.2": (first[2], second[2])}
    expected["2 other heads, mean of 4"] = first[3:].mean(), second[3:].mean()
    for row, values in expected.items():
        assert table[row][::2] == [f"{value:.4f}" for value in values]
    assert table["head 0.1"][3] == f"{second[1] - second[0]:+.4f}"
    assert b"<svg" in (tmp_path / "a.svg").read_bytes()


@pytest.mark.parametrize(("end", "begin"), [(10, 10), (11, None), (None, None)])
def test_repeated_random_tokens_follow_the_end_of_text_token_that_the_model_has(model, end, begin):
    args = argparse.Namespace(repeated=5, seed=3, text=None)
    tokens = read_tokens(model, SimpleNamespace(end_of_text=end, vocab_size=11), args)
    assert tokens == repeated_tokens(1, 5, 11, begin, 3)[0].tolist() and len(tokens) == 10 + (begin == 10)


def test_heads_prints_what_the_function_finds(folder, model, capsys, tmp_path):
    assert (
        main(
            [
                "heads",
                folder,
                "--length",
                "5",
                "--sequences",
                "2",
                "--seed",
                "3",
                "--out",
                str(tmp_path / "h.png"),
            ]
        )
        == 0
    )
    out = capsys.readouterr().out
    scores = head_scores(model, 5, 2, None, 3)
    tables = {table.split()[0]: table for table in out.split("\n\n")[1:]}
    for name, values in (
        ("previous-token", scores.previous_token),
        ("induction", scores.induction),
        ("copying", scores.copying),
    ):
        assert rows(tables[name])["layer 1"] == [f"{value:.3f}" for value in values[1]]
        layer, head = np.unravel_index(values.argmax(), values.shape)
        assert f"highest: {layer}.{head} {values.max():.3f}, " in tables[name]
    assert "published" not in out and (tmp_path / "h.png").read_bytes().startswith(PNG)


def test_known_heads_are_shown_for_gpt2_and_no_other():
    class Called(GPT):
        def __init__(self, config: GPTConfig):
            self.config = config

    gpt2 = Called(GPT2_CONFIGS["gpt2"])
    assert known_heads("gpt2", gpt2) == GPT2_SMALL
    assert (
        known_heads("gpt2", Called(dataclasses.replace(GPT2_CONFIGS["gpt2"], end_tokens=(50256,))))
        == GPT2_SMALL
    )
    assert known_heads("mine", gpt2) == known_heads("gpt2", Called(GPT2_CONFIGS["gpt2-medium"])) == ()
    here = np.arange(144).reshape(12, 12) / 1000
    text = known_table(GPT2_SMALL, {"induction": here, "copying": -here})
    lines = [[cell.strip() for cell in line.split("|")] for line in text.splitlines()]
    assert ["5.5", "induction", "0.932", "0.065", "-0.065", "[1]"] in lines
    assert ["4.11", "previous token", "", "0.059", "-0.059", "[3]"] in lines
    assert "[1] github.com/designer-coderajay/induction-head-detector, 50 random tokens twice" in text
    assert all(layer < 12 and head < 12 for group in GPT2_SMALL for layer, head in group.heads)


@pytest.mark.parametrize(
    ("command", "code", "message"),
    [
        ("lens -m M ", 1, "the text must not be empty; got nothing"),
        ("lens -m M abcabcabcabcab", 1, "the text must fit context_length; got 14 tokens, context_length=13"),
        ("lens -m M ab --against a", 2, "--against needs --answer; got --against alone"),
        ("lens -m M ab --answer ab", 1, "an answer must be one token; got 'ab', which is 2: a b"),
        ("lens -m M ab --out x.pdf", 2, "--out must end in .png or .svg; got x.pdf"),
        (
            "patch -m M ab abc --answer a --against b",
            1,
            "must have equally many tokens; got 2 in the clean one, 3 in the other",
        ),
        ("patch -m M ab ab --answer a", 2, "the following arguments are required: --against"),
        (
            "ablate -m M ab --head 2.0",
            1,
            "a head must be one of the model's; got 2.0, and there are layers 0 to 1 with heads 0 to 2",
        ),
        (
            "ablate -m M ab --neuron 0.17",
            1,
            "a neuron must be one of the model's; got 0.17, and there are layers 0 to 1 with neurons 0 to 16",
        ),
        ("ablate -m M ab --head 2", 2, "must be a layer and a number, as in 3.11; got '2'"),
        ("ablate -m M", 2, "give either TEXT or --repeated N"),
        ("ablate -m M ab --repeated 3", 2, "give either TEXT or --repeated N"),
        ("ablate -m M --repeated 1", 2, "repeated must be at least 2; got 1"),
        ("ablate -m M --repeated 7", 2, "twice as many tokens must fit context_length=13; got 7"),
        ("ablate -m M --repeated 3 --answer a", 2, "--answer needs TEXT; leave it out with --repeated"),
        ("ablate -m M ab --draws 3", 2, "--draws needs --head; got --draws alone"),
        ("ablate -m M ab --head 0.1 --draws 1001", 2, "draws must be at most 1,000; got 1001"),
        ("ablate -m M ab --head 0.1 --head 0.2 --draws 1", 1, "got 2 of layer 0's 3 heads"),
        ("ablate -m M ab --head 2.0 --draws 1", 1, "a head must be one of the model's; got 2.0"),
        ("ablate -m M a", 2, "the loss needs at least two tokens; got one. Give a longer TEXT, or --answer"),
        (
            "heads -m M --length 7",
            2,
            "length must be at least 2, and twice as many tokens must fit context_length=13; got 7",
        ),
        ("heads -m M --sequences 0", 2, "sequences must be at least 1; got 0"),
    ],
)
def test_what_cannot_be_done_is_one_line(folder, capsys, command, code, message):
    words = [folder if word == "M" else word for word in command.split(" ")]
    assert main(words) == code
    said = capsys.readouterr()
    assert message in said.err and said.err.count("\n") == 1 and said.out == ""


def test_a_model_that_is_no_gpt_is_refused(tmp_path, capsys):
    lama.save(tmp_path, Bert(BertConfig(11, 13, 6, 1, 3, 17, mask=10)), LETTERS)
    for verb in (["lens", "-m", str(tmp_path), "ab"], ["heads", "-m", str(tmp_path)]):
        assert main(verb) == 1
        assert "the model must be a gpt here; got a bert" in capsys.readouterr().err


def test_the_model_is_an_option_and_a_positional_argument_with_a_hint(folder, capsys):
    said = []
    named = (
        ["-m", folder, "ab"],
        ["ab", f"--model={folder}"],
        ["-m", folder, "--", "ab"],
        [f"-m{folder}", "ab"],
    )
    for words in (*named, [folder, "ab"], [folder, "--", "ab"]):
        assert main(["lens", *words]) == 0
        said.append(capsys.readouterr())
    assert len({each.out for each in said}) == 1
    hint = f"lama: write the model as -m {folder}\n"
    assert [each.err for each in said] == ["", "", "", "", hint, hint]


@pytest.mark.parametrize(
    ("words", "missing"),
    [([], "-m MODEL, PROMPT"), (["M"], "PROMPT"), (["-m", "M"], "PROMPT"), (["-m"], "")],
    ids=str,
)
def test_a_missing_model_or_text_is_named(capsys, words, missing):
    assert main(["lens", *words]) == 2
    wanted = f"the following arguments are required: {missing}. See" if missing else "expected one argument"
    said = capsys.readouterr().err
    assert wanted in said and said.count("\n") == 1


def test_help_shows_the_model_as_a_required_option(capsys):
    with pytest.raises(SystemExit):
        main(["lens", "--help"])
    assert " -m MODEL [--answer TOKEN]" in capsys.readouterr().out
