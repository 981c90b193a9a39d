"""How many bytes of weights each rank of vLLM's tensor parallelism holds: dense, with factors, and with layers removed.

Counts shapes only; nothing is loaded or timed. What a rank holds of a linear layer's factors is decided by the plugin's
own arithmetic (python/taco_svd/vllm/shards.py): its part of both factors, or one factor whole where that is small. The
embedding and the head are split; norms and bridges are on every rank.

    python benchmarks/tensor_parallel_bytes.py
    python benchmarks/tensor_parallel_bytes.py --shape llama-3-70b --keep 0.6 --ranks 1,4,8
    python benchmarks/tensor_parallel_bytes.py --layout replicate
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from taco_svd.architectures import Architecture, linear_shape
from taco_svd.bench_models import BenchModels, from_shape, shape_structure, uniform_pivoted_structure
from taco_svd.replacement import LowRankBridge, LowRankLinear
from taco_svd.shapes import SHAPES, shape_config, skeleton
from taco_svd.vllm.shards import CHOICES, USUALLY_PACKED, held, layout_of

# vLLM's RowParallelLinear; every other linear layer of a Llama-like decoder layer is column-parallel.
ROW_PARALLEL = ("o_proj", "down_proj")
# vLLM computes these in one layer, whose factors are laid out alike.
FUSED = {part: name for name, parts in USUALLY_PACKED.items() for part in parts}
# vLLM gives each rank at least one key/value head: with more ranks than heads, some ranks hold the same one.
KEY_VALUE = ("k_proj", "v_proj")
DTYPE = torch.bfloat16
PIVOT_BYTES = torch.int32.itemsize


class Map(NamedTuple):
    """A linear map of the checkpoint.

    Attributes:
        out_features, in_features: of the whole map; the side that is split is a multiple of the number of ranks.
        rank: of its factors; None for a dense map.
        pivoted: whether the right factor is the identity on `rank` of the inputs.
        shared_by: over how many ranks its outputs are divided; fewer than there are where they hold the same heads.
    """

    out_features: int
    in_features: int
    rank: int | None
    pivoted: bool
    shared_by: int


def linear_bytes(
    maps: Sequence[Map],
    row_parallel: bool,
    ranks: int,
    itemsize: int = DTYPE.itemsize,
    choice: str = CHOICES[0],
) -> int:
    """Bytes that one rank holds of a linear layer of vLLM's, which fuses `maps`; biases left out.

    Args:
        maps: of one input.
        row_parallel: the inputs are split; otherwise the outputs.
        ranks: how many ranks share the layer.
        itemsize: bytes of one weight.
        choice: how factors are laid out, one of `CHOICES`.
    """
    inputs = maps[0].in_features
    local_inputs = inputs // ranks if row_parallel else inputs
    rows = [one.out_features if row_parallel else one.out_features // one.shared_by for one in maps]
    factorised = [(one.rank, one.pivoted, own) for one, own in zip(maps, rows, strict=True) if one.rank is not None]
    total = sum(own for one, own in zip(maps, rows, strict=True) if one.rank is None) * local_inputs * itemsize
    layout = layout_of(choice, factorised, inputs, local_inputs, ranks, sum(rows) * local_inputs)
    for shape in factorised:
        one = held(layout, *shape, inputs, local_inputs, ranks)
        total += one.weights * itemsize + one.pivot * PIVOT_BYTES
    return total


def layer_bytes(model: PreTrainedModel, ranks: int, choice: str = CHOICES[0]) -> int:
    """Bytes that one rank holds of all linear layers in the decoder layers, bridges included."""
    architecture, config = Architecture(model), model.config
    layers: dict[tuple[int, str], list[Map]] = {}
    for site in architecture.sites():
        module = architecture.module(site)
        factors = module if isinstance(module, LowRankLinear) else None
        name = site.path.rpartition(".")[2]
        shared_by = min(ranks, config.num_key_value_heads) if name in KEY_VALUE else ranks
        layers.setdefault((site.layer, FUSED.get(name, name)), []).append(
            Map(
                *linear_shape(module),
                factors.rank if factors else None,
                bool(factors and factors.pivot is not None),
                shared_by,
            )
        )
    total = sum(linear_bytes(maps, name in ROW_PARALLEL, ranks, choice=choice) for (_, name), maps in layers.items())
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


def table(shape: str, keep: float, share: float, counts: list[int], choice: str = CHOICES[0]) -> str:
    """In markdown, a column for each number of ranks: GB per rank, and their share of what the dense model takes."""
    lines = [
        "| GB per rank (share of dense) | model | " + " | ".join(f"{n} rank{'s' * (n > 1)}" for n in counts) + " |",
        "|" + "---|" * (2 + len(counts)),
    ]
    models = models_of(shape, keep, share)
    linear = {name: [layer_bytes(model, n, choice) for n in counts] for name, model in models.items()}
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
    parser.add_argument("--layout", default=CHOICES[0], choices=CHOICES, help="the option taco_tensor_parallel")
    options = parser.parse_args()
    counts = [int(count) for count in options.ranks.split(",")]
    print(table(options.shape, options.keep, options.share, counts, options.layout))


if __name__ == "__main__":
    main()
