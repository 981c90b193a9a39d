"""The random test vectors of the randomized SVD: the same numbers for a seed on every backend.

Entry i of test vector v is ``(2 b - 255) / 128`` with b a byte out of Philox4x32-10 (Salmon, Moraes, Dror, Shaw:
"Parallel random numbers: as easy as 1, 2, 3", SC 2011), counter ``(32 (i div 512) + i mod 32, v, 0, 0)``, key = seed,
byte number ``(i div 32) mod 16`` of the sixteen that the call gives. So any tile of the matrix can be made anywhere,
by integer arithmetic alone.

Why not Gaussian: Box-Muller needs a logarithm and a cosine, which no two backends round alike, and sixteen times the
random bits. Why not signs: a few of them can cancel exactly (one pair in two), so tiny matrices lose directions with a
probability that is not negligible. Uniform odd integers are sub-Gaussian as both are, need one byte, are exact in
bfloat16, and a pair of them cancels once in 256 times.
"""

from __future__ import annotations

import torch
from torch import Tensor

from taco_kernels import dispatch, native

__all__ = ["BLOCK", "RUN", "VARIANCE", "draw_seed", "fill", "fill_reference"]

RUN = 32
BLOCK = 16 * RUN
VARIANCE = (256**2 - 1) / 3 / 128**2
"""of one entry: odd integers up to 255, over 128"""

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def draw_seed(generator: torch.Generator | None) -> int:
    """64 bits out of ``generator`` (torch's default CPU generator for None): two calls in a row differ."""
    device = "cpu" if generator is None else generator.device
    words = torch.randint(0, 2**32, (2,), generator=generator, device=device).tolist()
    return words[0] | words[1] << 32


def philox_reference(first: Tensor, second: Tensor, seed: int) -> list[Tensor]:
    """The four output words of Philox4x32-10 for counters ``(first, second, 0, 0)``: int64 tensors below 2^32."""
    words = [first, second, torch.zeros_like(first), torch.zeros_like(first)]
    keys = [seed & _WORD, seed >> 32 & _WORD]
    for _ in range(10):
        # int64 products wrap modulo 2^64; shifting and masking gives both halves all the same
        products = [words[0] * _MULTIPLIERS[0], words[2] * _MULTIPLIERS[1]]
        high = [product >> 32 & _WORD for product in products]
        low = [product & _WORD for product in products]
        words = [high[1] ^ words[1] ^ keys[0], low[1], high[0] ^ words[3] ^ keys[1], low[0]]
        keys = [key + step & _WORD for key, step in zip(keys, _WEYL, strict=True)]
    return words


def fill_reference(
    vectors: tuple[int, int], entries: tuple[int, int], seed: int, dtype: torch.dtype, device: torch.device | str
) -> Tensor:
    """The specification of :func:`fill`, in plain torch on any device."""
    blocks = range(entries[0] // BLOCK, -(-entries[1] // BLOCK))
    columns = torch.arange(blocks.start * RUN, blocks.stop * RUN, device=device)
    rows = torch.arange(vectors[0], vectors[1], device=device)
    first, second = torch.broadcast_tensors(columns, rows[:, None])
    words = philox_reference(first, second, seed)
    numbers = torch.stack([words[byte // 4] >> 8 * (byte % 4) & 0xFF for byte in range(16)], dim=-1)
    # [vectors, blocks * RUN, 16] -> [vectors, blocks, 16, RUN]: a byte's numbers form a run
    numbers = numbers.view(len(rows), len(blocks), RUN, 16).transpose(2, 3).reshape(len(rows), len(blocks) * BLOCK)
    return ((2 * numbers[:, : entries[1] - entries[0]] - 255).to(torch.float32) / 128).to(dtype)


def fill(
    vectors: tuple[int, int], entries: tuple[int, int], seed: int, dtype: torch.dtype, device: torch.device | str
) -> Tensor:
    """Test vectors ``vectors[0] .. vectors[1]``, entries ``entries[0] .. entries[1]`` of each: [vectors, entries].

    ``entries[0]`` must be a multiple of :data:`BLOCK`. ``dtype`` may be any floating dtype: the numbers are exact in
    all of them. The extension writes float32 and bfloat16; other dtypes, devices and a forced ``reference`` or
    ``library`` backend take :func:`fill_reference`.
    """
    if entries[0] % BLOCK:
        raise ValueError(f"the first entry must be a multiple of {BLOCK}, not {entries[0]}")
    forced = dispatch.get_backend()
    if torch.device(device).type != "cpu" or native.module is None or forced in ("reference", "library"):
        return fill_reference(vectors, entries, seed, dtype, device)
    kind = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    out = torch.empty((vectors[1] - vectors[0], entries[1] - entries[0]), dtype=kind, device="cpu")
    native.module.cpu_sketch(
        out.data_ptr(), out.stride(0), vectors[0], out.shape[0], entries[0], out.shape[1], seed,
        dispatch.CPP_DTYPES[kind], torch.get_num_threads(),
    )  # fmt: skip
    return out.to(dtype)
