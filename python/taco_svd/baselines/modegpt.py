"""MoDeGPT: pairs of matrices decomposed together, so that both of them shrink.

C.-H. Lin et al., "MoDeGPT: modular decomposition for large language model compression", arXiv 2408.09632:

- MLP (type I, Nystroem, algorithm 1): with C = E[a a^T] of the hidden units, the units with the highest ridge leverage
  scores [C (C + I)^-1]_ii stay, and W_down' = W_down C[:, S] C[S, S]^-1.
- Queries and keys (type II, CR, algorithm 2): the head dimensions with the largest E[q_i^2]^(1/2) E[k_i^2]^(1/2)
  stay. Rotary embeddings turn dimensions in pairs, and a pair stays or goes as one. Under grouped queries a key's
  dimension is one with that of all queries of its group (a sum over them).
- Values and output (type III, SVD, algorithm 3): with C = E[v v^T] of a head's values, the singular vectors of
  W_o C^(1/2) give the subspace that stays. Under grouped queries the W_o of the group stand above each other.

What has been dropped from a head is zero in the model: the rotary embedding keeps its frequencies and the attention
kernel its head size, while weights and the work of the projections shrink (`replacement.NarrowLinear`).

Allocation over layers (section 3.3): layer i loses a share of its parameters proportional to softmax(-s_i / T), s_i its
block influence; no layer loses more than `MOST_LOST` (ours), the others take over what that leaves.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch
from torch import nn

from ..architectures import Architecture, LinearSite, dense_weight, linear_shape
from ..errors import TacoError, UnsupportedModelError
from ..importance import block_influence
from ..plan import Plan
from ..progress import Progress
from ..replacement import NarrowLinear
from ..structure import NarrowSpec, Structure
from .base import Baseline, Decision
from .budget import Budget
from .workspace import Workspace

# Directions of the values' moments below this share of the largest carry nothing.
FLOOR = 1e-8
# Of the allocation over layers: its temperature, small for steep (0.1 is fixed here, not tuned per model), and a cap.
TEMPERATURE, MOST_LOST = 0.1, 0.8
# Ridge of the Nystroem inverse, as a share of the mean diagonal.
RIDGE = 1e-6


@dataclass(frozen=True)
class Parts:
    """Where a layer's matrices are and what their sizes mean."""

    query: str
    key: str
    value: str
    output: str
    hidden_in: tuple[str, ...]
    down: str
    heads: int
    groups: int
    head_dim: int
    rotary: bool


def find_parts(architecture: Architecture) -> Parts:
    """Names and sizes of the matrices of a layer.

    Raises:
        UnsupportedModelError: where the pairs are not found as separate matrices, or something between them (a norm of
            queries and keys, an unknown rotary embedding) does not let dimensions go.
    """
    name = type(architecture.model).__name__

    def refuse(why: str) -> UnsupportedModelError:
        return UnsupportedModelError(f"{name}: --method modegpt cannot decompose its pairs: {why}.")

    attention = [path for path in architecture.paths if architecture.block_of(path) == "attention"]
    mlp = [path for path in architecture.paths if architecture.block_of(path) == "mlp"]
    found = {path.rpartition(".")[2]: path for path in attention}
    output = found.get("o_proj") or found.get("out_proj")
    if len(found) != 4 or output is None or not {"q_proj", "k_proj", "v_proj"} <= found.keys():
        raise refuse(f"it needs separate query, key, value and output matrices, the model has {', '.join(attention)}")
    names = tuple(path.rpartition(".")[2] for path in mlp)
    if names not in (("gate_proj", "up_proj", "down_proj"), ("fc1", "fc2")):
        raise refuse(f"its MLP is not of a known kind ({', '.join(mlp)})")
    layer = architecture.layers[0]
    block = layer.get_submodule(output.rpartition(".")[0])
    linears = {path.rpartition(".")[2] for path in attention}
    others = [
        parameter for parameter, _ in block.named_parameters() if parameter.rpartition(".")[0] not in linears
    ]  # a norm of queries and keys, sinks and the like
    if others:
        raise refuse(f"its attention has more parameters than the four matrices ({', '.join(others)})")
    config = architecture.model.config
    heads = config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    shapes = {key: linear_shape(layer.get_submodule(path)) for key, path in found.items()}
    if shapes["q_proj"][0] != heads * head_dim or linear_shape(layer.get_submodule(output))[1] != heads * head_dim:
        raise refuse("its queries are not heads times head size")
    if any(shapes[key][0] != groups * head_dim for key in ("k_proj", "v_proj")):
        raise refuse("its keys and values are not groups times head size")
    rotary = any("rotary" in module_name for module_name, _ in architecture.model.named_modules())
    if rotary and not _turns_halves(block, head_dim):
        raise refuse("its rotary embedding does not turn dimension i together with i + half the head size")
    return Parts(
        found["q_proj"],
        found["k_proj"],
        found["v_proj"],
        output,
        tuple(mlp[:-1]),
        mlp[-1],
        heads,
        groups,
        head_dim,
        rotary,
    )


