"""What is checked and settled before torch is imported."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from tinygpt_kernels.interpreter import decide
from tinygpt_kernels.spec import parse_spec

from ..data.sources import Source, TextFile, find
from ..errors import UserError


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


def find_readable(names: Sequence[str]) -> list[Source]:
    """The corpora and text files of these names.

    Raises:
        UserError: there is none of a name, or a file that cannot be read or is empty.
    """
    sources = find(names)
    for source in sources:
        if isinstance(source, TextFile):
            source.parts()
    return sources
