"""Dropout whose mask is a pure function of a key and a site: a resumed run drops the same entries.

Source: Srivastava et al. 2014, scaled by 1 / (1 - rate) in training, so that inference needs no scaling.
GPT-2 drops at four sites: the sum of the embeddings, the attention pattern, and the outputs of attention and
MLP.
"""

import zlib
from dataclasses import dataclass, replace

from tinygrad import Tensor

from lama.ops import dropout


@dataclass(frozen=True)
class Dropout:
    """A function that drops entries of activations; `Dropout()` drops none.

    `key` is uint32 of shape (2,): a number that changes with each step, and the index of this batch's first
    row in the step's whole batch. So the parts of a batch drop the same entries as the whole batch. `scope`
    is the prefix of a site's name.
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
        """x (B, ...) with about `rate` of its entries set to 0 and the others divided by 1 - rate."""
        if self.rate == 0 or self.key is None:
            return x
        return dropout(x, self.rate, self.key, self.site(site))


no_dropout = Dropout()