def _turns_halves(attention: nn.Module, head_dim: int) -> bool:
    """Whether the model's rotary embedding turns dimensions i and i + head_dim / 2 together, found by applying it."""
    apply = getattr(sys.modules.get(type(attention).__module__), "apply_rotary_pos_emb", None)
    half = head_dim // 2
    if apply is None or head_dim % 2:
        return False
    angles = torch.linspace(0.3, 1.1, half).repeat(2)
    units = torch.eye(head_dim).view(1, 1, head_dim, head_dim)  # [batch, heads, tokens, head_dim], one unit per token
    cos, sin = (values.expand(1, head_dim, head_dim) for values in (angles.cos(), angles.sin()))
    try:
        turned, _ = apply(units, units, cos, sin)
    except (TypeError, RuntimeError, ValueError, IndexError):
        return False
    expected = torch.diag(angles.cos())
    upper = torch.arange(half)
    expected[upper, upper + half] = angles.sin()[:half]
    expected[upper + half, upper] = -angles.sin()[:half]
    return bool(torch.allclose(turned[0, 0], expected))


# -- sizes ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Widths:
    """What one layer keeps: head dimensions of queries and keys, of values, and hidden units of the MLP."""

    query_key: int
    value: int
    units: int


def layer_parameters(parts: Parts, widths: Widths, hidden: int, index_size: float = 1.0) -> float:
    """Weights of one layer's linear maps, and the indices that are stored beside them (`Budget.index_size`)."""
    both = parts.heads + parts.groups
    weights = hidden * (both * widths.query_key + both * widths.value + (len(parts.hidden_in) + 1) * widths.units)
    indices = sum(both * width for width in (widths.query_key, widths.value) if width < parts.head_dim)
    return weights + index_size * indices


