"""The inside of a model as a server answers it: taps, lens, attention and embeddings."""

import json
from io import BytesIO

import numpy as np
import pytest
from helpers import fill
from test_gguf import GPT2, LLAMA
from tinygrad import Tensor

from lama.generation.decoder import Runner
from lama.interp.lens import logit_lens
from lama.interp.record import run_with_cache
from lama.models.gpt import GPT, GPTConfig
from lama.server import inside, steps
from lama.server.embeddings import embed
from lama.server.fields import BadField
from lama.server.inside import attention, internals, lens, to_json, to_npz
from lama.tokenizers import ByteTokenizer

BYTES = ByteTokenizer()
TEXT = "Why? É"
TOKENS = BYTES.encode(TEXT)  # 7 of them, and the model has 40
FAMILIES = {"gpt2": GPT2, "llama": {**LLAMA, "tied": False}}


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> GPT:
    model = GPT(GPTConfig(**FAMILIES[request.param]))
    fill(model, seed=3)
    return model


def taps(answer: inside.Answer) -> dict[str, np.ndarray]:
    found = answer["taps"]
    assert all(fields["shape"] == list(fields["data"].shape) for fields in found.values())
    return {name: fields["data"] for name, fields in found.items()}


def test_taps_equal_a_recording_of_the_whole_model(model: GPT) -> None:
    logits, cache = run_with_cache(model, [TOKENS])
    found = taps(internals(model, BYTES, {"prompt": TEXT, "taps": "*", "format": "npz"}))
    assert found.keys() == cache.keys() == inside.activations(model).keys()
    for name, value in found.items():
        expected = cache[name] if name == "pos_embed" else cache[name][0]
        np.testing.assert_allclose(value, expected, atol=1e-4 * max(1, np.abs(logits).max()), err_msg=name)


@pytest.mark.parametrize(
    "layers",
    [
        {"n_layers": 5, "windows": (0, 3, 4), "local_theta": 100.0},
        {"n_layers": 3, "rope_layers": (False, True)},
        {"n_layers": 3, "scale_by_layer": True},
        {"n_layers": 0},
    ],
)
def test_layers_that_differ_have_their_own_steps(layers: dict[str, object]) -> None:
    model = GPT(GPTConfig(**{**LLAMA, **layers}))
    fill(model, seed=4)
    expected = run_with_cache(model, [TOKENS])[1]
    found = taps(internals(model, BYTES, {"prompt": TEXT, "taps": "*", "format": "npz"}))
    assert found.keys() == expected.keys()
    for name, value in found.items():
        other = expected[name].reshape(value.shape)
        np.testing.assert_allclose(value, other, atol=1e-3, rtol=1e-4, err_msg=name)
    stages = lens(model, BYTES, {"prompt": TEXT})["layers"]
    assert len(stages) == 1 + layers["n_layers"]


def test_logits_are_those_of_generation(model: GPT) -> None:
    served = Runner(model).prefill(np.array([TOKENS]))[0]
    found = taps(internals(model, BYTES, {"prompt": TOKENS, "taps": ["logits"], "positions": [-1]}))["logits"]
    assert found.shape == (1, 257)
    np.testing.assert_allclose(found[0], served, atol=1e-4)


