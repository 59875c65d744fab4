"""Dropout whose mask is a pure function of a key and a site: a resumed run drops what it would have dropped.

Source: Srivastava et al. 2014, scaled by 1 / (1 - rate) in training so that nothing changes afterwards. GPT-2
drops at four sites: the sum of the embeddings, the attention pattern, and the outputs of attention and MLP.
"""

import zlib
from dataclasses import dataclass, replace

from tinygrad import Tensor

from lama.ops import dropout


@dataclass(frozen=True)
class Dropout:
    """A function that drops entries of activations; `Dropout()` passes everything.

    `key`, uint32 of shape (2,): a number that is new for each step, and the first row of this batch within
    the step's whole batch, so that parts of a batch drop what the whole batch would. `scope` is the prefix of
    a site's name.
    """

    rate: float = 0.0
    key: Tensor | None = None
    scope: str = ""

    def scoped(self, scope: str) -> "Dropout":
        """The dropout of a sub-layer: its site `out` is `scope.out` here."""
        return self if self.rate == 0 else replace(self, scope=f"{self.scope}{scope}.")

    def site(self, name: str) -> int:
        """The number of this scope's site `name`."""
        return zlib.crc32(f"{self.scope}{name}".encode())

    def __call__(self, site: str, x: Tensor) -> Tensor:
        """x (B, ...), about `rate` of its entries zero and the others 1 / (1 - rate) times as large."""
        if self.rate == 0 or self.key is None:
            return x
        return dropout(x, self.rate, self.key, self.site(site))


no_dropout = Dropout()
