"""Fast paths for devices where tinygrad's own schedule is slow. Each does what its plain tinygrad twin does."""

from lama.kernels.matmul import matmul

__all__ = ["matmul"]
