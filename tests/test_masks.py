"""Which query may look at which key."""

import numpy as np
from tinygrad import Tensor

from lama.masks import causal_mask, padding_mask


def test_causal_mask_hides_later_tokens():
    np.testing.assert_array_equal(causal_mask(5, 5).numpy(), np.tril(np.ones((5, 5), bool)))


def test_causal_mask_with_an_offset_starts_lower():
    assert causal_mask(2, 3, offset=1).tolist() == [[True, True, False], [True, True, True]]


def test_causal_mask_of_one_query_at_the_end_hides_nothing():
    assert causal_mask(1, 7, offset=6).tolist() == [[True] * 7]


def test_padding_mask_hides_pads_from_every_query():
    tokens = Tensor([[5, 0, 0], [0, 3, 2]])
    mask = padding_mask(tokens, pad=0)
    assert mask.shape == (2, 1, 1, 3)
    assert mask.reshape(2, 3).tolist() == [[True, False, False], [False, True, True]]


def test_masks_combine_with_and():
    mask = causal_mask(3, 3) & padding_mask(Tensor([[5, 0, 4]]), pad=0)
    assert mask.tolist() == [[[[True, False, False], [True, False, False], [True, False, True]]]]
