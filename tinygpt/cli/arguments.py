"""What can be typed: one dataclass per command, and tyro to read them. Imports no torch."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeAlias

import tyro
from tyro.conf import DisallowNone, FlagCreatePairsOff, Positional, UseAppendAction, arg, create_mutex_group, subcommand

from .. import __version__

_existing = create_mutex_group(required=False, title="an existing run")
_Words: TypeAlias = UseAppendAction[tuple[tuple[str, ...], ...]]


@dataclass(frozen=True)
class Train:
    """Train a model, into a directory that holds all it takes to go on.

    Without any argument: a gpt, by this machine's preset, on the default corpus.
    """

    model: Annotated[str | None, arg(metavar="NAME", help_behavior_hint="(default: gpt)")] = None
    """What is trained: bigram, average, minilm or gpt on text, transformer on pairs, encoder on labelled lines."""
    preset: Annotated[
        str | None, arg(metavar="NAME", help_behavior_hint="(default: char-gpu on a GPU, char-cpu elsewhere)")
    ] = None
    """Where a gpt's settings start from: char-cpu, char-gpu or gpt2. Other models have settings of their own."""
    backend: Annotated[str | None, arg(metavar="SPEC", help_behavior_hint="(default: auto)")] = None
    """Who computes: auto, a backend, a preference `cuda,triton`, or per op `layer_norm=cpp`; see `tinygpt backends`."""
    strict: Annotated[bool, arg(help_behavior_hint="")] = False
    """Stop rather than let torch serve what the backend cannot."""
    data: Annotated[
        _Words,
        arg(
            metavar="NAME|FILE ...",
            help_behavior_hint="(default: shakespeare if installed, else python; reverse; opinions)",
        ),
    ] = ()
    """What to read, by kind.
    Text: shakespeare, python, tiny_shakespeare, tinystories, or text files.
    Pairs: reverse, sort, dates, multi30k, or .tsv, .csv, .jsonl with source, target.
    Labelled: opinions, or .csv, .jsonl, .tsv with text, label."""
    tokenizer: Annotated[str | None, arg(metavar="NAME", help_behavior_hint="(default: the model's)")] = None
    """How text becomes tokens: char, word, whitespace, bpe, unigram or gpt2; `tinygpt data` compares them."""
    vocab_size: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: the tokenizer's)")] = None
    """Tokens at most, of word, whitespace, bpe and unigram."""
    steps: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: the preset's)")] = None
    """Optimizer steps; with --resume the new total."""
    out: Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="(default: runs/CORPUS-PRESET or -MODEL)")] = None
    """The run's directory."""
    device: Annotated[str | None, arg(metavar="DEVICE", help_behavior_hint="(default: a GPU if there is one)")] = None
    """cpu, cuda, cuda:1 or mps."""
    seed: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: 1337)")] = None
    """Of weights, batches and dropout."""
    set: Annotated[_Words, arg(metavar="KEY=VALUE ...", help_behavior_hint="(repeatable)")] = ()
    """Any setting by name, for example model.layers=2 training.eval_every=50."""
    resume: Annotated[bool, _existing, arg(help_behavior_hint="")] = False
    """Go on from the newest checkpoint of the run, with its settings."""
    overwrite: Annotated[bool, _existing, arg(help_behavior_hint="")] = False
    """Replace the run that is there."""


@dataclass(frozen=True)
class Generate:
    """Let a trained model write: continue a text, translate a line, or name its class."""

    run: Annotated[Positional[Path], arg(metavar="RUN")]
    """A run's directory, for example runs/shakespeare-char-cpu."""
    prompt: Annotated[str, arg(metavar="TEXT", help_behavior_hint="(default: none, a new line)")] = ""
    """What the model continues, translates or classifies."""
    tokens: Annotated[int, arg(metavar="N")] = 500
    """How many tokens to write."""
    temperature: Annotated[float, arg(metavar="T")] = 0.8
    """0 always takes the likeliest token; above 1 is wilder than the model."""
    top_k: Annotated[int | None, arg(metavar="K", help_behavior_hint="(default: all)")] = None
    """Draw from the K likeliest tokens only."""
    beams: Annotated[int, arg(metavar="K")] = 1
    """Of a translation: the K best beginnings are followed; 1 is greedy."""
    seed: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: another each time)")] = None
    """The same seed writes the same text."""
    backend: Annotated[str, arg(metavar="SPEC")] = "auto"
    """Who computes; see `tinygpt backends`."""
    strict: Annotated[bool, arg(help_behavior_hint="")] = False
    """Stop rather than let torch serve what the backend cannot."""
    device: Annotated[str | None, arg(metavar="DEVICE", help_behavior_hint="(default: a GPU if there is one)")] = None
    """cpu, cuda, cuda:1 or mps."""


