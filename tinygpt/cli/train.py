"""`tinygpt train`: from flags to a RunConfig and a directory, then training, then what to do with the result."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinygpt_kernels.interpreter import gpu_present
from tinygpt_kernels.spec import unknown

from ..config import RunConfig, override, preset, to_dict
from ..data.records import RecordFile, find_for
from ..data.sources import Source, TextFile, default_source, joined_name
from ..errors import UserError
from ..models import configure, kind
from ..tokenizers import check_size, known_tokenizers
from .arguments import Train, flat
from .backends import tell_idle
from .early import find_readable, recorded_config, settle_backend

if TYPE_CHECKING:
    from ..training.trainer import Result

# What a run is: with another of these, weights or the order of data would be another run's. All else may change.
_FIXED = ("preset", "model.", "data.", "seed", "training.batch_size", "training.accumulate")

# Triton's interpreter takes milliseconds per program: a pass over the whole validation split would take hours.
_BRIEF = ["training.eval_batches=1", "training.sample_tokens=20", "training.final_evaluation=false"]


@dataclass(frozen=True)
class Job:
    """A training that is ready to begin. notice: what was chosen for the user, or changed by them."""

    config: RunConfig
    out: Path
    notice: str | None


def plan(args: Train) -> Callable[[], int]:
    """Check all that needs no torch, and return the training.

    Raises:
        UserError: an argument is wrong; nothing was begun.
    """
    if args.model is not None:
        kind(args.model)
    if args.preset and args.model not in (None, "gpt"):
        raise UserError(
            f"--preset {args.preset} is a gpt's; --model {args.model} has settings of its own, which --set changes"
        )
    if args.resume:
        out = args.out or _new(args, args.preset or _likely_preset(args)).out
        before = recorded_config(out)
        if before is None:
            return lambda: _mend(args, out)
        job = _resumed(args, out, before)
    else:
        job = _new(args, args.preset or _likely_preset(args))
    if job.config.data.tokenizer not in known_tokenizers():
        raise UserError(unknown("tokenizer", job.config.data.tokenizer, known_tokenizers()))
    check_size(job.config.data.tokenizer, job.config.data.vocab_size)
    if args.resume:
        settle_backend(job.config.backend)
    return lambda: _train(args, job)


def _new(args: Train, preset_name: str) -> Job:
    base = preset(preset_name) if args.model in (None, "gpt") else kind(args.model).defaults
    config = configure(base, _assignments(args))
    notices = []
    if settle_backend(config.backend):
        config = configure(override(base, _BRIEF), _assignments(args))
        notices.append(f"interpreted kernels are slow, hence {' '.join(_BRIEF)} unless --set says otherwise")
    names = flat(args.data) or config.data.sources
    if names:
        sources = find_readable(names, config.model.name)
    else:
        source, notice = _default_source(config.model.name)
        sources = [source]
        notices.append(notice)
    config = replace(config, data=replace(config.data, sources=_lasting_names(sources)))
    return Job(config, args.out or Path("runs") / f"{joined_name(sources)}-{config.preset}", "\n".join(notices) or None)


def _resumed(args: Train, out: Path, before: RunConfig) -> Job:
    """The run's own settings with what was asked for now, where a run can bear the change."""
    if args.model not in (None, before.model.name):
        raise UserError(
            f"--model cannot change when a run goes on: {out} is a {before.model.name}, not a {args.model}; leave it out, or "
            "train anew into another --out"
        )
    after = configure(before, _assignments(args))
    names = flat(args.data) or after.data.sources
    if names != before.data.sources:
        after = replace(
            after, data=replace(after.data, sources=_lasting_names(find_readable(names, before.model.name)))
        )
    if args.preset:
        after = replace(after, preset=args.preset)
    was, now = _leaves(to_dict(before)), _leaves(to_dict(after))
    changed = [key for key in now if now[key] != was[key]]
    for key in changed:
        if key.startswith(_FIXED):
            raise UserError(
                f"{key} cannot change when a run goes on: {out} has {_shown(was[key])}, not {_shown(now[key])}; leave it "
                "out, or train anew into another --out"
            )
    notice = "; ".join(f"{key} {_shown(was[key])} -> {_shown(now[key])}" for key in changed)
    return Job(after, out, f"changed from here on: {notice}" if changed else None)


