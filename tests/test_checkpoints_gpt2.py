"""GPT-2's config and names, and filling a model: every disagreement is named."""

import json
from pathlib import Path

import numpy as np
import pytest
from reference import random_gpt2
from tinygrad import Tensor, dtypes
from tinygrad.nn.state import get_state_dict

from lama.checkpoints import export_huggingface, load, load_model, load_tokenizer, save
from lama.checkpoints.gpt2 import config_from_huggingface, gpt2_name, huggingface_config, lama_name
from lama.errors import LamaError, LamaWarning, UsageError
from lama.models.gpt import GPT, GPT2_CONFIGS, GPTConfig
from lama.tokenizers import CharacterTokenizer

CONFIG = random_gpt2.make_config(**random_gpt2.TINY)
WEIGHTS = random_gpt2.make_weights(CONFIG)


def folder_with(path: Path, change=lambda weights: weights, **config) -> Path:
    return random_gpt2.write_folder(path, CONFIG | config, change(dict(WEIGHTS)))


def parameters(model: GPT) -> dict[str, np.ndarray]:
    return {name: tensor.float().numpy() for name, tensor in get_state_dict(model).items()}


def test_config_gives_every_field():
    fields = random_gpt2.make_config(
        vocab_size=23,
        n_positions=13,
        n_embd=10,
        n_layer=3,
        n_head=5,
        n_inner=17,
        layer_norm_epsilon=1e-3,
        activation_function="relu",
        tie_word_embeddings=False,
    )
    assert config_from_huggingface(fields) == GPTConfig(
        vocab_size=23,
        context_length=13,
        d_model=10,
        n_layers=3,
        n_heads=5,
        d_mlp=17,
        norm_epsilon=1e-3,
        activation="relu",
        tied=False,
        end_tokens=(0,),
    )


def test_config_that_says_nothing_is_the_124m_model():
    assert config_from_huggingface({"model_type": "gpt2"}) == GPT2_CONFIGS["gpt2"]


def test_config_reads_synonyms():
    fields = {
        "hidden_size": 10,
        "num_hidden_layers": 3,
        "num_attention_heads": 5,
        "max_position_embeddings": 13,
    }
    # a synonym counts first, as in transformers.
    for others in ({}, {"n_embd": 20, "n_layer": 4, "n_head": 2, "n_positions": 7}):
        config = config_from_huggingface(others | fields)
        assert (config.d_model, config.n_layers, config.n_heads, config.context_length) == (10, 3, 5, 13)


@pytest.mark.parametrize("fields", [{"n_positions": 13, "n_ctx": 1024}, {"n_ctx": 7, "n_positions": 13}])
def test_config_ignores_n_ctx(fields: dict):
    assert config_from_huggingface(fields).context_length == 13
    assert config_from_huggingface({"n_ctx": 7}).context_length == 1024


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("gelu_new", "gelu_new"),
        ("gelu_pytorch_tanh", "gelu_new"),
        ("gelu_fast", "gelu_new"),
        ("gelu", "gelu"),
        ("relu", "relu"),
        ("silu", "silu"),
        ("swish", "silu"),
        ("tanh", "tanh"),
        ("quick_gelu", "quick_gelu"),
    ],
)
def test_config_reads_activations(name: str, ours: str):
    assert config_from_huggingface({"activation_function": name}).activation == ours


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model_type", "llama", "must have model_type='gpt2'; got 'llama', which lama does not support"),
        (
            "scale_attn_by_inverse_layer_idx",
            1,
            "scale_attn_by_inverse_layer_idx in config.json must be true or false; got 1",
        ),
        ("scale_attn_weights", None, "scale_attn_weights in config.json must be true or false; got None"),
        ("add_cross_attention", True, "must have add_cross_attention=False; got True"),
        ("quantization_config", {"bits": 4}, "must have quantization_config=None; got {'bits': 4}"),
        ("activation_function", "mish", "must have activation_function among gelu_new, .*; got 'mish'"),
        ("activation_function", 7, "activation_function in config.json must be a text; got 7"),
        ("n_layer", "12", "n_layer in config.json must be a whole number; got '12'"),
        ("n_layer", True, "n_layer in config.json must be a whole number; got True"),
        ("n_layer", "1" * 10_000, "n_layer in config.json must be a whole number; got '1{199}\\.\\.\\.$"),
        ("n_layer", -1, "n_layers must be at least 0; got n_layers=-1"),
        ("n_head", 7, "d_model must be a multiple of n_heads; got d_model=768, n_heads=7"),
        ("tie_word_embeddings", 1, "tie_word_embeddings in config.json must be true or false; got 1"),
        ("n_positions", None, "n_positions in config.json must be a whole number; got None"),
        ("eos_token_id", "5", "eos_token_id in config.json must be a whole number; got '5'"),
        ("eos_token_id", [5, [6]], r"eos_token_id in config.json must be a whole number; got \[6\]"),
    ],
)
def test_config_that_is_not_supported_is_refused_by_name(key: str, value: object, message: str):
    with pytest.raises(LamaError, match=message):
        config_from_huggingface(random_gpt2.make_config() | {key: value}, "config.json")