@dataclass(frozen=True)
class Data:
    """Show what a model will see of a text, and what each tokenizer makes of it.

    Sizes, the split, the first tokens; then vocabulary against length.
    """

    sources: Annotated[
        Positional[tuple[str, ...]],
        arg(metavar="NAME|FILE ...", help_behavior_hint="(default: shakespeare if installed, else python)"),
    ] = ()
    """Text files, or shakespeare, python, tiny_shakespeare, tinystories."""
    tokenizer: Annotated[str, arg(metavar="NAME")] = "char"
    """Whose tokens are shown: char, word, whitespace, bpe, unigram or gpt2."""
    vocab_size: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: the tokenizer's)")] = None
    """Tokens at most, of word, whitespace, bpe and unigram."""
    sample: Annotated[float, arg(metavar="MB")] = 1.0
    """How much of the text to look at, from its beginning, in millions of characters."""
    plot: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="(default: tokens.png, with --json none)")] = (
        None
    )
    """Where the picture goes."""
    list: Annotated[bool, arg(help_behavior_hint="")] = False
    """Show what lies prepared in the cache, and look at no text."""
    clear: Annotated[bool, arg(help_behavior_hint="")] = False
    """Empty the cache; what is needed again is prepared again."""
    json: Annotated[bool, arg(help_behavior_hint="")] = False
    """Print JSON."""


@dataclass(frozen=True)
class Eval:
    """Measure a trained model on its validation split, or on other data."""

    run: Annotated[Positional[Path], arg(metavar="RUN")]
    """A run's directory."""
    data: Annotated[
        _Words, arg(metavar="NAME|FILE ...", help_behavior_hint="(default: the run's validation split)")
    ] = ()
    """Other data, all of it, in the run's tokens."""
    beams: Annotated[int, arg(metavar="K")] = 1
    """Of translations: as for `tinygpt generate`."""
    backend: Annotated[str, arg(metavar="SPEC")] = "auto"
    """Who computes; see `tinygpt backends`."""
    strict: Annotated[bool, arg(help_behavior_hint="")] = False
    """Stop rather than let torch serve what the backend cannot."""
    device: Annotated[str | None, arg(metavar="DEVICE", help_behavior_hint="(default: a GPU if there is one)")] = None
    """cpu, cuda, cuda:1 or mps."""
    json: Annotated[bool, arg(help_behavior_hint="")] = False
    """Print JSON: of text loss, perplexity, bits_per_char, bits_per_byte; of other data its own figures."""


@dataclass(frozen=True)
class Backends:
    """Show who can compute what here, why not, what helps, and what auto picks."""

    json: Annotated[bool, arg(help_behavior_hint="")] = False
    """Print JSON."""


@dataclass(frozen=True)
class Check:
    """Hold backends to float64, op by op, in the outputs and every gradient.

    None may be over twice as far off as PyTorch's own op. Exit code 1 if one is.
    """

    op: Annotated[_Words, arg(metavar="OP ...", help_behavior_hint="(default: all)")] = ()
    """Ops to check, for example attention layer_norm."""
    backend: Annotated[
        _Words, arg(metavar="NAME ...", help_behavior_hint="(default: all that serve here, but for interpreted ones)")
    ] = ()
    """Backends to check, your own among them; triton on a machine without a GPU is interpreted, which takes minutes."""
    dtype: Annotated[_Words, arg(metavar="NAME ...", help_behavior_hint="(default: all three)")] = ()
    """float32, float16 or bfloat16."""
    device: Annotated[str | None, arg(metavar="DEVICE", help_behavior_hint="(default: a GPU if there is one)")] = None
    """cpu, cuda or cuda:1."""
    json: Annotated[bool, arg(help_behavior_hint="")] = False
    """Print JSON: every case, every tensor."""


