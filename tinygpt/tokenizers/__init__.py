"""Tokenizers by name. A new one is a new module in this folder, named after it, that subclasses `Tokenizer`.

>>> tokenizer = tokenizer_class("char").train(["to be or not to be"])
>>> tokenizer.decode(tokenizer.encode("robot"))
'robot'
"""

from __future__ import annotations

import importlib
import json
import pkgutil
from collections.abc import Mapping
from pathlib import Path

from tinygpt_kernels.spec import unknown

from ..errors import UserError
from ._base import (
    END,
    FORMAT,
    PAD,
    START,
    UNKNOWN,
    VERSION,
    Decoder,
    Tokenizer,
    UnknownPolicy,
    check_size,
    name_characters,
)

__all__ = [
    "END",
    "PAD",
    "START",
    "UNKNOWN",
    "Decoder",
    "Tokenizer",
    "UnknownPolicy",
    "check_size",
    "from_json",
    "known_tokenizers",
    "load",
    "name_characters",
    "tokenizer_class",
]


def known_tokenizers() -> list[str]:
    """Names of all tokenizers, sorted."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def tokenizer_class(name: str) -> type[Tokenizer]:
    """The tokenizer class of that name.

    Raises:
        UserError: no such tokenizer; offers the nearest name.
    """
    if name not in known_tokenizers():
        raise UserError(unknown("tokenizer", name, known_tokenizers()))
    importlib.import_module(f".{name}", __name__)
    return Tokenizer.classes[name]


def from_json(values: Mapping[str, object]) -> Tokenizer:
    """The tokenizer that `Tokenizer.to_json` described.

    Raises:
        UserError: not such a description, one of a newer version, or one that is damaged.
    """
    if values.get("format") != FORMAT:
        raise UserError(f"not a tokenizer: its 'format' is {values.get('format')!r}, not {FORMAT!r}")
    version = values.get("version")
    if not isinstance(version, int) or version < 1:
        raise UserError(f"damaged tokenizer: its 'version' is {version!r}")
    if version > VERSION:
        raise UserError(
            f"tokenizer of format version {version}; this tinygpt reads up to version {VERSION}: upgrade tinygpt"
        )
    specials = values.get("specials", [])
    if (
        not isinstance(specials, list)
        or not all(isinstance(s, str) and s for s in specials)
        or len(set(specials)) != len(specials)
    ):
        raise UserError("damaged tokenizer: 'specials' must be a list of distinct names")
    payload = {key: value for key, value in values.items() if key not in ("format", "version", "type", "specials")}
    return tokenizer_class(str(values.get("type"))).from_payload(payload, specials)


def load(path: str | Path) -> Tokenizer:
    """The tokenizer saved at `path`.

    Raises:
        UserError: the file is missing, unreadable, damaged or of a newer version; the message names it.
    """
    try:
        values = json.loads(Path(path).read_bytes())
        if not isinstance(values, dict):
            raise UserError("not a tokenizer: it holds no JSON object")
        return from_json(values)
    except FileNotFoundError:
        raise UserError(f"{path}: no such tokenizer file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot read the tokenizer: {error.strerror}") from None
    except ValueError as error:  # JSON that is no JSON, bytes that are no UTF-8
        raise UserError(f"{path}: damaged tokenizer file: {error}") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
