"""This package's own Triton kernels at the sizes their figures are recorded for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..triton_ops import attention, cross_entropy, decode, embedding, gelu, layer_norm, optimizer
from .compiled import Arch, Report, launches

_BF16 = torch.bfloat16


@dataclass(frozen=True)
class Entry:
    """A launch whose kernels are reported.

    launch: calls a launcher with CPU tensors. moved: by kernel, the bytes of device memory that a block moves in one pass of
    its busiest loop, or in all where it has none, given the launch's options.
    """

    name: str
    launch: Callable[[], object]
    moved: Mapping[str, Callable[[Mapping[str, Any]], float]]


def _norm(C: int, add: bool) -> Entry:
    def launch() -> None:
        x, weight = torch.empty(4096, C, dtype=_BF16), torch.empty(C, dtype=_BF16)
        if add:
            y, h, mean, rstd = layer_norm.add_layer_norm_fwd(x, x, weight, weight, 1e-5)
            layer_norm.add_layer_norm_bwd(y, h, x, x, weight, weight, y, h, mean, rstd, 1e-5)
        else:
            y, mean, rstd = layer_norm.layer_norm_fwd(x, weight, weight, 1e-5)
            layer_norm.layer_norm_bwd(y, x, weight, weight, mean, rstd, 1e-5)

    return Entry(f"{'add_' * add}layer_norm C={C}", launch, {
        "_layer_norm_fwd_kernel": lambda o: o["ROWS"] * C * 2 * (4 if add else 2),
        "_layer_norm_bwd_kernel": lambda o: o["ROWS"] * C * 2 * (4 if add else 3),
    })  # fmt: skip


def _cross_entropy(V: int) -> Entry:
    def launch() -> None:
        logits, targets = torch.empty(64, V, dtype=_BF16), torch.empty(64, dtype=torch.int64)
        loss, lse = cross_entropy.cross_entropy_fwd(logits, targets, None, -100, 0.0, None)
        cross_entropy.cross_entropy_bwd(loss, logits, targets, None, lse, -100, 0.0, None)

    return Entry(f"cross_entropy V={V}", launch, {
        "_cross_entropy_fwd_kernel": lambda o: o["ROWS"] * o["BLOCK_V"] * 2,
        "_cross_entropy_bwd_kernel": lambda o: o["ROWS"] * o["BLOCK_V"] * 4,
    })  # fmt: skip


def _gelu(approximate: str) -> Entry:
    def launch() -> None:
        x = torch.empty(4096, 3072, dtype=_BF16)
        (y,) = gelu.gelu_fwd(x, None, approximate)
        gelu.gelu_bwd(y, x, None, approximate)

    return Entry(f"gelu {approximate}", launch, {
        "_gelu_fwd_kernel": lambda o: o["ROWS"] * o["BLOCK_C"] * 4,
        "_gelu_bwd_kernel": lambda o: o["ROWS"] * o["BLOCK_C"] * 6,
    })  # fmt: skip


def _embedding() -> Entry:
    def launch() -> None:
        tokens, table = torch.zeros(16, 1024, dtype=torch.int64), torch.empty(50304, 768, dtype=_BF16)
        (x,) = embedding.embedding_fwd(tokens, table, table[:1024], None, 1.0)
        embedding.embedding_bwd(x, tokens, table, table[:1024], None, 1.0, needs=(False, False, True, False))

    return Entry("embedding C=768", launch, {})


def _optimizer() -> Entry:
    def launch() -> None:
        p, g, m, v = ([torch.empty(768, 768), torch.empty(768)] for _ in range(4))
        optimizer.adamw_(p, g, m, v, 1, 1e-3, (0.9, 0.99), 1e-8, 0.1, 1.0)
        optimizer.clip_grad_norm_(g, 1.0)

    block = optimizer.BLOCK
    return Entry("adamw_, clip_grad_norm_", launch, {
        "_adamw_kernel": lambda o: block * 28, "_square_sum_kernel": lambda o: block * 4, "_scale_kernel": lambda o: block * 8,
    })  # fmt: skip


def _decode(D: int) -> Entry:
    def launch() -> None:
        q, cache = torch.empty(4, 16, D, dtype=_BF16), torch.empty(4, 4096, 4, D, dtype=_BF16)
        decode.decode_attention(q, cache, cache, torch.zeros(4, dtype=torch.int64), None)

    return Entry(f"decode_attention D={D}", launch, {})


def _attention(
    D: int,
    T: int = 1024,
    dtype: torch.dtype = _BF16,
    causal: bool = True,
    lengths: bool = False,
    dropout_p: float = 0.0,
) -> Entry:
    def launch() -> None:
        qkv = torch.empty(2, T, 6, D, dtype=dtype)
        kv_lengths = torch.zeros(2, dtype=torch.int64) if lengths else None
        seed = torch.zeros(1, dtype=torch.int64) if dropout_p else None
        y, lse = attention.attention_qkv_fwd(qkv, kv_lengths, seed, 2, 2, causal, None, dropout_p)
        attention.attention_qkv_bwd(y, qkv, kv_lengths, seed, y, lse, 2, 2, causal, None, dropout_p)

    options = {"T": T != 1024 and T, "full": not causal, "lengths": lengths, "dropout": dropout_p}
    named = "".join(f" {name}" if value is True else f" {name}={value}" for name, value in options.items() if value)
    return Entry(f"attention D={D} {str(dtype)[6:]}{named}", launch, {})


MEMORY_BOUND = (
    _norm(768, False), _norm(4096, False), _norm(768, True), _cross_entropy(50304), _cross_entropy(50257), _gelu("none"),
    _gelu("tanh"), _embedding(), _optimizer(),
)  # fmt: skip
ATTENTION = (_attention(64), _attention(128))
OTHERS = (
    *(_attention(D) for D in (16, 32, 80, 256)),
    *(_attention(D, dtype=torch.float32) for D in (32, 64, 128, 256)),
    *(_attention(D, T=64) for D in (32, 64, 128)),
    *(_attention(D, causal=False) for D in (64, 128)), *(_attention(D, lengths=True) for D in (64, 128)),
    *(_attention(D, dropout_p=0.1) for D in (64, 128)),
    _norm(384, False), _norm(1023, False), _norm(16384, False), _decode(64), _decode(128),
)  # fmt: skip


def reports(entries: tuple[Entry, ...], arch: Arch) -> Iterator[tuple[str, Report, dict[str, Any]]]:
    """(name, report, figures) of every kernel of the entries, `per_byte` by the bytes that the algorithm has to move."""
    for entry in entries:
        for report in launches(entry.launch, arch):
            figures = report.figures()
            if report.kernel in entry.moved and report.code is not None:
                section = report.code.busiest
                threads = 32 * report.warps
                figures["per_byte"] = round(section.issued * threads / entry.moved[report.kernel](report.options), 2)
            else:
                figures.pop("per_byte", None)
            yield f"{entry.name}: {report.kernel.strip('_').removesuffix('_kernel')}", report, figures
