"""lama: the transformer from scratch in tinygrad."""
