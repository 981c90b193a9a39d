"""Trains a small Llama and its tokenizer from scratch on text files, like the embedded demo model.

    python examples/train_demo_model.py books/*.txt --out my-model

Byte-level BPE tokenizer, decoder with grouped-query attention and tied embeddings, AdamW with a cosine schedule on
random windows of the text. The tail of the text is held out and gives the validation perplexity. The result is an
ordinary transformers checkpoint (bf16 safetensors), ready for ``taco-svd compress``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from taco_svd.errors import TacoError, first_line
from taco_svd.evaluation import Perplexity, perplexity
from taco_svd.output_directory import check_output, write_whole

END_OF_TEXT = "<|endoftext|>"
BYTES = 256
BETAS = (0.9, 0.95)
WARM_UP_SHARE = 0.02
FINAL_RATE_SHARE = 0.1  # of the learning rate, where the cosine ends

Report = Callable[[int, float], None]


@dataclass(frozen=True)
class Recipe:
    """Shape of the model and course of the training.

    Shape, window, batch, learning rate, decay and clipping are those of the embedded demo model's card. The card does
    not tell the number of steps, the warm-up, the end of the cosine, the betas and the held-out share: those are ours.
    """

    layers: int = 16
    hidden: int = 128
    feed_forward: int = 384
    heads: int = 4
    key_value_heads: int = 2
    vocabulary: int = 2048
    context: int = 512
    steps: int = 6000
    batch: int = 32
    window: int = 256
    learning_rate: float = 3e-3
    weight_decay: float = 0.1
    clip: float = 1.0
    validation: float = 0.03
    seed: int = 0

    def check(self) -> None:
        """Raises TacoError where the numbers do not go together."""
        counts = ("layers", "hidden", "feed_forward", "heads", "key_value_heads", "steps", "batch")
        for name in counts:
            if getattr(self, name) < 1:
                raise TacoError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}.")
        if self.hidden % (2 * self.heads):
            raise TacoError(
                f"--hidden {self.hidden} must be a multiple of 2 x --heads ({2 * self.heads}): rotary pairs."
            )
        if self.heads % self.key_value_heads:
            raise TacoError(f"--heads {self.heads} must be a multiple of --key-value-heads {self.key_value_heads}.")
        if self.vocabulary <= BYTES:
            raise TacoError(f"--vocabulary must be above {BYTES} (every byte and the end of a text need a token).")
        if not 2 <= self.window <= self.context:
            raise TacoError(f"--window must be between 2 and --context {self.context}, got {self.window}.")
        if not 0 < self.validation < 1:
            raise TacoError(f"--validation must be between 0 and 1, got {self.validation}.")
        if not self.learning_rate > 0 or not self.clip > 0 or self.weight_decay < 0:
            raise TacoError("--learning-rate and --clip must be positive, --weight-decay not negative.")


def read_texts(files: Sequence[Path]) -> list[str]:
    """The contents of UTF-8 text files.

    Raises:
        TacoError: a file that does not exist, cannot be read, is empty or is no UTF-8 text.
    """
    texts = []
    for file in files:
        try:
            text = file.read_text(encoding="utf-8")
        except FileNotFoundError as error:
            raise TacoError(f"No such file: {file}.") from error
        except UnicodeDecodeError as error:
            raise TacoError(f"{file} is not UTF-8 text (byte {error.start}); convert it first.") from error
        except OSError as error:
            raise TacoError(f"{file} cannot be read: {error.strerror}.") from error
        if not text.strip():
            raise TacoError(f"{file} is empty.")
        texts.append(text)
    return texts


def split_tail(texts: Sequence[str], share: float) -> tuple[list[str], list[str]]:
    """(training, validation) texts: the last `share` of all characters is held out, cut in at most one text."""
    cut = sum(map(len, texts)) - math.ceil(share * sum(map(len, texts)))
    training: list[str] = []
    validation: list[str] = []
    for text in texts:
        here = min(max(cut, 0), len(text))
        if here:
            training.append(text[:here])
        if here < len(text):
            validation.append(text[here:])
        cut -= len(text)
    return training, validation


def train_tokenizer(texts: Sequence[str], vocabulary: int) -> Tokenizer:
    """A byte-level BPE tokenizer of at most `vocabulary` tokens, among them the end of a text (id 0) and every byte."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        # without the alphabet a byte that the training text lacks would vanish from any text that has it
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> torch.Tensor:
    """int64 [tokens]: the texts one after the other, the end-of-text token behind each."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    assert end is not None
    ids: list[int] = []
    for text in texts:
        ids += tokenizer.encode(text).ids
        ids.append(end)
    return torch.tensor(ids, dtype=torch.int64)


def make_model(recipe: Recipe, vocabulary: int) -> LlamaForCausalLM:
    """A Llama with random weights (float32)."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=recipe.hidden,
        intermediate_size=recipe.feed_forward,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.key_value_heads,
        max_position_embeddings=recipe.context,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def learning_rate(step: int, recipe: Recipe) -> float:
    """Linear warm-up over the first 2% of the steps, then half a cosine down to a tenth."""
    warm_up = max(1, round(WARM_UP_SHARE * recipe.steps))
    if step < warm_up:
        return recipe.learning_rate * (step + 1) / warm_up
    done = (step - warm_up) / max(1, recipe.steps - warm_up)
    cosine = 0.5 * (1 + math.cos(math.pi * done))
    return recipe.learning_rate * (FINAL_RATE_SHARE + (1 - FINAL_RATE_SHARE) * cosine)


