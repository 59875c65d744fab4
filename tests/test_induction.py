"""`lama experiment induction`: its data, its measures, a few steps; whether the heads form is for the full
budget (slow).
"""

import math

import numpy as np
import pytest
from tinygrad import Tensor

from lama.experiments import Options, find, induction
from lama.experiments.induction import (
    BEGIN,
    COPIES,
    LENGTH,
    REPEATED,
    VOCABULARY,
    batch,
    evaluate,
    fit,
    heldout_rows,
    without,
)
from lama.training.loss import cross_entropy


def test_each_row_has_one_run_of_tokens_three_times():
    inputs, targets = batch(np.random.default_rng(3), 23)
    assert inputs.shape == targets.shape == (23, LENGTH) and (inputs[:, 0] == BEGIN).all()
    np.testing.assert_array_equal(inputs[:, 1:], targets[:, :-1])
    firsts = set()
    for row in targets:
        runs = [tuple(row[i : i + REPEATED]) for i in range(LENGTH - REPEATED + 1)]
        places = [[i for i, run in enumerate(runs) if run == mine] for mine in runs]
        (repeated,) = {tuple(same) for same in places if len(same) > 1}
        assert len(repeated) == COPIES and min(np.diff(repeated)) >= REPEATED
        firsts.add(repeated[0])
    assert len(firsts) > 7  # at random places
    assert targets.min() > BEGIN and targets.max() < VOCABULARY


def test_judged_loss_is_the_cross_entropy_of_each_copy(monkeypatch):
    monkeypatch.setattr(induction, "ROWS", 3)
    model, log = fit(Options(steps=2), 2)
    tokens = heldout_rows(Options())
    logits = model(Tensor(tokens[:, :-1]))
    half = 32
    np.testing.assert_array_equal(tokens[:, 1 : half + 1], tokens[:, half + 1 :])
    expected = [
        cross_entropy(logits[:, part], Tensor(tokens[:, 1:][:, part])).item()
        for part in (slice(half), slice(half + 1, None))
    ]
    np.testing.assert_allclose(evaluate(model, tokens), expected, rtol=1e-5)
    np.testing.assert_allclose(log[-1, 1:3], expected, rtol=1e-5)
    weight = model.blocks[1].attn.out.weight
    silenced = weight.numpy().copy()
    silenced[:, 2 * 12 : 3 * 12] = 0  # what head 2 writes
    without_head = evaluate(model, tokens, without((1, 2)))
    weight.assign(Tensor(silenced)).realize()
    np.testing.assert_allclose(evaluate(model, tokens), without_head, rtol=1e-5)


def test_induction_reports_two_layers_and_the_control(monkeypatch):
    monkeypatch.setattr(induction, "ROWS", 3)
    report = find("induction")(Options(steps=10))
    (two, one), heads, reads = (table.rows for table in report.tables)
    assert (two[1], one[1]) == (34_800, 25_584)
    assert two[3] == pytest.approx(math.log(128), rel=0.05) and one[4] == pytest.approx(
        one[3] / math.log(128)
    )
    assert [row[0] for row in heads[:8]] == [f"{layer}.{head}" for layer in range(2) for head in range(4)]
    assert len(reads) == 4 and all(0 < value < 1 for row in reads for value in row[1:])
    assert len(report.claims) == 7 and len(report.maps) == 5 and len(report.panels[1].curves) == 8
