"""Everything that depends on tinygrad's internals: compiler, device, buffers, kernels, threads, capture.

The rest of lama imports `Tensor`, `UOp`, `dtypes`, `Device`, `Context`, `TinyJit` and `nn.state` from
tinygrad, and everything else from here. On a release of tinygrad that lama was not tested with, this package
uses none of the internals, and lama is slower.
"""
