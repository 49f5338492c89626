"""What is checked and settled before torch is imported."""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Sequence
from pathlib import Path

from tinygpt_kernels.interpreter import decide
from tinygpt_kernels.spec import known_backends, parse_spec, unknown

from ..config import RunConfig, from_dict
from ..data.records import RecordFile, find_for
from ..data.sources import Source, TextFile
from ..errors import UserError
from ..models import kind


def settle_backend(text: str) -> bool:
    """Check the spec and, where it names Triton and there is no GPU, turn Triton's interpreter on, saying so.

    Returns:
        whether kernels will be interpreted.

    Raises:
        UserError: an unknown backend or op; offers the nearest name.
    """
    try:
        spec = parse_spec(text)
        notice = decide(spec.backends())
        if spec.per_op:
            from tinygpt_kernels import bind  # ops are declared in torch's terms: only now, after `decide`

            bind(spec)
    except ValueError as error:
        raise UserError(f"--backend {text}: {error}") from None
    if notice:
        print(notice, file=sys.stderr)
    return notice is not None


def find_backends(names: Sequence[str]) -> tuple[str, ...]:
    """Check names of backends and, where `triton` is one and there is no GPU, turn Triton's interpreter on, saying so.

    Raises:
        UserError: an unknown backend; offers the nearest name.
    """
    find_names("backend", names, known_backends())
    if notice := decide(names):
        print(notice, file=sys.stderr)
    return tuple(dict.fromkeys(names))


def find_ops(names: Sequence[str]) -> tuple[str, ...]:
    """Check names of ops, all where none is named. Imports torch, in whose terms ops are declared: only after `find_backends`.

    Raises:
        UserError: an unknown op; offers the nearest name.
    """
    from tinygpt_kernels.dispatch import all_ops

    return find_names("op", names, all_ops()) or tuple(all_ops())


def find_names(kind: str, names: Sequence[str], known: Collection[str]) -> tuple[str, ...]:
    """The names, each once, if all are known.

    Raises:
        UserError: one is not; offers the nearest.
    """
    for name in names:
        if name not in known:
            raise UserError(unknown(kind, name, known))
    return tuple(dict.fromkeys(names))


def find_readable(names: Sequence[str], model: str = "gpt") -> list[Source]:
    """The corpora and files of these names, for a model.

    Raises:
        UserError: there is none of a name, it holds what this model does not read, or a file cannot be read or is empty.
    """
    sources = find_for(names, kind(model).reads, model)
    for source in sources:
        if isinstance(source, (TextFile, RecordFile)):
            source.parts()
    return sources


def recorded_config(run: Path) -> RunConfig | None:
    """A run's config, read without torch: its model and backend have to be known before; None where it cannot be read."""
    try:
        return from_dict(json.loads((run / "config.json").read_bytes())["config"])
    except (OSError, ValueError, LookupError, TypeError, UserError):
        return None
