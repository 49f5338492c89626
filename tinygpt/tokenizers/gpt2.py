"""GPT-2's own vocabulary (Radford et al. 2019), applied by `tiktoken`; nothing is trained.

The vocabulary comes from the network once, and lies in the cache from then on:

    gpt2/encoder.json        as OpenAI publishes it; Hugging Face's vocab.json is the same file and serves too

Every tokenizer.json holds it whole, so that a run needs no such file.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tinygpt_kernels.userdir import cache_directory

from .. import atomic
from ..errors import UserError
from ._base import check_size
from ._bytes import BYTE_OF, BytesTokenizer, segments

if TYPE_CHECKING:
    import tiktoken

END_OF_TEXT = "<|endoftext|>"

_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/encoder.json"
_SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"
_NAMES = ("encoder.json", "vocab.json")
_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""


class Gpt2Tokenizer(BytesTokenizer):
    """Without special tokens of its own the ids are GPT-2's, <|endoftext|> last.

    Args:
        ranks: the bytes of each token in the order in which they merge.
    """

    name = "gpt2"

    def __init__(self, ranks: Sequence[bytes], *, specials: Sequence[str] = ()) -> None:
        self.ranks = tuple(ranks)
        super().__init__([*ranks, b""], specials)

    @classmethod
    def train(
        cls, texts: Iterable[str], *, vocab_size: int | None = None, specials: Sequence[str] = ()
    ) -> Gpt2Tokenizer:  # fmt: skip
        """GPT-2's tokenizer; the text is not read."""
        check_size(cls.name, vocab_size)
        _tiktoken()  # now, and not after a fetch
        return cls(load_ranks(vocabulary_directory()), specials=specials)

    @cached_property
    def _encoding(self) -> tiktoken.Encoding:
        encoding: tiktoken.Encoding = _tiktoken().Encoding(
            "gpt2",
            pat_str=_PATTERN,
            mergeable_ranks={piece: rank for rank, piece in enumerate(self.ranks)},
            special_tokens={END_OF_TEXT: len(self.ranks)},
        )
        return encoding

    def _encode_unicode(self, text: str) -> NDArray[np.int64]:
        found = self._encoding.encode_ordinary_batch(list(segments(text)), num_threads=os.cpu_count() or 1)
        return np.fromiter(chain.from_iterable(found), np.int64)

    def tokens(self) -> list[str]:
        return [*super().tokens()[:-1], END_OF_TEXT]

    def payload(self) -> dict[str, object]:
        return {"ranks": [base64.b64encode(piece).decode() for piece in self.ranks]}

    @classmethod
    def from_payload(cls, payload: Mapping[str, object], specials: Sequence[str] = ()) -> Gpt2Tokenizer:
        if payload.keys() != {"ranks"}:
            raise UserError(f"damaged gpt2 tokenizer: it holds {sorted(payload)}, not ranks")
        ranks = payload["ranks"]
        try:
            if not isinstance(ranks, list):
                raise ValueError("'ranks' must be a list")
            pieces = [base64.b64decode(text, validate=True) for text in ranks]
            if len(set(pieces)) != len(pieces) or b"" in pieces:
                raise ValueError("'ranks' must be distinct, and none empty")
            return cls(pieces, specials=specials)
        except KeyError as error:
            raise UserError(f"damaged gpt2 tokenizer: byte {error} has no token") from None
        except (ValueError, TypeError) as error:
            raise UserError(f"damaged gpt2 tokenizer: {error}") from None


def vocabulary_directory() -> Path:
    """Where the vocabulary file lies, or will."""
    return cache_directory() / "gpt2"


def vocabulary_file(directory: Path | None = None) -> Path | None:
    """The vocabulary file, if it is there."""
    directory = directory or vocabulary_directory()
    return next((path for name in _NAMES if (path := directory / name).is_file()), None)


def load_ranks(directory: Path) -> list[bytes]:
    """The vocabulary of the file in `directory`, fetched into it where it is missing: each token's bytes, by rank.

    Raises:
        UserError: the file is missing and there is no network, or it is damaged.
    """
    path = vocabulary_file(directory) or _fetch(directory / _NAMES[0])
    try:
        ids = json.loads(path.read_bytes())
        ids.pop(END_OF_TEXT, None)
        pieces = {rank: bytes(BYTE_OF[c] for c in token) for token, rank in ids.items()}
        ranks = [pieces[rank] for rank in range(len(pieces))]
        if missing := [byte for byte in range(256) if bytes([byte]) not in ranks[:256]]:
            raise ValueError(f"byte {missing[0]} is not among its first 256 tokens")
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise UserError(
            f"{path} is no GPT-2 vocabulary, or a damaged one ({type(error).__name__}: {error}); delete it, and it is fetched "
            "again"
        ) from None
    return ranks


def _fetch(path: Path) -> Path:
    import urllib.request

    try:
        with urllib.request.urlopen(_URL, timeout=20) as answer:
            content = answer.read()
    except OSError as error:  # URLError is one
        raise UserError(
            f"tokenizer 'gpt2' needs the network once, for GPT-2's vocabulary, and cannot reach it ({error}). Put "
            f"encoder.json from {_URL}, or vocab.json of openai-community/gpt2, into {path.parent}; or use --tokenizer bpe, "
            "which is trained on the text"
        ) from None
    if hashlib.sha256(content).hexdigest() != _SHA256:
        raise UserError(f"{_URL} is not the GPT-2 vocabulary it was; put the right encoder.json into {path.parent}")
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic.write(path, content)
    return path


def _tiktoken() -> Any:
    try:
        import tiktoken
    except ModuleNotFoundError:
        raise UserError(
            "tokenizer 'gpt2' needs the package tiktoken: pip install 'tinygpt[gpt2]', or use --tokenizer bpe"
        ) from None
    return tiktoken
