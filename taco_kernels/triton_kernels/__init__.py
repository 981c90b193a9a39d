"""Triton backend of the low-rank ops.

Importing this package does not import Triton; the op modules below it do. Each op module has one function named
like the op, taking 2-D tensors whose last dimension is contiguous (the op layer does the reshaping and checking).

Files, in reading order: ``config`` (which tile sizes for which shape), ``kernels`` (device code),
``launch`` (host code shared by the ops), ``low_rank_linear`` and ``low_rank_bridge`` (the ops),
``aot`` (the same kernels compiled ahead of time, for checks on machines without a GPU).
"""
