"""The command line: reads arguments, calls the pipeline, prints; holds no logic of its own."""

from __future__ import annotations

import atexit
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from .cli_bench import bench
from .cli_compare import compare
from .cli_eval import evaluate
from .cli_heal import heal
from .cli_report import report
from .cli_shared import (
    Bars,
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelArgument,
    SeedOption,
    on_command_line,
    told_when_stopped,
)
from .cli_shared import load as _load
from .cli_shared import out_console as _out
from .cli_shared import print_json as _print_json

# What a plan says, and would be passed over beside one.
DECIDED_BY_PLAN = (
    "method",
    "keep",
    "layers",
    "compression_ratio",
    "importance",
    "bridge_rank",
    "max_overhead",
    "max_latency",
    "max_kl",
    "consistency",
    "one_shot",
    "experts",
)

app = typer.Typer(
    name="taco-svd",
    no_args_is_help=True,
    add_completion=False,
    help="Makes Hugging Face language models smaller and faster by Taco-SVD.\n\n"
    "Start with: taco-svd compress MODEL --out DIR --keep 0.85, then taco-svd info DIR, "
    "taco-svd eval DIR --text FILE.txt and taco-svd bench DIR. "
    "Without MODEL, the small model inside the package is used.",
)


def _print_version(asked: bool) -> None:
    if asked:
        from taco_kernels import __version__

        print(f"taco-svd {__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Prints the version and ends.")
    ] = False,
) -> None:
    """What stands before a command."""


