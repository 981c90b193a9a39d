"""How many bytes of weights each rank of vLLM's tensor parallelism holds: dense, with factors, and with layers removed.

Counts shapes only; nothing is loaded or timed. vLLM splits a factorised linear layer as it would split the dense one
(python/taco_svd/vllm/factors.py): a column-parallel layer (q, k, v, gate, up) holds its rows of U and all of V, a
row-parallel one (o, down) its columns of V, with the identity of a pivoted V written out, and all of U. The embedding
and the head are split; norms, pivots and bridges are on every rank.

    python benchmarks/tensor_parallel_bytes.py
    python benchmarks/tensor_parallel_bytes.py --shape llama-3-70b --keep 0.6 --ranks 1,4,8
"""

from __future__ import annotations

import argparse

import torch
from transformers import PreTrainedModel

from taco_svd.architectures import Architecture, linear_shape
from taco_svd.bench_models import BenchModels, from_shape, shape_structure, uniform_pivoted_structure
from taco_svd.replacement import LowRankBridge, LowRankLinear
from taco_svd.shapes import SHAPES, shape_config, skeleton

# vLLM's RowParallelLinear; every other linear layer of a Llama-like decoder layer is column-parallel.
ROW_PARALLEL = ("o_proj", "down_proj")
# vLLM gives each rank at least one key/value head: with more ranks than heads, some ranks hold the same one.
KEY_VALUE = ("k_proj", "v_proj")
DTYPE = torch.bfloat16
PIVOT_BYTES = torch.int32.itemsize


def linear_bytes(
    out_features: int,
    in_features: int,
    rank: int | None,
    pivoted: bool,
    row_parallel: bool,
    ranks: int,
    itemsize: int = DTYPE.itemsize,
) -> int:
    """Bytes that one rank holds of a linear layer, its bias left out.

    Args:
        out_features, in_features: of the whole layer; the side that is split is a multiple of `ranks`.
        rank: of its factors; None for a dense layer.
        pivoted: whether the right factor is the identity on `rank` of the inputs.
        row_parallel: the inputs are split; otherwise the outputs.
        ranks: how many ranks share the layer.
        itemsize: bytes of one weight.
    """
    local_out = out_features if row_parallel else out_features // ranks
    local_in = in_features // ranks if row_parallel else in_features
    if rank is None:
        return local_out * local_in * itemsize
    # a rank that sees some of the inputs only cannot leave the identity out
    identity = rank if pivoted and local_in == in_features else 0
    factors = (local_out + local_in - identity) * rank * itemsize
    return factors + (in_features * PIVOT_BYTES if pivoted else 0)


def layer_bytes(model: PreTrainedModel, ranks: int) -> int:
    """Bytes that one rank holds of all linear layers in the decoder layers, bridges included."""
    architecture, config = Architecture(model), model.config
    total = 0
    for site in architecture.sites():
        module = architecture.module(site)
        out_features, in_features = linear_shape(module)
        factors = module if isinstance(module, LowRankLinear) else None
        name = site.path.rpartition(".")[2]
        shared_by = min(ranks, config.num_key_value_heads) if name in KEY_VALUE else ranks
        total += linear_bytes(
            out_features,
            in_features,
            factors.rank if factors else None,
            bool(factors and factors.pivot is not None),
            name in ROW_PARALLEL,
            shared_by,
        )
    bridges = [module for module in model.modules() if isinstance(module, LowRankBridge)]
    return total + sum(p.numel() * p.element_size() for bridge in bridges for p in bridge.parameters())


def other_bytes(model: PreTrainedModel, ranks: int) -> int:
    """Bytes that one rank holds of everything else: its part of the embedding and the head, all norms."""
    architecture = Architecture(model)
    inside = {id(p) for site in architecture.sites() for p in architecture.module(site).parameters()}
    inside |= {id(p) for m in model.modules() if isinstance(m, LowRankBridge) for p in m.parameters()}
    rest = [parameter for parameter in model.parameters() if id(parameter) not in inside]
    return sum(p.numel() * p.element_size() // (ranks if p.ndim == 2 else 1) for p in rest)


def models_of(shape: str, keep: float, share: float) -> dict[str, PreTrainedModel]:
    """Models without data: dense, uniform pivoted factors at `keep`, and `share` of the layers behind one bridge."""
    config = shape_config(shape)
    dense = skeleton(config, DTYPE)
    factors = uniform_pivoted_structure(Architecture(dense), keep)
    bridged, redundant = shape_structure(config, "bridge", share=share)
    made: list[BenchModels] = [
        from_shape(config, factors, [], DTYPE, "meta"),
        from_shape(config, bridged, redundant, DTYPE, "meta"),
    ]
    return {
        "dense": dense,
        f"factors, keep {keep:g}": made[0].models["compressed"],
        f"bridge, {len(redundant)} of {config.num_hidden_layers} layers": made[1].models["compressed"],
        f"removal, {len(redundant)} of {config.num_hidden_layers} layers": made[1].models["removal"],
    }


def table(shape: str, keep: float, share: float, counts: list[int]) -> str:
    """In markdown, a column for each number of ranks: GB per rank, and their share of what the dense model takes."""
    lines = [
        "| GB per rank (share of dense) | model | " + " | ".join(f"{n} rank{'s' * (n > 1)}" for n in counts) + " |",
        "|" + "---|" * (2 + len(counts)),
    ]
    models = models_of(shape, keep, share)
    linear = {name: [layer_bytes(model, n) for n in counts] for name, model in models.items()}
    rest = {name: [other_bytes(model, n) for n in counts] for name, model in models.items()}
    whole = {name: [a + b for a, b in zip(linear[name], rest[name], strict=True)] for name in models}
    for what, found in (("linear layers", linear), ("all weights", whole)):
        for name, sizes in found.items():
            cells = [f"{one / 1e9:.2f} ({one / dense:.2f})" for one, dense in zip(sizes, found["dense"], strict=True)]
            lines.append(f"| {what} | {name} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"{shape}, {str(DTYPE).removeprefix('torch.')}."])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-3-8b", choices=SHAPES)
    parser.add_argument("--keep", type=float, default=0.8, help="share of all parameters that the factors leave")
    parser.add_argument("--share", type=float, default=0.25, help="share of the layers that the bridge replaces")
    parser.add_argument("--ranks", default="1,2,4,8", help="numbers of ranks, with commas")
    options = parser.parse_args()
    print(table(options.shape, options.keep, options.share, [int(count) for count in options.ranks.split(",")]))


if __name__ == "__main__":
    main()