def train(model: LlamaForCausalLM, tokens: torch.Tensor, recipe: Recipe, report: Report | None = None) -> list[float]:
    """Trains `model` in place on random windows of `tokens` (int64 [tokens]); the training loss of every step, in nats.

    Raises:
        TacoError: fewer tokens than a window, or a loss that is not finite.
    """
    if len(tokens) < recipe.window:
        raise TacoError(
            f"The training text has {len(tokens)} tokens, less than one window of {recipe.window}; pass more text."
        )
    generator = torch.Generator().manual_seed(recipe.seed)
    # norms have one dimension; decay would pull their gains towards zero for nothing
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=BETAS)
    device = model.device
    offsets = torch.arange(recipe.window)
    losses = []
    model.train()
    for step in range(recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, recipe)
        starts = torch.randint(len(tokens) - recipe.window + 1, (recipe.batch, 1), generator=generator)
        windows = tokens[starts + offsets].to(device)
        # the model shifts the labels itself
        loss = model(input_ids=windows, labels=windows, use_cache=False).loss
        value = float(loss.detach())
        if not math.isfinite(value):
            raise TacoError(f"The loss is {value} at step {step}; lower --learning-rate.")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        losses.append(value)
        if report is not None:
            report(step + 1, value)
    model.eval()
    return losses


