"""Triton backend of the low-rank ops.

Importing this package does not import Triton; the op modules below it do. Each op module has one function named
like the op, taking 2-D tensors whose last dimension is contiguous (the op layer does the reshaping and checking).

Files, in reading order: ``config`` (which tile sizes for which shape), ``device``, ``kernels`` and ``row_kernels``
(device code), ``launch`` (host code shared by the ops), one file for each op, ``aot`` (the same kernels compiled ahead
of time, for checks on machines without a GPU).
"""