def test_config_survives_the_round_trip():
    others = (
        {"d_mlp": 5, "activation": "gelu", "tied": False, "norm_epsilon": 0.1},
        {"similarity": "dot", "scale_by_layer": True, "activation": "quick_gelu", "end_tokens": (3, 1)},
    )
    for config in (*GPT2_CONFIGS.values(), *(GPTConfig(vocab_size=7, **other) for other in others)):
        assert config_from_huggingface(huggingface_config(config)) == config
    with pytest.raises(LamaError, match="a GPT-2 model must have positions='learned'; got 'sinusoidal'"):
        huggingface_config(GPTConfig(positions="sinusoidal"))


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_names_are_translated_both_ways(prefix: str):
    config = random_gpt2.make_config(**random_gpt2.TINY, tie_word_embeddings=False)
    names = list(random_gpt2.make_weights(config))
    ours = [lama_name(prefix + name) for name in names]
    assert set(ours) == set(get_state_dict(GPT(config_from_huggingface(config), seed=None)))
    assert [gpt2_name(name) for name in ours if name] == names


@pytest.mark.parametrize(
    "name", ["score.weight", "h.x.ln_1.weight", "h.0.ln_3.weight", "wte", "h.0.1.ln_1.weight", ""]
)
def test_names_that_gpt2_does_not_have_are_not_translated(name: str):
    assert lama_name(name) is None


def test_load_puts_every_tensor_in_its_place(tmp_path: Path):
    loaded = parameters(load_model(folder_with(tmp_path)))
    assert len(loaded) == len(WEIGHTS)
    for name, value in WEIGHTS.items():
        conv1d = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
        assert np.array_equal(loaded[lama_name(name) or ""], value.T if conv1d else value), name


FORMATS = {
    "prefixed": (random_gpt2.with_prefix, None),
    "with masks": (lambda weights: random_gpt2.with_masks(weights, CONFIG), None),
    "sharded": (random_gpt2.with_prefix, random_gpt2.write_shards),
    "torch": (lambda weights: random_gpt2.with_masks(weights, CONFIG), random_gpt2.write_torch),
    "torch before 1.6": (
        lambda weights: random_gpt2.with_masks(weights, CONFIG),
        random_gpt2.write_torch_legacy,
    ),
    "torch sharded": (
        random_gpt2.with_prefix,
        lambda folder, w: random_gpt2.write_shards(folder, w, 2, "pytorch_model", "bin"),
    ),
}


@pytest.mark.parametrize("form", FORMATS)
def test_load_gives_the_same_weights_from_every_format(tmp_path: Path, form: str):
    change, write = FORMATS[form]
    plain = parameters(load_model(folder_with(tmp_path / "plain")))
    other = parameters(
        load_model(random_gpt2.write_folder(tmp_path / "other", CONFIG, change(dict(WEIGHTS)), write))
    )
    assert all(np.array_equal(plain[name], other[name]) for name in plain)


