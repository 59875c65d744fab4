"""Flags beat what a model's files recommend, which beats lama's defaults."""

import json
from pathlib import Path

import pytest

from lama.checkpoints.huggingface import recommended
from lama.cli import Parser
from lama.cli.sampling import add_sampling, sampling
from lama.errors import LamaError, UsageError

DEFAULTS = {"temperature": 0.8, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
DEFAULTS |= {"presence_penalty": 0.0, "frequency_penalty": 0.0}


def parsed(*argv: str):
    parser = Parser()
    add_sampling(parser)
    return parser.parse_args(argv)


def test_flags_then_recommendations_then_defaults():
    own = {"temperature": 0.2, "top_p": 0.9}
    assert sampling(parsed()) == {**DEFAULTS, "seed": 0}
    assert sampling(parsed(), own) == {**DEFAULTS, **own, "seed": 0}
    given = sampling(parsed("--temperature", "0.5", "--top-k", "0", "--seed", "3"), {**own, "top_k": 5})
    assert given == {**DEFAULTS, "temperature": 0.5, "top_k": 0, "top_p": 0.9, "seed": 3}
    with pytest.raises(UsageError, match=r"top_p must be above 0 and at most 1; got 2\.0"):
        sampling(parsed("--top-p", "2"))


def test_only_the_keys_of_generation_config_count(tmp_path: Path):
    written = {
        "temperature": 0.6,
        "top_k": 20,
        "max_length": 40,
        "repetition_penalty": None,
        "do_sample": True,
    }
    assert recommended(json.loads(json.dumps(written))) == {"temperature": 0.6, "top_k": 20}
    assert recommended({"do_sample": False, "temperature": 0.6}) == {"temperature": 0.0}
    assert recommended(None) == recommended({}) == {}
    with pytest.raises(LamaError, match=r"top_k in generation_config\.json must be"):
        recommended({"top_k": "many"})