def round_parameters(model: LlamaForCausalLM) -> None:
    """Rounds the parameters to bf16, in place, and nothing else.

    ``model.to(torch.bfloat16)`` would round the rotary frequencies too, which a reloaded model has in float32.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)


def save(model: LlamaForCausalLM, tokenizer: Tokenizer, out: Path, context: int, force: bool = False) -> None:
    """Writes the checkpoint and its tokenizer, whole or not at all."""
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=context,
    )

    def write(directory: Path) -> None:
        model.save_pretrained(directory)
        fast.save_pretrained(directory)

    write_whole(out, write, force)


def run(files: Sequence[Path], out: Path, recipe: Recipe, force: bool, device: str, console: Console) -> Perplexity:
    """Reads, trains, measures, saves.

    Raises:
        TacoError: any wrong argument, file or output directory; as far as possible before the training.
    """
    recipe.check()
    check_output(out, force)
    training, validation = split_tail(read_texts(files), recipe.validation)
    torch.manual_seed(recipe.seed)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("tokenizer", total=3)
        tokenizer = train_tokenizer(training, recipe.vocabulary)
        progress.advance(task)
        tokens = encode(tokenizer, training)
        progress.advance(task)
        held_out = encode(tokenizer, validation)
        progress.advance(task)
        for name, part in (("training", tokens), ("validation", held_out)):
            if len(part) < recipe.window:
                raise TacoError(
                    f"The {name} part of the text has {len(part)} tokens, less than one window of {recipe.window}; "
                    "pass more text or a smaller --window."
                )
        model = make_model(recipe, tokenizer.get_vocab_size())
        try:
            model.to(device)  # type: ignore[arg-type]
        except (RuntimeError, AssertionError) as error:
            raise TacoError(f"Device {device!r} cannot be used: {first_line(error)}") from error
        task = progress.add_task("training", total=recipe.steps)

        def report(step: int, loss: float) -> None:
            progress.update(task, completed=step, description=f"training, loss {loss:.3f}")

        train(model, tokens, recipe, report)
        # before the measurement, so that it is the saved model's
        round_parameters(model)
        task = progress.add_task("validation", total=None)
        window = min(recipe.context, len(held_out))
        result = perplexity(
            model, held_out, window, progress=lambda done, total: progress.update(task, completed=done, total=total)
        )
    save(model, tokenizer, out, recipe.context, force)
    return result


def main(
    files: Annotated[list[Path], typer.Argument(help="UTF-8 text files; the tail of the last ones is held out")],
    out: Annotated[Path, typer.Option(help="directory of the new checkpoint")],
    layers: Annotated[int, typer.Option(help="decoder layers")] = Recipe.layers,
    hidden: Annotated[int, typer.Option(help="hidden size")] = Recipe.hidden,
    feed_forward: Annotated[int, typer.Option(help="width of the gated MLP")] = Recipe.feed_forward,
    heads: Annotated[int, typer.Option(help="attention heads")] = Recipe.heads,
    key_value_heads: Annotated[int, typer.Option(help="key/value heads")] = Recipe.key_value_heads,
    vocabulary: Annotated[int, typer.Option(help="most tokens of the tokenizer")] = Recipe.vocabulary,
    context: Annotated[int, typer.Option(help="longest input of the model, in tokens")] = Recipe.context,
    steps: Annotated[int, typer.Option(help="optimizer steps")] = Recipe.steps,
    batch: Annotated[int, typer.Option(help="windows per step")] = Recipe.batch,
    window: Annotated[int, typer.Option(help="tokens per training window")] = Recipe.window,
    learning_rate: Annotated[float, typer.Option(help="highest learning rate of the schedule")] = Recipe.learning_rate,
    weight_decay: Annotated[float, typer.Option(help="AdamW's, on matrices only")] = Recipe.weight_decay,
    clip: Annotated[float, typer.Option(help="largest norm of the gradient")] = Recipe.clip,
    validation: Annotated[float, typer.Option(help="share of the text that is held out")] = Recipe.validation,
    seed: Annotated[int, typer.Option(help="of the weights and of the windows")] = Recipe.seed,
    device: Annotated[str, typer.Option(help="where to train: cpu, cuda, ...")] = "cpu",
    force: Annotated[bool, typer.Option("--force", help="replace a model directory that exists")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print the result as JSON")] = False,
) -> None:
    """Trains a small Llama and a byte-level BPE tokenizer from scratch on text FILES.

    The defaults give a model of the embedded demo model's shape. Lower --layers and --steps for a quick try.
    """
    recipe = Recipe(
        layers, hidden, feed_forward, heads, key_value_heads, vocabulary, context, steps, batch, window,
        learning_rate, weight_decay, clip, validation, seed,
    )  # fmt: skip
    errors = Console(stderr=True)
    try:
        result = run(files, out, recipe, force, device, errors)
    except TacoError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        typer.echo(f"stopped; {out} is as it was", err=True)
        raise typer.Exit(130) from None
    if as_json:
        typer.echo(json.dumps({"out": str(out), "seed": seed, "validation": result.to_dict()}))
    else:
        typer.echo(
            f"{out}: validation perplexity {result.perplexity:.2f} "
            f"({result.tokens} tokens in windows of {result.window})"
        )


if __name__ == "__main__":
    typer.run(main)