def test_load_reads_half_precision_files(tmp_path: Path):
    half = {name: value.astype(np.float16) for name, value in WEIGHTS.items()}
    brain = random_gpt2.to_bfloat16(WEIGHTS)
    assert np.array_equal(
        parameters(load_model(folder_with(tmp_path / "h", lambda _: half)))["embed.weight"],
        half["wte.weight"],
    )
    loaded = parameters(load_model(folder_with(tmp_path / "b", lambda _: brain)))
    assert np.array_equal(loaded["embed.weight"], random_gpt2.from_bfloat16(brain)["wte.weight"])


@pytest.mark.parametrize(
    ("dtype", "held"),
    [("float32", dtypes.float32), ("float16", dtypes.float16), ("bfloat16", dtypes.bfloat16)],
)
def test_load_holds_weights_in_the_dtype_asked_for(tmp_path: Path, dtype: str, held: object):
    model = load_model(folder_with(tmp_path), dtype=dtype)
    assert {tensor.dtype for tensor in get_state_dict(model).values()} == {held}
    expected = {
        "float32": WEIGHTS["wte.weight"],
        "float16": WEIGHTS["wte.weight"].astype(np.float16),
        "bfloat16": random_gpt2.from_bfloat16(random_gpt2.to_bfloat16(WEIGHTS))["wte.weight"],
    }[dtype]
    assert np.array_equal(model.embed.weight.float().numpy(), expected)


def test_load_refuses_an_unknown_dtype(tmp_path: Path):
    with pytest.raises(
        UsageError, match="dtype must be one of float32, float16, bfloat16, int8, int4; got 'int2'"
    ):
        load(folder_with(tmp_path), dtype="int2")


def test_load_accepts_a_tied_output_layer_that_equals_the_embedding(tmp_path: Path):
    model = load_model(folder_with(tmp_path, lambda w: w | {"lm_head.weight": w["wte.weight"]}))
    assert model.unembed is None


def test_load_refuses_a_tied_output_layer_that_differs(tmp_path: Path):
    folder = folder_with(tmp_path, lambda w: w | {"lm_head.weight": w["wte.weight"] + 1})
    with pytest.raises(
        LamaError,
        match=r"must have lm_head\.weight equal to wte\.weight in a tied model; got different numbers",
    ):
        load_model(folder)


def test_load_refuses_tied_tensors_without_elements(tmp_path: Path):
    empty = np.zeros((5, 0), np.float32)
    folder = folder_with(tmp_path, lambda w: w | {"lm_head.weight": empty, "wte.weight": empty})
    with pytest.raises(LamaError, match=r"wrong shape: .*wte\.weight"):
        load_model(folder)


def test_load_names_missing_unknown_and_misshapen_tensors_in_one_message(tmp_path: Path):
    def damage(weights):
        del weights["h.1.attn.c_proj.bias"], weights["ln_f.weight"]
        return weights | {
            "value.weight": np.zeros((2, 2), np.float32),
            "wpe.weight": np.zeros((12, 10), np.float32),
        }

    with pytest.raises(LamaError) as caught:
        load_model(folder_with(tmp_path, damage))
    assert str(caught.value) == (
        f"{tmp_path / 'model.safetensors'} must hold exactly the tensors that its config describes; got "
        "missing: h.1.attn.c_proj.bias, ln_f.weight; unknown: value.weight; "
        "wrong shape: wpe.weight (12, 10) instead of (13, 10). Is config.json this model's?"
    )


def test_load_abbreviates_long_lists(tmp_path: Path):
    with pytest.raises(
        LamaError, match=r"missing: h\.2\.ln_1\.weight, h\.2\.ln_1\.bias, [^,]*, [^,]* and 8 more\. Is"
    ):
        load_model(folder_with(tmp_path, n_layer=3))


def test_load_names_shapes_as_they_are_in_the_file(tmp_path: Path):
    with pytest.raises(
        LamaError, match=r"wrong shape: h\.0\.mlp\.c_fc\.weight \(10, 40\) instead of \(10, 17\)"
    ):
        load_model(folder_with(tmp_path, n_inner=17))