def widths_for(parts: Parts, hidden: int, intermediate: int, parameters: float, index_size: float = 1.0) -> Widths:
    """The widths of a layer that may keep `parameters`: the same share everywhere, what is left to the MLP.

    Raises:
        TacoError: not even one dimension of each fits.
    """
    full = layer_parameters(parts, Widths(parts.head_dim, parts.head_dim, intermediate), hidden, index_size)
    if parameters >= full:
        return Widths(parts.head_dim, parts.head_dim, intermediate)
    share = parameters / full
    step = 2 if parts.rotary else 1
    query_key = max(step, int(share * parts.head_dim) // step * step)
    value = max(1, int(share * parts.head_dim))
    attention = layer_parameters(parts, Widths(query_key, value, 0), hidden, index_size)
    units = min(intermediate, (parameters - attention) // (hidden * (len(parts.hidden_in) + 1)))
    if units < 1:
        raise TacoError("--method modegpt: the budget leaves no hidden unit in the MLP; keep more.")
    return Widths(query_key, value, int(units))


def layer_specs(parts: Parts, widths: Widths, hidden: int, intermediate: int) -> dict[str, NarrowSpec]:
    """The shapes of the narrower matrices of one layer; matrices that stay whole are left out."""
    specs: dict[str, NarrowSpec] = {}
    if widths.query_key < parts.head_dim:
        specs[parts.query] = NarrowSpec(parts.heads * widths.query_key, hidden, "rows")
        specs[parts.key] = NarrowSpec(parts.groups * widths.query_key, hidden, "rows")
    if widths.value < parts.head_dim:
        specs[parts.value] = NarrowSpec(parts.groups * widths.value, hidden, "rows")
        specs[parts.output] = NarrowSpec(hidden, parts.heads * widths.value, "columns")
    if widths.units < intermediate:
        for path in parts.hidden_in:
            specs[path] = NarrowSpec(widths.units, hidden, "none")
        specs[parts.down] = NarrowSpec(hidden, widths.units, "none")
    return specs


def _allocate(workspace: Workspace, budget: Budget, progress: Progress) -> Decision:
    parts = find_parts(workspace.architecture)
    hidden = workspace.architecture.model.config.hidden_size
    intermediate = budget.shapes[parts.down][1]
    with progress.step("block influence") as report:
        scores = workspace.keep("block influence", lambda: block_influence(workspace.runner(), report))
    lost = lost_shares([scores[layer] for layer in budget.layers], 1 - budget.share)
    full = sum(m * n for m, n in budget.shapes.values())
    narrow: dict[int, dict[str, NarrowSpec]] = {}
    spare = 0.0  # what the steps of head dimensions and hidden units left of the layers before
    for layer, share in zip(budget.layers, lost, strict=True):
        may_keep = int((1 - share) * full) + spare
        widths = widths_for(parts, hidden, intermediate, may_keep, budget.index_size)
        spare = may_keep - layer_parameters(parts, widths, hidden, budget.index_size)
        if specs := layer_specs(parts, widths, hidden, intermediate):
            narrow[layer] = specs
    depth = len(workspace.architecture.layers)
    return Decision(Structure(depth, tuple(range(depth)), narrow=narrow))


def lost_shares(scores: list[float], mean: float, temperature: float = TEMPERATURE) -> list[float]:
    """The share of its parameters that each layer loses: in the mean `mean`, in proportion to softmax(-score / T).

    No layer loses more than `MOST_LOST` (or the mean, where that is more); what is cut there goes to the others in the
    same proportion.
    """
    most = max(MOST_LOST, mean)
    weights = torch.softmax(-torch.tensor(scores, dtype=torch.float64) / temperature, dim=0)
    lost = torch.zeros_like(weights)
    capped = torch.zeros_like(weights, dtype=torch.bool)
    while True:
        rest = mean * len(scores) - most * int(capped.sum())
        lost = torch.where(capped, most, weights * rest / weights[~capped].sum())
        over = (lost > most * (1 + 1e-12)) & ~capped
        if not over.any():
            return lost.tolist()
        capped |= over


# -- the three decompositions --------------------------------------------------------------------------------


def output_moment(
    weight: torch.Tensor, bias: torch.Tensor | None, moment: torch.Tensor, mean: torch.Tensor
) -> torch.Tensor:
    """E[y y^T] of y = W x + b from E[x x^T] and E[x]: float64 [out, out]."""
    weight = weight.double()
    result = weight @ moment.double() @ weight.T
    if bias is not None:
        shift = torch.outer(weight @ mean.double(), bias.double())
        result += shift + shift.T + torch.outer(bias.double(), bias.double())
    return result


def nystroem(moment: torch.Tensor, tokens: int, units: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(indices of the hidden units that stay, ascending; the map from them to all units [all, units]).

    Args:
        moment: E[a a^T] of the hidden units, [all, all].
        tokens: how many tokens it is the mean of; leverage is taken of the sum, with ridge 1, as in the paper.
    """
    moment = moment.double()
    identity = torch.eye(moment.shape[0], dtype=torch.float64, device=moment.device)
    # [C (C + I)^-1]_ii = 1 - [(C + I)^-1]_ii
    leverage = 1 - torch.linalg.inv(moment * tokens + identity).diagonal()
    stay = leverage.argsort(descending=True, stable=True)[:units].sort().values
    inner = moment[stay][:, stay]
    mean = inner.diagonal().mean()
    ridge = RIDGE * mean if mean > 0 else torch.ones_like(mean)  # units that never fire: any ridge gives zeros
    inner = inner + ridge * torch.eye(units, dtype=torch.float64, device=moment.device)
    return stay, torch.linalg.solve(inner, moment[stay]).T


def query_key_dimensions(query: torch.Tensor, key: torch.Tensor, groups: int, width: int, rotary: bool) -> torch.Tensor:
    """Which head dimensions stay, per group: int64 [groups, width], ascending.

    Args:
        query: E[q_i^2] for all queries, [heads * head_dim].
        key: E[k_i^2] for all keys, [groups * head_dim].
    """
    keys = key.double().view(groups, -1)
    head_dim = keys.shape[1]
    queries = query.double().view(groups, -1, head_dim)
    if rotary:  # pairs (i, i + half): the energy of both
        half = head_dim // 2
        scores = (queries.view(groups, -1, 2, half).sum(2).sqrt() * keys.view(groups, 1, 2, half).sum(2).sqrt()).sum(1)
        pairs = scores.argsort(dim=1, descending=True, stable=True)[:, : width // 2].sort(dim=1).values
        return torch.cat([pairs, pairs + half], dim=1)
    scores = (queries.sqrt() * keys.unsqueeze(1).sqrt()).sum(1)
    return scores.argsort(dim=1, descending=True, stable=True)[:, :width].sort(dim=1).values


def value_output(output: torch.Tensor, moment: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The best narrow pair for one head: (encode [width, head_dim], decode [rows, width]).

    ``decode encode v`` is the rank-`width` approximation of ``output v`` that is best in the mean over tokens.

    Args:
        output: W_o of the head, or those of a group above each other, [rows, head_dim].
        moment: E[v v^T], [head_dim, head_dim].
    """
    values, vectors = torch.linalg.eigh(moment.double())
    largest = float(values[-1])
    # values that are always zero: any directions will do, and their scale must not be that of rounding
    values = values.clamp(min=largest * FLOOR).sqrt() if largest > 0 else torch.ones_like(values)
    root, inverse = (vectors * values) @ vectors.T, (vectors / values) @ vectors.T
    _, _, right = torch.linalg.svd(output.double() @ root, full_matrices=False)
    basis = right[:width]
    return basis @ inverse, output.double() @ root @ basis.T


# -- carrying out --------------------------------------------------------------------------------------------


def _carry_out(workspace: Workspace, architecture: Architecture, plan: Plan, progress: Progress) -> None:
    parts = find_parts(architecture)
    moments = workspace.moments(progress, ("second", "mean"))
    tokens = workspace.calibration.tokens.numel()
    narrow = plan.structure.narrow
    with progress.step("decomposition of pairs") as report:
        for done, (layer, specs) in enumerate(narrow.items()):

            def site(path: str, layer: int = layer) -> LinearSite:
                return architecture.site(layer, path)

            def weight_and_bias(path: str, layer: int = layer) -> tuple[torch.Tensor, torch.Tensor | None]:
                dense = architecture.module(site(path, layer))
                bias = getattr(dense, "bias", None)
                return dense_weight(dense).detach(), None if bias is None else bias.detach()

            def energy(path: str, layer: int = layer) -> torch.Tensor:
                where = site(path, layer)
                moment, mean = moments.inputs(where), moments.mean[where]
                return output_moment(*weight_and_bias(path, layer), moment, mean)

            def put(
                path: str,
                weight: torch.Tensor,
                bias: torch.Tensor | None,
                index: torch.Tensor | None,
                layer: int = layer,
                specs: dict[str, NarrowSpec] = specs,
            ) -> None:
                dense = architecture.module(site(path, layer))
                out_features, in_features = linear_shape(dense)
                like = dense_weight(dense)
                module = NarrowLinear(
                    in_features, out_features, specs[path], bias is not None, device="meta", dtype=like.dtype
                ).to_empty(device=like.device)
                module.fill(weight, bias, index)
                architecture.replace(site(path, layer), module.train(dense.training))

            if parts.query in specs:
                width = specs[parts.key].rows // parts.groups
                stay = query_key_dimensions(
                    energy(parts.query).diagonal(), energy(parts.key).diagonal(), parts.groups, width, parts.rotary
                )
                per_group = parts.heads // parts.groups
                for path, times in ((parts.query, per_group), (parts.key, 1)):
                    offsets = torch.arange(parts.groups * times, device=stay.device)[:, None] * parts.head_dim
                    index = (stay.repeat_interleave(times, dim=0) + offsets).flatten()
                    weight, bias = weight_and_bias(path)
                    put(path, weight[index], None if bias is None else bias[index], index)
            if parts.value in specs:
                _narrow_values(parts, specs, energy(parts.value), weight_and_bias, put)
            if parts.down in specs:
                stay, back = nystroem(moments.inputs(site(parts.down)), tokens, specs[parts.down].columns)
                for path in parts.hidden_in:
                    weight, bias = weight_and_bias(path)
                    put(path, weight[stay], None if bias is None else bias[stay], None)
                weight, bias = weight_and_bias(parts.down)
                put(parts.down, weight.double() @ back, bias, None)
            report(done + 1, len(narrow))


def _narrow_values(parts, specs, moment, weight_and_bias, put) -> None:  # type: ignore[no-untyped-def]
    """Narrows the values and the output matrix of one layer, head by head."""
    width = specs[parts.value].rows // parts.groups
    size, per_group = parts.head_dim, parts.heads // parts.groups
    value, value_bias = weight_and_bias(parts.value)
    output, output_bias = weight_and_bias(parts.output)
    rows, biases, columns = [], [], []
    for group in range(parts.groups):
        inside = slice(group * size, (group + 1) * size)
        heads = range(group * per_group, (group + 1) * per_group)
        stacked = torch.cat([output[:, head * size : (head + 1) * size] for head in heads]).double()
        encode, decode = value_output(stacked, moment[inside, inside], width)
        rows.append(encode @ value[inside].double())
        if value_bias is not None:
            biases.append(encode @ value_bias[inside].double())
        columns += list(decode.chunk(per_group))
    inner = torch.arange(width, device=value.device)
    index = [
        (torch.arange(count, device=value.device)[:, None] * size + inner).flatten()
        for count in (parts.groups, parts.heads)
    ]
    put(parts.value, torch.cat(rows), torch.cat(biases) if biases else None, index[0])
    put(parts.output, torch.cat(columns, dim=1), output_bias, index[1])


MODEGPT = Baseline(
    "modegpt",
    "MoDeGPT: modular decomposition for large language model compression, arXiv 2408.09632",
    _allocate,
    _carry_out,
)
