"""Run directories: what a training run leaves behind, and what it resumes from.

    config.json     the whole config, versions, machine, corpus, backend per op
    tokenizer.json
    metrics.jsonl   one line per logged step and per evaluation
    samples.txt     text sampled along the way
    loss.png
    checkpoints/step-N/model.safetensors, training.pt

A directory appears under its name only when its step 0 is whole, and a checkpoint only when it is: both are written under
another name, synced and renamed. Nothing in a run directory is trusted: weights are safetensors, the rest is loaded with
`weights_only=True`, which runs no code of the file's.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from . import atomic, tokenizers
from .config import RunConfig, from_dict, to_dict
from .errors import UserError
from .tokenizers import Tokenizer

try:
    import fcntl
except ImportError:  # Windows: two processes in one run are not noticed there
    fcntl = None  # type: ignore[assignment]

FORMAT_VERSION = 1


@dataclass
class Run:
    """One run directory. `facts`: what config.json holds beside the config (versions, machine, corpus, backends)."""

    path: Path
    config: RunConfig
    tokenizer: Tokenizer
    facts: dict[str, Any]
    _lock: Any = field(default=None, repr=False)

    @classmethod
    def create(
        cls, path: Path, config: RunConfig, tokenizer: Tokenizer, facts: Mapping[str, Any],
        save_start: Callable[[Run], None], *, overwrite: bool = False,
    ) -> Run:  # fmt: skip
        """A new run with its step 0, which `save_start` saves. An old run at `path` goes only when the new one stands.

        Raises:
            UserError: there is a run, or something else, at `path`; or the place cannot be written.
        """
        refuse_existing(path, overwrite=overwrite)
        draft = path.with_name(f".{path.name}.new-{os.getpid()}")
        with _disk(path):
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir(parents=True)
        run = cls(draft, config, tokenizer, dict(facts))
        try:
            with _disk(path):
                (draft / "checkpoints").mkdir()
                run._take_lock()
                tokenizer.save(draft / "tokenizer.json")
                run.write_config()
            save_start(run)
            with _disk(path):
                if path.exists():
                    old = _replaced(path)
                    path.rename(old)
                    draft.rename(path)
                    shutil.rmtree(old, ignore_errors=True)
                else:
                    draft.rename(path)
                atomic.sync_directory(path.parent)
        except BaseException:
            run.close()
            shutil.rmtree(draft, ignore_errors=True)
            raise
        run.path = path
        return run

    @classmethod
    def open(cls, path: Path, *, lock: bool = False) -> Run:
        """An existing run. `lock` refuses one that another process is training.

        Raises:
            UserError: missing, no run, damaged, of a newer version, or in use; names the file and the remedy.
        """
        _recover(path)
        if not path.is_dir():
            raise UserError(f"no run at {path}: there is no such directory; `tinygpt train --out {path}` makes one")
        values = _read_json(path / "config.json", path)
        if values.get("format") != FORMAT_VERSION:
            raise UserError(
                f"{path / 'config.json'} is of format {values.get('format')!r}, this version of tinygpt reads {FORMAT_VERSION}; "
                "update tinygpt, or train anew"
            )
        config = from_dict(values.get("config"), where=str(path / "config.json"))  # type: ignore[arg-type]
        tokenizer = tokenizers.load(path / "tokenizer.json")
        if values.get("tokenizer", _digest(tokenizer)) != _digest(tokenizer):
            raise UserError(
                f"{path / 'tokenizer.json'} is not the tokenizer this run was trained with, but of another run; "
                "put the right one back, or train anew"
            )
        run = cls(
            path, config, tokenizer, {k: v for k, v in values.items() if k not in ("format", "config", "tokenizer")}
        )
        if lock:
            run._take_lock()
        return run

    def write_config(self) -> None:
        """Write config.json: config and facts."""
        values = {"format": FORMAT_VERSION, "config": to_dict(self.config), "tokenizer": _digest(self.tokenizer)}
        values |= self.facts
        atomic.write(self.path / "config.json", (json.dumps(values, indent=1) + "\n").encode())

    def close(self) -> None:
        """Release the lock."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def checkpoints(self) -> list[int]:
        """Steps that were saved, ascending."""
        return sorted(int(p.name[5:]) for p in (self.path / "checkpoints").glob("step-*") if p.name[5:].isdigit())

    def save(self, step: int, weights: Mapping[str, Tensor], state: Mapping[str, Any], val_loss: float | None) -> None:
        """Save a checkpoint; it appears whole or not at all. Older ones beyond `keep_checkpoints` go, but for the best.

        Raises:
            UserError: no space left; what was saved before stays.
        """
        folder = self.path / "checkpoints"
        final, draft = folder / f"step-{step}", folder / f".step-{step}"
        with _disk(self.path):
            try:
                shutil.rmtree(draft, ignore_errors=True)
                draft.mkdir()
                contiguous = {name: t.detach().cpu().contiguous() for name, t in weights.items()}
                # One key: safetensors writes several in an order that changes from run to run.
                about = {"tinygpt": json.dumps({"step": step, "val_loss": val_loss})}
                save_file(contiguous, draft / "model.safetensors", about)
                torch.save(dict(state), draft / "training.pt")
                for file in draft.iterdir():
                    _sync(file)
                atomic.sync_directory(draft)
                if final.exists():  # a damaged one that this run passed again
                    shutil.rmtree(final)
                draft.rename(final)
                atomic.sync_directory(folder)
            except BaseException:
                shutil.rmtree(draft, ignore_errors=True)
                raise
            self._prune()

    def load(self, step: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """(weights, training state) of one checkpoint, on the CPU.

        Raises:
            UserError: missing, damaged, or holding code; names the file.
        """
        return self.load_weights(step), _load_state(self.path / "checkpoints" / f"step-{step}" / "training.pt")

    def load_newest(self, tell: Callable[[str], None]) -> tuple[int, dict[str, Tensor], dict[str, Any]]:
        """(step, weights, state) of the newest whole checkpoint; damaged ones are told of and passed over."""
        reason = f"{self.path} holds no checkpoint"
        for step in reversed(self.checkpoints()):
            try:
                return (step, *self.load(step))
            except UserError as error:
                reason = str(error)
                tell(f"{error}; trying the one before")
        raise UserError(f"{reason}; there is nothing left to resume from: train anew with --overwrite")

    def load_weights(self, step: int | None = None, *, best: bool = False) -> dict[str, Tensor]:
        """Weights of a checkpoint: the newest, the best by validation loss, or that of `step`.

        Raises:
            UserError: no such checkpoint, or a damaged one.
        """
        steps = self.checkpoints()
        if not steps:
            raise UserError(f"{self.path} holds no checkpoint; train anew with --overwrite")
        if best:
            step = min(steps, key=lambda s: (self._val_loss(s), -s))
        step = steps[-1] if step is None else step
        file = self.path / "checkpoints" / f"step-{step}" / "model.safetensors"
        try:
            weights = load_file(file)
        except FileNotFoundError:
            raise UserError(f"{file} does not exist; the run has checkpoints at {', '.join(map(str, steps))}") from None
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file} is damaged: {error}") from None
        table = weights.get("token")
        if table is not None and len(table) < self.tokenizer.vocab_size:
            raise UserError(
                f"{self.path / 'tokenizer.json'} has {self.tokenizer.vocab_size} tokens and the model's embedding "
                f"{len(table)} rows: they do not belong together; put the run's own tokenizer back"
            )
        return weights

    def sweep(self, step: int) -> None:
        """Make the directory what it was when `step` was saved: no drafts, no metrics or samples of later steps."""
        for leftover in (self.path / "checkpoints").glob(".step-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        for later in self.checkpoints():
            if later > step:
                shutil.rmtree(self.path / "checkpoints" / f"step-{later}")
        atomic.sweep(self.path)
        kept = [json.dumps(m) for m in self.metrics() if m["step"] <= step]
        atomic.write(self.path / "metrics.jsonl", "".join(f"{line}\n" for line in kept).encode())
        samples = self.path / "samples.txt"
        if samples.exists():
            blocks = samples.read_text(encoding="utf-8", errors="replace").split(SAMPLE_MARK)
            whole = [b for b in blocks if b.partition("\n")[0].isdigit() and int(b.partition("\n")[0]) <= step]
            atomic.write(samples, "".join(SAMPLE_MARK + b for b in whole).encode())

    def metrics(self) -> list[dict[str, Any]]:
        """Lines of metrics.jsonl; one cut short by a kill is passed over."""
        found = []
        with suppress(FileNotFoundError):
            for line in (self.path / "metrics.jsonl").read_text(encoding="utf-8", errors="replace").splitlines():
                with suppress(ValueError):
                    values = json.loads(line)
                    if isinstance(values, dict) and isinstance(values.get("step"), int):
                        found.append(values)
        return found

    def log(self, **values: Any) -> None:
        """Append a line to metrics.jsonl."""
        with _disk(self.path), (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")

    def log_sample(self, step: int, text: str) -> None:
        """Append a sample to samples.txt."""
        with _disk(self.path), (self.path / "samples.txt").open("a", encoding="utf-8") as file:
            file.write(f"{SAMPLE_MARK}{step}\n{text}\n")

    def _val_loss(self, step: int) -> float:
        try:
            with safe_open(self.path / "checkpoints" / f"step-{step}" / "model.safetensors", "pt") as file:
                value = json.loads((file.metadata() or {})["tinygpt"])["val_loss"]
        except (SafetensorError, OSError, ValueError, KeyError, TypeError):
            return float("inf")
        return float(value) if isinstance(value, (int, float)) else float("inf")

    def _prune(self) -> None:
        steps = self.checkpoints()
        best = min(steps, key=lambda s: (self._val_loss(s), -s))
        for step in steps[: -self.config.training.keep_checkpoints]:
            if step != best:
                shutil.rmtree(self.path / "checkpoints" / f"step-{step}", ignore_errors=True)

    def _take_lock(self) -> None:
        if not fcntl:
            return
        self._lock = (self.path / ".lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.close()
            raise UserError(
                f"another process is training into {self.path}; wait for it, or give another --out"
            ) from None


SAMPLE_MARK = "--- step "


def refuse_existing(path: Path, *, overwrite: bool) -> None:
    """Raise UserError where a new run at `path` would hide or destroy something the user did not say may go."""
    _recover(path)
    if not path.exists():
        return
    if not (path / "config.json").exists() and (path.is_file() or any(path.iterdir())):
        raise UserError(f"{path} exists and is no run of tinygpt's; give another --out")
    if (path / "config.json").exists() and not overwrite:
        raise UserError(
            f"a run exists at {path}: go on with --resume, replace it with --overwrite, or give another --out"
        )


def _replaced(path: Path) -> Path:
    return path.with_name(f".{path.name}.replaced")


def _recover(path: Path) -> None:
    """Undo a replacement that was killed between its two renames."""
    old = _replaced(path)
    if old.exists():
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.rename(path)


def _read_json(file: Path, run: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{run} is not a run of tinygpt's: it has no {file.name}") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{file} is damaged: {error}") from None
    if not isinstance(values, dict) or not isinstance(values.get("config"), dict):
        raise UserError(f"{file} is damaged: it holds no config")
    return values


def _load_state(file: Path) -> dict[str, Any]:
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{file} does not exist; the checkpoint is incomplete") from None
    except pickle.UnpicklingError as error:
        if "weights_only" in str(error) or "Unsupported" in str(error):
            raise UserError(
                f"{file} holds code, which was not run: it is no file of tinygpt's; do not trust this run"
            ) from None
        raise UserError(f"{file} is damaged: {str(error).splitlines()[0]}") from None
    except (RuntimeError, OSError, EOFError, ValueError) as error:
        raise UserError(f"{file} is damaged: {str(error).splitlines()[0]}") from None
    if not isinstance(state, dict) or not isinstance(state.get("step"), int):
        raise UserError(f"{file} is damaged: it holds no training state")
    return state


def _digest(tokenizer: Tokenizer) -> str:
    return hashlib.sha256(json.dumps(tokenizer.to_json()).encode()).hexdigest()


def _sync(file: Path) -> None:
    with file.open("rb") as opened:
        os.fsync(opened.fileno())


@contextmanager
def _disk(path: Path) -> Iterator[None]:
    """Say in the user's words what the disk refuses."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        full = (
            getattr(error, "errno", None) in (28, 122) or "No space left" in str(error) or "enforce fail" in str(error)
        )
        if full:
            raise UserError(
                f"no space left for {path}: what was saved before is whole; free some space, then --resume"
            ) from error
        if isinstance(error, OSError):
            raise UserError(f"{path} cannot be written: {reason}") from error
        raise