def test_load_refuses_a_tensor_that_is_there_with_and_without_prefix(tmp_path: Path):
    folder = folder_with(tmp_path, lambda w: w | {"transformer.ln_f.bias": w["ln_f.bias"]})
    with pytest.raises(
        LamaError, match=r"must hold each tensor once; got ln_f\.bias and transformer\.ln_f\.bias"
    ):
        load_model(folder)


def test_load_names_a_tensor_with_nan(tmp_path: Path):
    def damage(weights):
        weights["h.1.mlp.c_fc.bias"] = np.full(40, np.nan, np.float32)
        return weights

    with pytest.raises(
        LamaError, match=r"weights must be finite; got NaN or infinity in h\.1\.mlp\.c_fc\.bias"
    ):
        load_model(folder_with(tmp_path, damage))


def test_load_refuses_integers_as_weights(tmp_path: Path):
    folder = folder_with(tmp_path, lambda w: w | {"ln_f.bias": np.zeros(10, np.int64)})
    with pytest.raises(LamaError, match=r"weights must be of a float dtype .*; got int64 for ln_f\.bias"):
        load_model(folder)


def test_load_without_config_says_so(tmp_path: Path):
    random_gpt2.write_safetensors(tmp_path, WEIGHTS)
    with pytest.raises(LamaError, match=r"a model must have config\.json beside its weights; got none in"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "must be valid JSON; got "), ("[1]", r"must be an object; got \[1\]"), ("\xff", "JSON")],
)
def test_load_refuses_a_config_that_is_not_json(tmp_path: Path, content: str, message: str):
    folder_with(tmp_path)
    (tmp_path / "config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(LamaError, match=message):
        load(tmp_path)


def test_load_without_weights_says_so(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(
        LamaError,
        match=r"a model's folder must hold model\.safetensors or pytorch_model\.bin; got neither in",
    ):
        load(tmp_path)


def test_load_takes_a_weight_file(tmp_path: Path):
    folder_with(tmp_path)
    model = load_model(tmp_path / "model.safetensors")
    assert np.array_equal(model.pos_embed.weight.numpy(), WEIGHTS["wpe.weight"])


def test_load_needs_a_tokenizer(tmp_path: Path):
    got = r"got no tokenizer\.json, nor vocab\.json and merges\.txt, nor vocab\.txt"
    with pytest.raises(LamaError, match=f"a model must have its tokenizer beside it; {got}"):
        load(folder_with(tmp_path))


def test_load_gives_gpt2s_tokenizer_to_a_model_of_its_vocabulary(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(random_gpt2.make_config()))
    (tmp_path / "model.safetensors").touch()
    assert load_tokenizer(tmp_path).encode("How can entropy be reversed?") == [
        2437,
        460,
        40709,
        307,
        17687,
        30,
    ]


def test_load_leaves_no_parameter_unfilled(tmp_path: Path):
    loaded = parameters(load_model(folder_with(tmp_path)))
    for name, value in loaded.items():
        assert np.isfinite(value).all() and value.std() > 0, name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_load_puts_weights_on_the_device_asked_for(tmp_path: Path, dtype: str):
    model = load_model(folder_with(tmp_path), dtype=dtype, device="CPU:1")
    assert {tensor.device for tensor in get_state_dict(model).values()} == {"CPU:1"}
    assert np.allclose(model.pos_embed.weight.float().numpy(), WEIGHTS["wpe.weight"], rtol=2**-8)


# --- what transformers' and its users' files have


PREFIXES = (
    "module.",
    "_orig_mod.",
    "_module.",
    "module._orig_mod.",
    "_orig_mod.module.",
    "_fsdp_wrapped_module.",
)
# a matrix that is not transposed has the right shape all the same.
SQUARE = random_gpt2.make_config(**random_gpt2.TINY | {"n_inner": 10})


def test_tied_pair_is_read_under_either_name(tmp_path: Path):
    plain = parameters(load_model(folder_with(tmp_path / "plain")))
    head = {"lm_head.weight" if name == "wte.weight" else name: value for name, value in WEIGHTS.items()}
    other = parameters(load_model(random_gpt2.write_folder(tmp_path / "head", CONFIG, head)))
    assert plain.keys() == other.keys() and all(np.array_equal(plain[name], other[name]) for name in plain)
    untied = random_gpt2.write_folder(tmp_path / "untied", CONFIG | {"tie_word_embeddings": False}, head)
    with pytest.raises(LamaError, match=r"got missing: wte\.weight\."):
        load_model(untied)


def wrap_inside(name: str) -> str:
    """As torch.compile and FSDP name the parts of a model that each are wrapped."""
    return (
        name.replace("h.1.", "h.1._orig_mod.")
        .replace("c_proj.", "c_proj._fsdp_wrapped_module.")
        .replace("c_fc.", "c_fc.module.")
    )


@pytest.mark.parametrize("rename", [*PREFIXES, wrap_inside], ids=[*PREFIXES, "inside"])
@pytest.mark.parametrize("start", ["", "transformer."])
def test_names_of_wrapped_models_are_read(tmp_path: Path, rename, start: str):
    weights = random_gpt2.make_weights(SQUARE)
    wrapped = {
        rename(start + name) if callable(rename) else rename + start + name: value
        for name, value in weights.items()
    }
    wrapped |= {"module.h.0.attn.bias": np.ones((1, 1, 13, 13), np.uint8)}
    plain = parameters(load_model(random_gpt2.write_folder(tmp_path / "plain", SQUARE, weights)))
    other = parameters(load_model(random_gpt2.write_folder(tmp_path / "wrapped", SQUARE, wrapped)))
    assert plain.keys() == other.keys() and all(np.array_equal(plain[name], other[name]) for name in plain)


def test_load_refuses_a_tensor_that_is_there_with_and_without_a_wrapper(tmp_path: Path):
    folder = folder_with(tmp_path, lambda w: w | {"module.ln_f.bias": w["ln_f.bias"]})
    with pytest.raises(LamaError, match=r"must hold each tensor once; got ln_f\.bias and module\.ln_f\.bias"):
        load_model(folder)


@pytest.mark.parametrize(
    "names",
    [
        ["score.weight"],
        ["multiple_choice_head.summary.weight", "multiple_choice_head.summary.bias"],
        ["module.classifier.weight", "module.classifier.bias"],
        ["qa_outputs.weight", "qa_outputs.bias"],
        ["v_head.summary.weight", "v_head.summary.bias"],
    ],
)
def test_heads_for_other_tasks_are_left_out_with_a_warning(tmp_path: Path, names: list[str]):
    folder = folder_with(tmp_path, lambda w: w | {name: np.ones((2, 10), np.float32) for name in names})
    with pytest.warns(LamaWarning) as caught:
        loaded = parameters(load_model(folder))
    assert [str(each.message) for each in caught] == [
        f"{folder / 'model.safetensors'}: left out {', '.join(names)}, which belong to heads for other tasks"
    ]
    assert np.array_equal(loaded["embed.weight"], WEIGHTS["wte.weight"])


@pytest.mark.parametrize(
    "name", ["scores.weight", "head.weight", "h.0.score.weight", "adapter.classifier.weight"]
)
def test_a_tensor_that_is_no_known_head_stays_an_error(tmp_path: Path, name: str):
    with pytest.raises(LamaError, match=rf"got unknown: {name}\."):
        load_model(folder_with(tmp_path, lambda w: w | {name: np.ones((2, 10), np.float32)}))


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        (None, {"eos_token_id": 3}, (3,)),
        (None, {"eos_token_id": [5, 3, 5]}, (5, 3)),
        ({"eos_token_id": [7, 2]}, {"eos_token_id": 3}, (7, 2)),
        ({"eos_token_id": 7}, {"eos_token_id": 3}, (7,)),
        ({"temperature": 1.0}, {"eos_token_id": 3}, (3,)),
        ({"eos_token_id": None}, {"eos_token_id": 3}, (3,)),
        ({"eos_token_id": []}, {"eos_token_id": 3}, ()),
        (None, {"eos_token_id": None}, ()),
        (None, {"eos_token_id": [50256, 4, -1]}, (4,)),  # transformers' default, for a vocabulary of 23
    ],
)
def test_end_tokens_are_those_of_generation_config_first(
    tmp_path: Path, generation, config: dict, expected: tuple[int, ...]
):
    folder = folder_with(tmp_path, **config)
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert load_model(folder).config.end_tokens == expected


