"""Patching and ablation in batches do what one run after the other with a replaced activation does."""

import numpy as np
import pytest
from helpers import SMALL, TOKENS, fill, softmax
from tinygrad import Tensor

from lama.errors import LamaError, UsageError
from lama.interp import interventions
from lama.interp.interventions import SITES, Removal, ablate, patch, random_heads
from lama.models.gpt import GPT, GPTConfig
from lama.taps import Recorder, replace

T, H, V = 7, 3, 11
LLAMA = {
    "norm_kind": "rms",
    "bias": False,
    "gated": True,
    "activation": "silu",
    "positions": "rope",
    "n_kv_heads": 1,
    "d_head": 6,
}
CLEAN, CORRUPTED = TOKENS.tolist()
ANSWER, AGAINST = 4, 8


@pytest.fixture(scope="module")
def model():
    model = GPT(GPTConfig(**SMALL))
    fill(model, seed=5)
    return model


def difference(model: GPT, tokens: list[int], name: str = "", edit=None) -> float:
    tap = replace({name: edit} if edit else {})
    logits = model(Tensor([tokens]), tap=tap).numpy()[0, -1]
    return logits[ANSWER] - logits[AGAINST]


@pytest.fixture(scope="module")
def plain_runs(model):
    """The logit differences of both prompts, and the activations of the clean one."""
    record = Recorder()
    model(Tensor([CLEAN]), tap=record)
    return (
        difference(model, CLEAN),
        difference(model, CORRUPTED),
        {name: value.numpy() for name, value in record.items()},
    )


@pytest.mark.parametrize("site", SITES)
def test_patch_is_what_one_replaced_activation_after_the_other_gives(model, plain_runs, site):
    found = patch(model, CLEAN, CORRUPTED, ANSWER, AGAINST, site)
    clean, corrupted, activations = plain_runs
    assert (found.clean, found.corrupted) == (
        pytest.approx(clean, abs=1e-5),
        pytest.approx(corrupted, abs=1e-5),
    )
    size = H if site == "z" else T
    assert found.effect.shape == (2, size)
    for layer, place in [(0, 1), (1, size - 1)]:
        name = f"blocks.{layer}.{SITES[site]}"
        other = activations[name]

        def put(x: Tensor, other=other, place=place) -> Tensor:
            value = x.numpy()
            value[:, place] = other[:, place]
            return Tensor(value)

        expected = difference(model, CORRUPTED, name, put)
        assert corrupted + found.effect[layer, place] * (clean - corrupted) == pytest.approx(
            expected, abs=1e-4
        ), (layer, place)


def test_patch_and_ablate_work_on_a_post_norm_model():
    model = GPT(GPTConfig(**SMALL, norm="post"))
    fill(model, seed=5)
    found = patch(model, CLEAN, CORRUPTED, ANSWER, AGAINST, "resid_post")
    assert found.effect[1] == pytest.approx([0, 0, 0, 0, 0, 0, 1], abs=1e-4)
    assert ablate(model, CLEAN, [Removal()]).losses[0] == pytest.approx(
        token_losses(model(Tensor([CLEAN])).numpy()[0]).mean(), abs=1e-5
    )


def test_a_patched_place_says_where_the_prompts_differ(model):
    other = [*CLEAN]
    other[2] = 10
    first = patch(model, CLEAN, other, ANSWER, AGAINST).effect[0]
    np.testing.assert_allclose(first, [0, 0, 1, 0, 0, 0, 0], atol=1e-4)
    last = patch(model, CLEAN, other, ANSWER, AGAINST, "resid_post").effect[1]
    np.testing.assert_allclose(last, [0, 0, 0, 0, 0, 0, 1], atol=1e-4)


def test_patch_is_the_same_in_batches_of_any_size(model, monkeypatch):
    at_once = patch(model, CLEAN, CORRUPTED, ANSWER, AGAINST, "z").effect
    monkeypatch.setattr(interventions, "FLOATS", 3000)
    seen = []

    def watch(steps, total, label):
        seen.append((list(steps), total, label))
        return steps

    np.testing.assert_allclose(
        patch(model, CLEAN, CORRUPTED, ANSWER, AGAINST, "z", watch).effect, at_once, atol=1e-5
    )
    ((starts, total, label),) = seen
    assert len(starts) == total > 1 and 7 % (starts[1] - starts[0]) and label == "patching z"


def token_losses(logits: np.ndarray) -> np.ndarray:
    return -np.log(softmax(logits.astype(float)))[range(T - 1), CLEAN[1:]]