def _mend(args: Train, out: Path) -> int:
    """Have it said what is wrong with a run; where that could be mended, go on after all."""
    from ..checkpoint import Run

    Run.open(out)
    return plan(args)()


def _train(args: Train, job: Job) -> int:
    from ..training import machine
    from ..training.display import for_output
    from ..training.trainer import train

    guessed = not args.preset and not args.resume and args.model in (None, "gpt")
    if guessed and job.config.preset == "char-gpu" and machine.pick_device(job.config.device).type == "cpu":
        job = _new(args, "char-cpu")  # there is a driver, but torch cannot use it
    if not job.config.strict:
        tell_idle(job.config.backend, machine.pick_device(job.config.device).type)
    if job.notice:
        print(job.notice, flush=True)
    result = train(job.config, job.out, resume=args.resume, overwrite=args.overwrite, display=for_output())
    print(_report(result, job.config.training.steps), flush=True)
    return 128 + result.signal if result.signal is not None else 0


def _report(result: Result, steps: int) -> str:
    from ..training.evaluate import ESTIMATE_BATCHES

    run = shlex.quote(str(result.path))
    if result.step < steps:
        return (
            f"stopped at step {result.step} of {steps}; the run is saved. Go on with\n"
            f"  tinygpt train --resume --out {run}"
        )
    lines = ["the whole validation split was not evaluated; `tinygpt eval` below does that"]
    if e := result.evaluation:
        lines = [f"validation loss {e.loss:.4f}: {e.summary()}", *e.details()]
    if result.estimate is not None:
        lines.append(f"estimate from {ESTIMATE_BATCHES} random batches, as nanoGPT reports it: {result.estimate:.4f}")
    lines += [
        f"the run is in {result.path}: weights, loss.png, samples.txt, metrics.jsonl. Next:",
        f"  tinygpt generate {run}",
        f"  tinygpt eval {run}",
    ]
    return "\n".join(lines)


def _default_source(model: str) -> tuple[Source, str]:
    """What a model reads where no --data names it, and the line that says so."""
    reads = kind(model).reads
    if reads == "text":
        return default_source()
    name = {"pairs": "reverse", "labelled": "opinions"}[reads]
    return find_for([name], reads, model)[0], f"no --data given: reading {name!r}, which is made up"


def _likely_preset(args: Train) -> str:
    """The preset for the device asked for, else for the GPU that a driver speaks of."""
    gpu = args.device.startswith("cuda") if args.device else gpu_present()
    return "char-gpu" if gpu else "char-cpu"


def _assignments(args: Train) -> list[str]:
    """Flags that are short for a setting, then `--set`, which is more exact and wins."""
    flags = {
        "backend": args.backend,
        "strict": "true" if args.strict else None,
        "data.tokenizer": args.tokenizer,
        "data.vocab_size": args.vocab_size,
        "training.steps": args.steps,
        "device": args.device,
        "seed": args.seed,
    }
    return [f"{key}={value}" for key, value in flags.items() if value is not None] + list(flat(args.set))


def _lasting_names(sources: Iterable[Source]) -> tuple[str, ...]:
    """Names that mean the same from another directory, and when other corpora are installed."""
    return tuple(str(s.path.absolute()) if isinstance(s, (TextFile, RecordFile)) else s.name for s in sources)


def _leaves(values: Mapping[str, Any], prefix: str = "") -> dict[str, object]:
    """Nested settings by their full names."""
    found: dict[str, object] = {}
    for key, value in values.items():
        found |= _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def _shown(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)