@dataclass(frozen=True)
class Bench:
    """Time backends on your own sizes, and let auto follow what was measured.

    Whoever is wrong on those very inputs is not timed. Exit code 1 when one is.
    """

    op: Annotated[_Words, arg(metavar="OP ...", help_behavior_hint="(default: all)")] = ()
    """Ops to time, for example attention layer_norm."""
    shape: Annotated[
        _Words, arg(metavar="SIZES ...", help_behavior_hint="(default: those of char-cpu and char-gpu)")
    ] = ()
    """Sizes, for example B=8,H=6,T=256,D=64 for attention or R=2048,C=384 for layer_norm."""
    backend: Annotated[
        _Words, arg(metavar="NAME ...", help_behavior_hint="(default: all that serve here, but for reference)")
    ] = ()
    """Backends to time, your own among them."""
    dtype: Annotated[_Words, arg(metavar="NAME ...", help_behavior_hint="(default: float32)")] = ()
    """float32, bfloat16 or float16."""
    device: Annotated[str | None, arg(metavar="DEVICE", help_behavior_hint="(default: a GPU if there is one)")] = None
    """cpu, cuda or cuda:1."""
    threads: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: torch's)")] = None
    """CPU threads; what is saved holds for as many."""
    save: Annotated[bool, arg(help_behavior_hint="")] = False
    """Keep the winners; auto follows them on this machine from then on."""
    list: Annotated[bool, arg(help_behavior_hint="")] = False
    """Show what is kept, of whatever machine, and measure nothing."""
    clear: Annotated[bool, arg(help_behavior_hint="")] = False
    """Forget what is kept; auto follows the shipped rules again."""
    json: Annotated[bool, arg(help_behavior_hint="")] = False
    """Print JSON."""


@dataclass(frozen=True)
class GpuReport:
    """Compile Triton kernels for GPUs that need not be here; read their machine code.

    Without a kernel: this project's own, and its CUDA kernels as they were built.
    """

    kernels: Annotated[
        Positional[tuple[str, ...]], arg(metavar="FILE:KERNEL ...", help_behavior_hint="(default: this project's own)")
    ] = ()
    """Kernels by file and name, for example my.py:add_kernel."""
    args: Annotated[_Words, arg(metavar="NAME=TYPE|VALUE ...", help_behavior_hint="(repeatable)")] = ()
    """A kernel's arguments: a type, *bf16:16 (a pointer divisible by 16), i32, i32:16 or fp32, or a constant. For example
    x_ptr=*bf16:16 n=i32:16 BLOCK=1024."""
    arch: Annotated[tuple[str, ...], arg(metavar="ARCH ...")] = ("80", "90")
    """Compute capabilities times ten, or AMD's names: 80 90 100 gfx942."""
    warps: Annotated[int, arg(metavar="N")] = 4
    """Warps of a block, for a kernel of your own."""
    stages: Annotated[int, arg(metavar="N")] = 3
    """Pipeline stages, for a kernel of your own."""
    backend: Annotated[_Words, arg(metavar="NAME ...", help_behavior_hint="(default: both)")] = ()
    """Of the project's kernels, those of triton or those of cuda."""
    every: Annotated[bool, arg(help_behavior_hint="")] = False
    """Of the project's kernels, every kind of call they are shipped for, not only the main ones."""
    json: Annotated[bool, arg(help_behavior_hint="")] = False
    """Print JSON, one object per line as kernels are compiled."""


@dataclass(frozen=True)
class Ladder:
    """Climb from a naive CUDA kernel to a fast one, on any machine, and bring your own.

    Runs each rung (csrc/cuda/ladder) on the CPU, thread by thread, and counts what it asks of the memory.
    """

    ops: Annotated[Positional[tuple[str, ...]], arg(metavar="OP ...", help_behavior_hint="(default: both)")] = ()
    """Which ladder: attention, layer_norm."""
    mine: Annotated[tuple[Path, ...], arg(metavar="FILE ...", help_behavior_hint="")] = ()
    """Rungs of your own: are told what is wrong with them (numbers, races, stray accesses) and what they cost. A copy of a file
    of csrc/cuda/ladder is a start."""
    why: Annotated[bool, arg(help_behavior_hint="")] = False
    """What each rung changes, and why, in full."""
    time: Annotated[bool, arg(help_behavior_hint="")] = False
    """On a GPU, with nvcc: how long each rung takes there."""
    plot: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="(default: ladder.png, with --json none)")] = (
        None
    )
    """Where the picture goes."""
    json: Annotated[bool, arg(help_behavior_hint="")] = False
    """Print JSON, one object per rung."""


