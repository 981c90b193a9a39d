"""Low-rank kernels for compressed language models: tensors in, tensors out.

Ten operations, each with a plain reference; the ``low_rank`` ones with fused backends and autograd:

- :func:`low_rank_linear`: ``x @ v.T @ u.T + bias + residual``
- :func:`low_rank_linear_group`: several of these with one ``x``
- :func:`low_rank_linear_concat`: the same with the results side by side, with pivots or without
- :func:`low_rank_linear_int8`: either of them with factors of 8-bit integers
- :func:`low_rank_mlp`: a gated MLP of three of them
- :func:`pivoted_low_rank_linear`: ``low_rank_linear`` with a right factor that is the identity on some inputs
- :func:`low_rank_bridge`: ``h + rmsnorm(h) @ v.T @ u.T + bias``
- :func:`randomized_svd`: the leading singular triplets of ``L A R``
- :func:`second_moment_`: streaming ``X^T X``
- :func:`singular_attribution`: what each singular direction of a weight contributes to a gradient

``backends()`` says which backends are usable here and why the others are not; ``TACO_BACKEND`` or
:func:`use_backend` force one. ``python -m taco_kernels.env`` prints a full report.
"""

from __future__ import annotations

from taco_kernels._version import __version__
from taco_kernels.dispatch import BACKENDS, backends, get_backend, set_backend, use_backend
from taco_kernels.low_rank_bridge import low_rank_bridge
from taco_kernels.low_rank_linear import low_rank_linear
from taco_kernels.low_rank_linear_concat import low_rank_linear_concat
from taco_kernels.low_rank_linear_group import low_rank_linear_group
from taco_kernels.low_rank_linear_int8 import low_rank_linear_int8
from taco_kernels.low_rank_mlp import low_rank_mlp
from taco_kernels.pivoted_low_rank_linear import pivoted_low_rank_linear
from taco_kernels.randomized_svd import RandomizedSVD, randomized_svd
from taco_kernels.second_moment import second_moment_, second_moment_dense, second_moment_zeros
from taco_kernels.singular_attribution import SingularAttribution, singular_attribution

__all__ = [
    "BACKENDS",
    "RandomizedSVD",
    "SingularAttribution",
    "__version__",
    "backends",
    "get_backend",
    "low_rank_bridge",
    "low_rank_linear",
    "low_rank_linear_concat",
    "low_rank_linear_group",
    "low_rank_linear_int8",
    "low_rank_mlp",
    "pivoted_low_rank_linear",
    "randomized_svd",
    "second_moment_",
    "second_moment_dense",
    "second_moment_zeros",
    "set_backend",
    "singular_attribution",
    "use_backend",
]
