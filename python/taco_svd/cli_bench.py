"""`taco-svd bench`: latency of whole models, of a checkpoint or of a shape."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .cli_shared import (
    Bars,
    DeviceOption,
    DtypeOption,
    JsonOption,
    check_dtype,
    check_result_files,
    on_command_line,
    out_console,
    print_json,
    save_json,
    tell_slow_products,
)
from .cli_shared import load as _load

if TYPE_CHECKING:
    import torch

    from .bench_models import BenchModels
    from .progress import Progress

# What a compressed model is compared with, in this order.
OTHERS = ("removal", "dense")
# What makes the compressed model of a shape; a checkpoint is one already.
SHAPE_OPTIONS = ("method", "layers", "share", "runs", "keep", "int8", "bridge_rank", "max_overhead")


def bench(
    context: typer.Context,
    directory: Annotated[Path | None, typer.Argument(help="Compressed model; or give --shape.")] = None,
    shape: Annotated[
        str | None,
        typer.Option(
            help="Latency of a known model's shape with random weights, e.g. llama-2-7b; list prints the known ones. "
            "It says nothing of quality: there is no calibration."
        ),
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            help="With --shape: bridge, paper or taco. There taco is a stand-in for the allocator: the same share of "
            "every map's parameters, with the same ranks in every layer."
        ),
    ] = "bridge",
    layers: Annotated[
        str | None, typer.Option(help="With --shape: number of redundant layers, or which: 20,21,22.")
    ] = None,
    share: Annotated[float, typer.Option(help="With --shape: share of the layers that is redundant.")] = 0.25,
    runs: Annotated[int, typer.Option(help="With --shape: runs of neighbours that the redundant layers form.")] = 1,
    keep: Annotated[
        float | None, typer.Option(help="With --shape and paper or taco: share of parameters that stays.")
    ] = None,
    int8: Annotated[
        bool, typer.Option("--int8", help="With --shape and paper or taco: factors of 8-bit integers (quantize).")
    ] = False,
    bridge_rank: Annotated[int | None, typer.Option(help="With --shape: rank of the bridges.")] = None,
    max_overhead: Annotated[
        float, typer.Option(help="With --shape and bridge, unless --bridge-rank: the ranks that should cost this.")
    ] = 0.003,
    against: Annotated[
        str | None,
        typer.Option(help="dense, removal or both, with a comma; default: what there is."),
    ] = None,
    batch: Annotated[str, typer.Option(help="Sequences at once; several with commas: 1,8,64.")] = "1",
    prompt: Annotated[int, typer.Option(help="Prompt tokens per sequence.")] = 128,
    decode: Annotated[int, typer.Option(help="Tokens decoded after the prompt before starting over.")] = 16,
    phase: Annotated[str, typer.Option(help="prefill, decode or both, with a comma.")] = "prefill,decode",
    mode: Annotated[str, typer.Option(help="eager, compiled, graph; several with commas.")] = "eager",
    precision: Annotated[
        float, typer.Option(help="A comparison with removal ends when its 95% interval is +- this (dense: ten times).")
    ] = 0.0005,
    seconds: Annotated[float, typer.Option(help="... or after so many seconds, for each comparison and phase.")] = 60.0,
    rounds: Annotated[int | None, typer.Option(help="Exactly so many rounds instead.")] = None,
    control: Annotated[
        bool, typer.Option("--control", help="Also compare removal with itself: what can be resolved here.")
    ] = False,
    threads: Annotated[int | None, typer.Option(help="CPU threads; default: torch's choice.")] = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "cpu",
    save: Annotated[Path | None, typer.Option(help="Write the result there as JSON.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw it (PNG, SVG or PDF).")] = None,
    as_json: JsonOption = False,
) -> None:
    """Prefill and decode latency against bare removal and against the dense model, interleaved in one process.

    The overhead is latency(compressed) / latency(same layers removed, nothing in their place) - 1, with a 95% interval.

    Examples: taco-svd bench small; taco-svd bench --shape llama-2-7b --prompt 512 --phase decode --control
    """
    from .bench import BenchSettings, run_bench
    from .bench_report import bench_table, plot_bench
    from .errors import TacoError
    from .shapes import SHAPES

    if shape == "list":
        if as_json:
            print_json({"shapes": list(SHAPES)})
        else:
            print("\n".join(SHAPES))
        return

    others = list(OTHERS) if against is None else [name.strip() for name in against.split(",") if name.strip()]
    if not others or any(name not in OTHERS for name in others):
        raise TacoError(f"--against takes dense, removal or dense,removal, got {against!r}.")
    try:
        batches = tuple(int(size) for size in batch.split(","))
    except ValueError:
        raise TacoError(f"--batch takes numbers with commas, got {batch!r}.") from None
    settings = BenchSettings(
        batches=batches,
        prompt=prompt,
        decode_steps=decode,
        modes=tuple(name.strip() for name in mode.split(",")),
        phases=tuple(name.strip() for name in phase.split(",")),
        pairs=tuple(("compressed", name) for name in OTHERS if name in others),
        precision=precision,
        seconds=seconds,
        rounds=rounds,
        control=control,
    )
    settings.check()
    check_dtype(dtype)
    check_result_files(save, plot)
    if threads is not None:
        _set_threads(threads)
    progress = Bars(as_json)
    if shape is not None:
        if directory is not None:
            raise TacoError("Give a directory or --shape, not both.")
        _check_combinations(on_command_line(context, *SHAPE_OPTIONS), method, layers, control)
        made = _from_shape(
            shape, method, layers, share, runs, keep, int8, bridge_rank, max_overhead, dtype, device, others, progress
        )
    else:
        if directory is None:
            raise TacoError("Give a compressed model's directory, or --shape (list shows the known ones).")
        meant = on_command_line(context, *SHAPE_OPTIONS)
        if meant:
            raise TacoError(f"A checkpoint is measured as it is: {', '.join(meant)} only with --shape.")
        made = _from_directory(directory, others, against is not None, dtype, device)

    tell_slow_products(next(iter(made.models.values())))

    saved: list[str] = []

    def write(so_far: dict[str, Any]) -> None:
        if save is not None:  # minutes of measuring are not lost to an interruption
            save_json(save, so_far)
            saved[:] = [f"what was measured so far is in {save}."]

    try:
        result = run_bench(made, settings, progress, write)
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(*saved) from stop
    write(result)
    if plot is not None:
        plot_bench(result, plot)
    if as_json:
        print_json(result)
    else:
        out_console().print(bench_table(result))


def _check_combinations(given: list[str], method: str, layers: str | None, control: bool) -> None:
    """Refuses options of a shape that others have made meaningless.

    Raises:
        TacoError: naming both.
    """
    from .errors import TacoError

    def refuse(option: str, because: str) -> None:
        if option in given:
            raise TacoError(f"{option} has no meaning with {because}; leave one of them out.")

    if method != "bridge":
        refuse("--max-overhead", f"--method {method}, which has no bridges")
    elif "--bridge-rank" in given:
        refuse("--max-overhead", "--bridge-rank")
    if method == "taco":
        refuse("--share", "--method taco, which takes no layer out")
        refuse("--runs", "--method taco, which takes no layer out")
    if layers is not None:
        refuse("--share", "--layers")
        if "," in layers:
            refuse("--runs", "a list of --layers")
    elif "--keep" in given:
        refuse("--share", "--keep")
    if control and method == "taco":
        raise TacoError("--control compares removal with itself, and --method taco takes no layer out; leave it out.")


def _set_threads(threads: int) -> None:
    import torch

    from .errors import TacoError

    if threads < 1:
        raise TacoError("--threads must be at least 1.")
    torch.set_num_threads(threads)


def _from_directory(directory: Path, others: list[str], asked: bool, dtype: str, device: str) -> BenchModels:
    """`asked`: whether the models to compare with were named; by default those that there are will do."""
    from .bench_models import from_checkpoint
    from .errors import TacoError
    from .plan import Plan

    plan = Plan.load(directory)
    if asked and "removal" in others and len(plan.redundant) == plan.structure.source_layers:
        raise TacoError(
            "Every layer of this model is compressed: there is no removal to compare with; --against dense."
        )
    if "dense" in others and "config" not in plan.source:
        raise TacoError(
            f"The plan of {directory} does not say what the dense model is like (source.config); --against removal."
        )
    model, _ = _load(str(directory), dtype, device)
    return from_checkpoint(directory, model, others)


def _from_shape(
    shape: str,
    method: str,
    layers: str | None,
    share: float,
    runs: int,
    keep: float | None,
    int8: bool,
    bridge_rank: int | None,
    max_overhead: float,
    dtype: str,
    device: str,
    others: list[str],
    progress: Progress,
) -> BenchModels:
    import torch

    from .bench_memory import check_memory
    from .bench_models import from_shape, shape_structure, with_int8
    from .cli_shared import quiet_libraries
    from .cost_budget import bridges_within
    from .errors import TacoError
    from .shapes import random_model, shape_config

    quiet_libraries()
    config = shape_config(shape)
    chosen: int | list[int] | None = None
    if layers is not None:
        try:
            chosen = [int(part) for part in layers.split(",")] if "," in layers else int(layers)
        except ValueError:
            raise TacoError(f"--layers takes a number, or layers with commas, got {layers!r}.") from None
    kind: torch.dtype = torch.bfloat16 if dtype == "auto" else getattr(torch, dtype)
    target = _device(device)
    structure, redundant = shape_structure(config, method, chosen, share, runs, keep, bridge_rank, kind)
    if int8:
        structure = with_int8(structure)
    # with the dense model even where it is not compared: all others are made from it
    planned = from_shape(config, structure, redundant, kind, "meta")
    check_memory(planned.bytes, target, f"{shape} in {kind} with what replaces its layers")
    with progress.step("random weights"), torch.no_grad():
        dense = random_model(config, kind, target)
    record = {}
    if method == "bridge" and bridge_rank is None:
        within = bridges_within(dense, redundant, max_overhead, progress=progress)
        structure, record = within.structure, {"cost_budget": within.record}
    made = from_shape(config, structure, redundant, kind, target, dense)
    if "dense" not in others:
        made.models.pop("dense")
    made.description = {"shape": shape, "method": method, **made.description, **record}
    return made


def _device(name: str) -> Any:
    """A device that can be used; a GPU becomes the current one."""
    import torch

    from .devices import make_current
    from .errors import TacoError, first_line

    try:
        device = torch.empty(0, device=name).device  # with its index
        make_current(device)
    except (RuntimeError, AssertionError) as error:
        raise TacoError(f"Device {name!r} is not usable: {first_line(error)}") from None
    return device