@pytest.mark.parametrize("mean", [False, True], ids=["zero", "mean"])
@pytest.mark.parametrize("changes", [{}, LLAMA], ids=["gpt2", "llama"])
def test_ablate_is_what_replaced_heads_and_neurons_give(changes, mean):
    model = GPT(GPTConfig(**SMALL | changes), seed=None)
    fill(model, seed=5)
    both = Removal(((0, 1), (1, 2)), ((1, 13), (0, 5)))
    removals = [Removal(), Removal(((1, 0),)), Removal(neurons=((0, 16),)), both]
    found = ablate(model, CLEAN, removals, mean)
    record = Recorder()
    model(Tensor([CLEAN]), tap=record)
    assert found.token_losses.shape == (4, T - 1)
    for removal, at, logits in zip(removals, found.losses, found.logits, strict=True):
        expected = model(Tensor([CLEAN]), tap=without(removal, record, mean)).numpy()[0]
        assert at == pytest.approx(token_losses(expected).mean(), abs=1e-5)
        np.testing.assert_allclose(logits, expected[-1], atol=1e-4)
    assert len(set(np.round(found.losses, 5))) == 4


def without(removal: Removal, record: Recorder, mean: bool):
    """Replaces what is removed by zeros, or by its mean over the positions of the recorded run."""

    def put(name: str, members: list[int], axis: int):
        old = np.moveaxis(record[name].numpy(), axis, 0)

        def edit(x: Tensor) -> Tensor:
            value = np.moveaxis(x.numpy(), axis, 0)
            for i in members:
                value[i] = old[i].mean(1, keepdims=True) * mean  # (1, T, d_head) or (1, T)
            return Tensor(np.moveaxis(value, 0, axis))

        return edit

    edits = {}
    for i in range(2):
        edits[f"blocks.{i}.attn.z"] = put(
            f"blocks.{i}.attn.z", [head for layer, head in removal.heads if layer == i], 1
        )
        edits[f"blocks.{i}.mlp.post"] = put(
            f"blocks.{i}.mlp.post", [neuron for layer, neuron in removal.neurons if layer == i], 2
        )
    return replace(edits)


def test_patch_of_grouped_heads_replaces_one_query_head():
    model = GPT(GPTConfig(**SMALL | LLAMA), seed=None)
    fill(model, seed=5)
    record = Recorder()
    model(Tensor([CLEAN]), tap=record)
    found = patch(model, CLEAN, CORRUPTED, ANSWER, AGAINST, "z")
    assert found.effect.shape == (2, H)
    clean, name = record["blocks.1.attn.z"].numpy(), "blocks.1.attn.z"
    head = np.arange(H).reshape(1, H, 1, 1) == 1
    edited = difference(model, CORRUPTED, name, lambda x: Tensor(np.where(head, clean, x.numpy())))
    expected = (edited - found.corrupted) / (found.clean - found.corrupted)
    assert found.effect[1, 1] == pytest.approx(expected, abs=1e-4)


def test_random_heads_are_as_many_others_of_the_same_layers():
    heads = [(3, 1), (3, 4), (3, 4), (5, 0)]
    found = random_heads(heads, 5, draws=40, seed=7)
    assert len(found) == 40 and found == random_heads(heads, 5, draws=40, seed=7)
    assert found != random_heads(heads, 5, draws=40, seed=8)
    for drawn in found:
        assert [layer for layer, _ in drawn] == [3, 3, 5] and len(set(drawn)) == 3
    others = {(3, 0), (3, 2), (3, 3), (5, 1), (5, 2), (5, 3), (5, 4)}
    assert {head for drawn in found for head in drawn} == others
    with pytest.raises(LamaError, match="as many other heads as are removed from it; got 2 of layer 3's 3"):
        random_heads([(3, 0), (3, 1)], 3, draws=1)


def test_a_removal_says_what_it_removes():
    assert str(Removal()) == "nothing"
    assert str(Removal(((0, 1), (1, 2)), ((1, 13),))) == "head 0.1 + head 1.2 + neuron 1.13"


def test_one_token_has_logits_and_no_loss(model):
    found = ablate(model, CLEAN[:1], [Removal(), Removal(((0, 0),))])
    assert np.isnan(found.losses).all() and np.isfinite(found.logits).all() and found.logits.shape == (2, V)


def test_what_is_not_there_is_refused(model):
    for removal, message in (
        (
            Removal(((2, 0),)),
            "a head must be one of the model's; got 2.0, and there are layers 0 to 1 with heads 0 to 2",
        ),
        (Removal(((0, 3),)), "got 0.3, and there are layers 0 to 1 with heads 0 to 2"),
        (
            Removal(neurons=((1, 17),)),
            "a neuron must be one of the model's; got 1.17, and there are layers 0 to 1 with neurons 0 to 16",
        ),
    ):
        with pytest.raises(LamaError, match=message):
            ablate(model, CLEAN, [Removal(), removal])
    with pytest.raises(
        LamaError, match="must have equally many tokens; got 7 in the clean one, 6 in the other"
    ):
        patch(model, CLEAN, CORRUPTED[1:], ANSWER, AGAINST)
    with pytest.raises(LamaError, match="must differ in the logits of the two answers"):
        patch(model, CLEAN, CLEAN, ANSWER, AGAINST)
    with pytest.raises(
        UsageError,
        match="site must be one of resid_pre, resid_mid, resid_post, attn_out, mlp_out, z; got 'q'",
    ):
        patch(model, CLEAN, CORRUPTED, ANSWER, AGAINST, "q")