@dataclass(frozen=True)
class Lesson:
    """Run short lessons, each of which shows one idea, draws it and asserts it.

    Without any argument: the list of them.
    """

    names: Annotated[Positional[tuple[str, ...]], arg(metavar="NAME ...", help_behavior_hint="")] = ()
    """Which to run, for example averaging."""
    all: Annotated[bool, arg(help_behavior_hint="")] = False
    """All of them, in the order to read them."""
    out: Annotated[Path, arg(metavar="DIR")] = Path("lessons")
    """Where pictures and notebooks go."""
    notebook: Annotated[bool, arg(help_behavior_hint="")] = False
    """Write them as Jupyter notebooks, and run none."""


@dataclass(frozen=True)
class Tune:
    """Measure attention's tiles on this GPU and keep the fastest of them.

    Nothing needs this: without it the shipped tables serve.
    """

    head_dim: Annotated[tuple[int, ...], arg(metavar="D ...")] = (64, 128)
    """Head dimensions to measure."""
    dtype: Annotated[str, arg(metavar="NAME")] = "bfloat16"
    """bfloat16, float16 or float32."""
    length: Annotated[tuple[int, ...], arg(metavar="T ...")] = (64, 1024)
    """Tokens a row; rows of at most 64 have tiles of their own."""
    device: Annotated[str, arg(metavar="DEVICE")] = "cuda"
    """cuda or cuda:1."""
    list: Annotated[bool, arg(help_behavior_hint="")] = False
    """Show what was measured, on whatever GPU, and measure nothing."""
    clear: Annotated[bool, arg(help_behavior_hint="")] = False
    """Delete what was measured; the shipped tables serve again."""


Command: TypeAlias = Train | Generate | Data | Eval | Backends | Check | Bench | GpuReport | Ladder | Lesson | Tune

_Commands: TypeAlias = (
    Annotated[Train, subcommand("train")]
    | Annotated[Generate, subcommand("generate")]
    | Annotated[Data, subcommand("data")]
    | Annotated[Eval, subcommand("eval")]
    | Annotated[Backends, subcommand("backends")]
    | Annotated[Check, subcommand("check")]
    | Annotated[Bench, subcommand("bench")]
    | Annotated[GpuReport, subcommand("gpu-report")]
    | Annotated[Ladder, subcommand("ladder")]
    | Annotated[Lesson, subcommand("lesson")]
    | Annotated[Tune, subcommand("tune")]
)


def parse(argv: Sequence[str]) -> Command:
    """The command that was typed; none at all is a call for help.

    Raises:
        SystemExit: help was asked for and printed (0), or the arguments make no command, which was explained (2).
    """
    argv = list(argv) or ["--help"]
    printed = io.TextIOWrapper(io.BytesIO(), encoding=sys.stdout.encoding)
    try:
        with redirect_stdout(printed) if argv[0] in ("-h", "--help") else nullcontext():
            command: Command = tyro.cli(
                _Commands,
                prog="tinygpt",
                description=f"tinygpt {__version__}: train small language models, on interchangeable kernels.\n"
                "`tinygpt COMMAND --help` explains a command, `tinygpt --version` its version.",
                args=argv,
                config=(FlagCreatePairsOff, DisallowNone),
            )
    finally:  # tyro puts all commands on the one line of the usage, however long that grows
        printed.seek(0)
        print(re.sub(r"\{.*?\}", "COMMAND ...", printed.read(), count=1), end="")
    return command


def flat(words: tuple[tuple[str, ...], ...]) -> tuple[str, ...]:
    """All words of an option that may be repeated, each time with several."""
    return tuple(word for group in words for word in group)