def test_end_tokens_that_are_none_are_refused_with_their_file(tmp_path: Path):
    folder = folder_with(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": "7"}')
    with pytest.raises(
        LamaError, match=r"eos_token_id in generation_config\.json must be a whole number; got '7'"
    ):
        load_model(folder)


def test_end_tokens_outlive_saving_quantising_and_exporting(tmp_path: Path):
    model, tokenizer = (
        load_model(folder_with(tmp_path / "hf", eos_token_id=[7, 2])),
        CharacterTokenizer("abcdefghijklmnopqrstuvw"),
    )
    save(tmp_path / "own", model, tokenizer)
    save(tmp_path / "int8", load_model(tmp_path / "hf", dtype="int8"), tokenizer)
    export_huggingface(tmp_path / "exported", load_model(tmp_path / "own"), tokenizer)
    assert [load_model(tmp_path / name).config.end_tokens for name in ("own", "int8", "exported")] == [
        (7, 2)
    ] * 3
    assert json.loads((tmp_path / "exported" / "config.json").read_text())["eos_token_id"] == [7, 2]
    assert huggingface_config(model.config, end_of_text=9)["eos_token_id"] == [9, 7, 2]
    assert huggingface_config(GPTConfig(), end_of_text=9)["eos_token_id"] == 9


@pytest.mark.peers
@pytest.mark.parametrize(
    "changes",
    [
        {"scale_attn_by_inverse_layer_idx": True},
        {"scale_attn_weights": False, "activation_function": "silu"},
        {
            "scale_attn_weights": False,
            "scale_attn_by_inverse_layer_idx": True,
            "activation_function": "quick_gelu",
        },
        {"activation_function": "tanh"},
    ],
    ids=str,
)
def test_exported_options_give_transformers_the_same_logits(tmp_path: Path, changes: dict):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    model = load_model(
        random_gpt2.write_folder(tmp_path / "a", CONFIG | changes, random_gpt2.make_weights(CONFIG, std=0.3))
    )
    export_huggingface(tmp_path / "b", model, CharacterTokenizer("abcdefghijklmnopqrstuvw"))
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "b").eval()
    tokens = np.random.default_rng(0).integers(0, 23, (2, 13))
    with torch.no_grad():
        expected = theirs(torch.from_numpy(tokens)).logits.numpy()
    assert (
        np.abs(model(Tensor(tokens.astype(np.int32))).numpy() - expected).max()
        < 1e-5 * np.abs(expected).max()
    )


@pytest.mark.peers
@pytest.mark.parametrize(
    "task",
    ["DoubleHeadsModel", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering"],
)
def test_models_for_other_tasks_have_the_logits_of_their_body(tmp_path: Path, task: str):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=23, n_positions=13, n_embd=10, n_layer=2, n_head=2, num_labels=1
    )
    theirs = getattr(transformers, f"GPT2{task}")(config)
    with torch.no_grad():
        for p in theirs.parameters():
            p.normal_(0, 0.3)
    theirs.save_pretrained(tmp_path)
    with pytest.warns(LamaWarning, match="which belong to heads for other tasks"):
        model = load_model(tmp_path)
    tokens = np.random.default_rng(0).integers(0, 23, (2, 13))
    with torch.no_grad():
        expected = (
            transformers.GPT2LMHeadModel.from_pretrained(tmp_path)
            .eval()(torch.from_numpy(tokens))
            .logits.numpy()
        )
    assert (
        np.abs(model(Tensor(tokens.astype(np.int32))).numpy() - expected).max()
        < 1e-5 * np.abs(expected).max()
    )
