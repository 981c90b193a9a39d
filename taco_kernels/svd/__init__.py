"""Steps of :func:`taco_kernels.randomized_svd`, in the order in which the data flows.

``sketch`` (random test vectors) -> ``operand`` (products with ``L A R``) -> ``orthonormal`` (CholeskyQR) ->
``factorise`` (power iterations, projection, small problem) -> ``adaptive`` (a rank for a tolerance, certified).

Bases are kept as rows: a basis of r vectors of length n is [r, n]. Every product is then a row-major matrix times
rows, which is the layout that the libraries are fastest in, on CPUs by a factor of two.
"""