@app.command()
@told_when_stopped
def compress(
    context: typer.Context,
    model: ModelArgument = None,
    out: Annotated[Path, typer.Option(help="Directory to write; must not exist.")] = ...,  # type: ignore[assignment]
    method: Annotated[
        str,
        typer.Option(
            help="taco: one budget over all matrices, factors weighted by activations and gradients, re-fitted. "
            "paper: arXiv 2501.00339 as published. "
            "svd: largest singular values. removal: layers out. bridge: layers out, one low-rank map per run of them. "
            "Or a published one to compare with, as in `compare --methods all`."
        ),
    ] = "taco",
    keep: Annotated[
        str | None, typer.Option(help="Share of all parameters that may remain, 0.8; or bytes: 4.2GB, 900MiB.")
    ] = None,
    layers: Annotated[int | None, typer.Option(help="Number of redundant layers (instead of --keep).")] = None,
    compression_ratio: Annotated[
        float | None,
        typer.Option(help="The paper's c: an m x n matrix of a redundant layer keeps floor(mn(1-c)/(m+n)) directions."),
    ] = None,
    calibration: Annotated[
        str,
        typer.Option(
            help="FILE.txt, FILE.jsonl (text, messages, or prompt and completion in each line), self (text the model "
            "writes itself), wikitext2, ptb or c4."
        ),
    ] = "self",
    samples: Annotated[int, typer.Option(help="Number of calibration windows.")] = 64,
    seq_len: Annotated[int | None, typer.Option(help="Tokens per window; default: the context, at most 2048.")] = None,
    completions_only: Annotated[
        bool,
        typer.Option(
            "--completions-only/--no-completions-only",
            help="Of conversations (messages), or prompt and completion: only what the model is to write counts in the "
            "loss that decides what is kept.",
        ),
    ] = False,
    importance: Annotated[str, typer.Option(help="How redundant layers are found: bi, angular or greedy.")] = "bi",
    bridge_rank: Annotated[
        int | None, typer.Option(help="Rank of the bridges; default: 0.3% of the layers that stay, in all.")
    ] = None,
    max_overhead: Annotated[
        float | None,
        typer.Option(
            help="bridge: instead of a rank, what all bridges may cost over bare removal, in time that is measured on "
            "--device (0.003 is 0.3%)."
        ),
    ] = None,
    max_latency: Annotated[
        str | None,
        typer.Option(
            help="taco, instead of --keep: a fraction of the dense model's latency (0.8) or milliseconds per decoded "
            "token (12.5ms), measured on --device, batch 1."
        ),
    ] = None,
    max_kl: Annotated[
        float | None,
        typer.Option(
            help="taco, instead of --keep: the smallest model whose KL divergence from the dense one is predicted to "
            "be at most this on the calibration text, in nats per token (0.01)."
        ),
    ] = None,
    consistency: Annotated[
        bool,
        typer.Option(
            help="taco, bridge: re-fit output projections so that hidden states stay close to the dense model's."
        ),
    ] = True,
    one_shot: Annotated[
        bool,
        typer.Option(
            "--one-shot", help="--method paper in one pass over the dense model, instead of one per block in turn."
        ),
    ] = False,
    experts: Annotated[
        str,
        typer.Option(
            help="Of mixtures of experts: factorised (taco, paper, svd: every expert's matrices like any other) or "
            "whole (vLLM serves those)."
        ),
    ] = "factorised",
    plan: Annotated[
        Path | None,
        typer.Option(
            help="Carry out this plan (a file or a compressed directory), on the calibration it was made with unless "
            "--calibration, --samples, --seq-len, --completions-only or --seed say otherwise."
        ),
    ] = None,
    work_dir: Annotated[
        Path | None, typer.Option(help="Where finished steps are kept until the model is saved; default: OUT.work.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the finished steps of the same command, stopped earlier.")
    ] = False,
    stream: Annotated[
        bool | None,
        typer.Option(
            "--stream/--no-stream",
            help="Leave the weights in their files and read them layer by layer; by default where they would take "
            "more than 40% of the free memory (CPU only).",
        ),
    ] = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "cpu",
    seed: SeedOption = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace --out if it is a model directory.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Compress a model and save it; load it with `import taco_svd` and `from_pretrained`.

    Example: taco-svd compress --layers 4 --compression-ratio 0.7 --out small
    """
    from . import compress as run
    from .checkpoint import describe, save_compressed
    from .errors import StoppedError, TacoError
    from .model_size import weight_bytes
    from .output_directory import check_output
    from .plan import Plan
    from .plan_calibration import DRAWN_BY, drawn_as_planned, draws_differ
    from .report import info_table
    from .team import Team, local_device
    from .texts import check_text_name
    from .work_directory import check_apart, check_work_directory, finished_steps_kept

    check_output(out, force)
    if model is not None and os.path.isdir(model) and os.path.realpath(model) == os.path.realpath(out):
        raise TacoError(f"--out {out} is the model itself, which would be replaced; choose another directory.")
    team = Team.from_environment(device)
    work_dir = work_dir or Path(f"{os.path.realpath(out)}.work")
    check_apart(work_dir, out, "--work-dir")
    decided = on_command_line(context, *DECIDED_BY_PLAN)
    if plan is not None and decided:
        raise TacoError(f"--plan has decided what is compressed, how and how much; leave out {', '.join(decided)}.")
    if team.rank > 0:
        work_dir = work_dir.with_name(f"{work_dir.name}.{team.rank}")
    check_work_directory(work_dir, resume)
    loaded_plan = Plan.load(plan) if plan is not None else None
    if loaded_plan is None and keep is None and layers is None and max_latency is None and max_kl is None:
        raise TacoError(
            "Say how much to compress: --keep 0.8 (share of parameters) or 4.2GB, --layers N, --max-latency 0.8 or "
            "12.5ms, --max-kl 0.01, or --plan FILE."
        )
    reads_text = team.rank == 0 and not resume  # others, and a run that has its windows, read none
    windows: dict[str, Any] = {
        "calibration": calibration,
        "samples": samples,
        "seq_len": seq_len,
        "seed": seed,
        "completions_only": completions_only,
    }
    if loaded_plan is not None:
        given = [name for name in DRAWN_BY if on_command_line(context, name)]
        windows |= drawn_as_planned(loaded_plan, given, look=reads_text)
    if reads_text:
        check_text_name(windows["calibration"], windows["completions_only"])
    bars = Bars(as_json, silent=team.rank > 0)
    dense, tokenizer = _load(model, dtype, local_device(device), stream, bars)
    check_output(out, force, needed_bytes=int(1.05 * weight_bytes(dense)))
    with finished_steps_kept(work_dir):
        compressed, made = run(
            dense,
            tokenizer,
            method=method,
            keep=keep,
            layers=layers,
            compression_ratio=compression_ratio,
            importance=importance,
            bridge_rank=bridge_rank,
            one_shot=one_shot,
            consistency=consistency,
            plan=loaded_plan,
            progress=bars,
            max_overhead=max_overhead,
            max_latency=max_latency,
            max_kl=max_kl,
            work_dir=work_dir,
            resume=resume,
            team=team,
            experts=experts,
            **windows,
        )
        if loaded_plan is not None and team.rank == 0 and draws_differ(loaded_plan, made):
            print(
                "taco-svd: warning: the calibration windows are not those that the plan was made with, though drawn in "
                "the same way: another text, tokenizer or model. The factors follow what was drawn now.",
                file=sys.stderr,
            )
        if team.rank == 0:
            try:
                with bars.step("saving the model"):
                    save_compressed(compressed, made, out, tokenizer, force)
            except StoppedError:
                raise
            except TacoError as error:  # it was checked at the start; the work is not lost for what came in between
                raise StoppedError(f"{error} What is finished is in {work_dir}: --resume goes on from it.") from error
        # whoever is first must not take its finished steps away before the model is there
        team.all(True)
    if team.rank > 0:
        return
    if as_json:
        _print_json(describe(out))
    else:
        _out().print(info_table(describe(out)))
        _out().print(f"Saved to {out}. Load it: import taco_svd; AutoModelForCausalLM.from_pretrained({str(out)!r})")


app.command("eval")(told_when_stopped(evaluate))
app.command("bench")(told_when_stopped(bench))
app.command("heal")(told_when_stopped(heal))
app.command("compare")(told_when_stopped(compare))
app.command("report")(told_when_stopped(report))


@app.command()
@told_when_stopped
def info(directory: Annotated[Path, typer.Argument(help="Compressed model.")], as_json: JsonOption = False) -> None:
    """What was removed, what stands there now, ranks, sizes, and how it was calibrated."""
    from .checkpoint import describe
    from .report import info_table

    values = describe(directory)
    if as_json:
        _print_json(values)
    else:
        _out().print(info_table(values))


@app.command()
@told_when_stopped
def export(
    directory: Annotated[Path, typer.Argument(help="Compressed model.")],
    dense: Annotated[Path, typer.Option(help="Directory for the ordinary checkpoint.")],
    force: Annotated[bool, typer.Option("--force", help="Replace the directory if it is a model directory.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Write an ordinary checkpoint with the factors multiplied out, for tools that know nothing of this package.

    It has the compressed model's outputs (to rounding) and saves no memory over it: the factors become full matrices.
    """
    from .checkpoint import write_model
    from .export import to_dense
    from .model_size import parameter_count
    from .output_directory import check_output, write_whole

    check_output(dense, force)
    model, tokenizer = _load(str(directory), "auto", "cpu")
    ordinary = to_dense(model)
    write_whole(dense, lambda path: write_model(ordinary, tokenizer, path), force)
    values = {"directory": str(dense), "architecture": type(ordinary).__name__, "parameters": parameter_count(ordinary)}
    if as_json:
        _print_json(values)
    else:
        _out().print(
            f"Saved {values['architecture']} with {values['parameters']:,} parameters to {dense}. The factors are "
            "multiplied out: it saves no memory over the compressed model, and no time."
        )


@app.command()
@told_when_stopped
def quantize(
    directory: Annotated[Path, typer.Argument(help="Compressed model.")],
    out: Annotated[Path, typer.Option(help="Directory for the model with 8-bit factors.")],
    force: Annotated[bool, typer.Option("--force", help="Replace the directory if it is a model directory.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Write the factors of a compressed model as 8-bit integers: half the bytes, so that decoding waits for half.

    Heal and merge adapters before. Look at what it costs: taco-svd eval OUT --text FILE.txt, taco-svd bench OUT.

    Example: taco-svd quantize small --out small8
    """
    from .checkpoint import write_model
    from .model_size import weight_bytes
    from .output_directory import check_output, write_whole
    from .quantisation import quantise

    check_output(out, force)
    model, tokenizer = _load(str(directory), "auto", "cpu")
    made = quantise(model)
    write_whole(out, lambda path: write_model(made, tokenizer, path), force)
    before, after = weight_bytes(model), weight_bytes(made)
    maps = sum(map(len, made.config.structure.int8.values()))
    values = {"directory": str(out), "maps": maps, "bytes_before": before, "bytes": after}
    if as_json:
        _print_json(values)
    else:
        _out().print(
            f"Saved {out}: the factors of {maps} maps are 8-bit integers, {after / 1e6:.2f} MB instead of "
            f"{before / 1e6:.2f} ({after / before - 1:+.1%})."
        )


def main() -> None:
    """Entry point: user errors end with one sentence and exit code 2, Ctrl-C with 130."""
    from .errors import LostProcessError, TacoError
    from .untrusted import printable

    # tokenizers warns about forks that never happen here
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    try:
        app()
    except TacoError as error:
        # names of files need not be text, and may be anything else
        print(f"taco-svd: {printable(str(error))}", file=sys.stderr, flush=True)
        if isinstance(error, LostProcessError):
            # what is left of the connection to the lost one may abort the process when it is taken down
            sys.stdout.flush()
            atexit._run_exitfuncs()
            os._exit(2)
        sys.exit(2)
    except KeyboardInterrupt:
        print("taco-svd: stopped; nothing was written.", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # taco-svd ... | head: whoever read has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except (MemoryError, RuntimeError) as error:
        # torch's own allocators raise RuntimeErrors
        if isinstance(error, RuntimeError) and not any(word in str(error) for word in ("allocate memory", "of memory")):
            raise
        print(
            "taco-svd: out of memory. Smaller numbers of these need less: --samples, --seq-len (compress, compare), "
            "--seq-len, --batch (heal), --window (eval, report), --batch, --prompt (bench).",
            file=sys.stderr,
        )
        sys.exit(2)


if __name__ == "__main__":
    main()