def test_layers_heads_and_positions_are_chosen(model: GPT) -> None:
    whole = taps(internals(model, BYTES, {"prompt": TEXT, "taps": ["blocks.*.attn.*", "embed"]}))
    body = {"prompt": TEXT, "taps": ["blocks.*.attn.hook_*", "embed"], "layers": [1], "heads": [3, 0]}
    found = taps(internals(model, BYTES, {**body, "positions": [2, -1]}))
    assert {name for name in whole if not name.startswith("blocks.0.")} == found.keys()
    for name, value in found.items():
        expected = whole[name][..., [2, 6], :]
        if expected.ndim == 3:
            group = 4 // len(expected)
            expected = expected[[3 // group, 0]]
        np.testing.assert_allclose(value, expected, atol=1e-3, rtol=1e-4)


def test_width_of_the_padding_changes_nothing(model: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    body = {"prompt": TEXT, "taps": ["blocks.1.attn.pattern", "blocks.1.resid_post"]}
    padded = taps(internals(model, BYTES, body))
    monkeypatch.setattr(steps, "padded_to_width", lambda tokens, most: np.array([tokens], np.int32))
    for name, value in taps(internals(model, BYTES, body)).items():
        np.testing.assert_allclose(value, padded[name], atol=1e-3, rtol=1e-4)


def test_json_and_npz_hold_the_same_numbers(model: GPT) -> None:
    answer = internals(model, BYTES, {"prompt": TEXT, "taps": ["blocks.0.attn.scores", "blocks.1.resid_mid"]})
    read = json.loads(to_json(answer))
    assert read["tokens"] == TOKENS and read["texts"] == answer["texts"]
    with np.load(BytesIO(to_npz(answer))) as arrays:
        assert arrays["tokens"].tolist() == TOKENS
        for name, fields in read["taps"].items():
            assert arrays[name].shape == tuple(fields["shape"]) and arrays[name].dtype == np.float32
            np.testing.assert_array_equal(np.array(fields["data"], np.float32), arrays[name])
    odd = {"a": np.array([np.nan, np.inf, -np.inf, -1.5e-7], np.float32), "b": [{}, [], "é\n"]}
    assert to_json(odd).decode() == '{"a":[null,null,null,-1.5e-07],"b":[{},[],"é\\n"]}'.replace(
        "-1.5e-07", f"{float(np.float32(-1.5e-7)):.9g}"
    )


def test_lens_is_the_command_s(model: GPT) -> None:
    for position in (2, -1):
        expected = logit_lens(model, TOKENS, answer=5, k=3)
        found = lens(model, BYTES, {"prompt": TEXT, "position": position, "answer": 5, "k": 3})
        assert found["position"] == position % 7 and found["tokens"] == TOKENS
        names = [layer["name"] for layer in found["layers"]]
        assert names == ["embed", "blocks.0.resid_post", "blocks.1.resid_post"]
        for i, layer in enumerate(found["layers"]):
            assert [each["token"] for each in layer["top"]] == expected.top[i, position].tolist()
            top = [each["probability"] for each in layer["top"]]
            np.testing.assert_allclose(top, expected.top_probability[i, position], atol=1e-4)
            assert layer["answer_rank"] == expected.rank[i, position]
            assert abs(layer["answer_probability"] - expected.probability[i, position]) < 1e-4
    assert "answer_rank" not in lens(model, BYTES, {"prompt": TEXT})["layers"][0]


def test_attention_of_a_query_and_of_all(model: GPT) -> None:
    _, cache = run_with_cache(model, [TOKENS], "blocks.*.attn.pattern")
    found = attention(model, BYTES, {"prompt": TEXT, "position": 4})
    assert [layer["layer"] for layer in found["layers"]] == [0, 1] and found["position"] == 4
    for layer in found["layers"]:
        for head in layer["heads"]:
            expected = cache[f"blocks.{layer['layer']}.attn.pattern"][0, head["head"], 4, :5]
            np.testing.assert_allclose(head["weights"], expected, atol=1e-5)
    found = attention(model, BYTES, {"prompt": TEXT, "full": True, "layers": [1, 0], "heads": [2]})
    assert found["position"] is None and [layer["layer"] for layer in found["layers"]] == [1, 0]
    for layer in found["layers"]:
        (head,) = layer["heads"]
        expected = cache[f"blocks.{layer['layer']}.attn.pattern"][0, 2]
        np.testing.assert_allclose(head["weights"], expected, atol=1e-5)


def test_embedding_is_the_mean_of_the_last_hidden_states(model: GPT) -> None:
    for tokens in (TOKENS, TOKENS[:1], [*range(40)]):
        hidden = model.hidden(Tensor([tokens])).numpy()[0].mean(0)
        found = embed(model, tokens)
        np.testing.assert_allclose(found, hidden / np.linalg.norm(hidden), atol=1e-5)
        assert abs(np.linalg.norm(found) - 1) < 1e-6


def test_second_model_has_its_own_steps(model: GPT) -> None:
    first = embed(model, TOKENS)
    other = GPT(model.config, seed=1)
    assert np.abs(embed(other, TOKENS) - first).max() > 1e-3
    np.testing.assert_array_equal(embed(model, TOKENS), first)


BAD = [
    (internals, {"taps": ["embed"]}, "prompt", "text or a list"),
    (internals, {"prompt": "", "taps": ["embed"]}, "prompt", "text or a list"),
    (internals, {"prompt": [257], "taps": ["embed"]}, "prompt", "ids from 0 to 256; got 257"),
    (internals, {"prompt": [True], "taps": ["embed"]}, "prompt", "ids"),
    (internals, {"prompt": "x" * 41, "taps": ["embed"]}, "prompt", "at most 40 tokens; got 41"),
    (internals, {"prompt": "x" * (1 << 21), "taps": ["embed"]}, "prompt", "2,097,152 characters"),
    (internals, {"prompt": "\ud800", "taps": ["embed"]}, "prompt", "cannot be encoded"),
    (internals, {"prompt": TEXT}, "taps", "1 to 100 strings"),
    (internals, {"prompt": TEXT, "taps": [3]}, "taps", "strings"),
    (internals, {"prompt": TEXT, "taps": ["blocks.0.attn.patern"]}, "taps", "mean blocks.0.attn.pattern"),
    (internals, {"prompt": TEXT, "taps": ["blocks.0.*"], "layers": [1]}, "taps", "match the name"),
    (internals, {"prompt": TEXT, "taps": ["embed"], "layers": [2]}, "layers", "0 to 1"),
    (internals, {"prompt": TEXT, "taps": ["embed"], "heads": []}, "heads", "1 to 4"),
    (internals, {"prompt": TEXT, "taps": ["embed"], "positions": [7]}, "positions", "0 to 6"),
    (internals, {"prompt": TEXT, "taps": ["embed"], "max_tokens": 34}, "max_tokens", "0 to 33"),
    (internals, {"prompt": TEXT, "taps": ["embed"], "format": "csv"}, "format", "json, npz"),
    (lens, {"prompt": TEXT, "position": 7}, "position", "-7 to 6"),
    (lens, {"prompt": TEXT, "answer": 257}, "answer", "0 to 256"),
    (lens, {"prompt": TEXT, "k": 0}, "k", "1 to 100"),
    (attention, {"prompt": TEXT, "full": 1}, "full", "true or false"),
    (attention, {"prompt": TEXT, "full": True, "position": 1}, "position", "absent"),
    (attention, {"prompt": TEXT, "heads": [4]}, "heads", "0 to 3"),
]


@pytest.mark.parametrize(("function", "body", "param", "message"), BAD, ids=range(len(BAD)))
def test_wrong_fields_are_refused_by_name(model: GPT, function, body, param: str, message: str) -> None:
    with pytest.raises(BadField, match=message) as error:
        function(model, BYTES, body)
    assert error.value.param == param and "\n" not in str(error.value) and len(str(error.value)) < 400


def test_large_answers_are_refused_before_anything_runs(model: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inside, "MOST_BYTES", 20_000)
    monkeypatch.setattr(inside, "run", None)
    body = {"prompt": TEXT, "taps": ["logits"]}
    with pytest.raises(BadField, match=r"0 MB of numbers. Choose .* or ask for format npz"):
        internals(model, BYTES, body)
    with pytest.raises(TypeError):  # 7 · 257 float32 are less
        internals(model, BYTES, {**body, "format": "npz"})
    with pytest.raises(BadField):
        internals(model, BYTES, {**body, "format": "npz", "max_tokens": 30})
    with pytest.raises(BadField):
        attention(model, BYTES, {"prompt": "x" * 40, "full": True})
