"""The decoder's training step written out: forward and backward over buffers allocated once, without autograd.

# B batch, T tokens, R = B * T rows, C channels, H heads, K key/value heads, E = H + 2K, D head dim, V vocabulary

It mirrors gpt.py line by line, and drives the same kernels: those that the model's ops are bound to, as `(fwd, bwd)` pairs
that write into buffers. What it saves is what autograd costs: a node per operation, a fresh and therefore cold output for each, sums of
gradients that meet in the residual stream and in the tied token table.

Gradients go straight to where the optimizer reads them. Nothing is allocated and nothing is waited for inside a step, so
that a GPU could capture it as a graph.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tinygpt_kernels.op import Pair

from ..flat import Flat
from ..optim import Optimizer
from .block import Block, Norm
from .gpt import GPT

# The logits of one step are kept up to this many elements (64 MB), and their softmax is computed once; above it they
# would be the largest tensor of the step, and linear_cross_entropy computes them a second time, a block at a time.
_LOGITS_KEPT = 1 << 24
_EPS = 1e-5  # of the norms, as the ops have it


class NotServed(Exception):
    """Why a step cannot be written out here: autograd serves instead."""


@dataclass
class Saved:
    """What one norm leaves for its backward. h: [R, C], the stream it normalised; y: [R, C], what it made of it."""

    h: Tensor
    y: Tensor
    mean: Tensor
    rstd: Tensor


@dataclass
class Activations:
    """What one block keeps from its forward to its backward."""

    attention_norm: Saved
    qkv: Tensor  # [B, T, E, D]
    seed: Tensor | None
    attended: Tensor  # [B, T, H, D]
    lse: Tensor  # [B, H, T]
    feed_forward_norm: Saved
    up: Tensor  # [R, 4C]: before the GELU, or where products fuse it, its slope
    wide: Tensor  # [R, 4C]: after it
    masks: tuple[Tensor, Tensor] | None  # of residual dropout, [R, C] each


class Step:
    """Loss and gradients of one batch, as `GPT.forward` and autograd make them.

    Args:
        model: what is trained; its parameters must stay where they are.
        optimizer: whose flat buffer the gradients go to.
        batch_size: B; T is the model's context.

    Raises:
        NotServed: another precision than float32, or an op is bound to `torch`, whose backward is PyTorch's autograd.
    """

    how = "written out"

    def __init__(
        self, model: GPT, optimizer: Optimizer, batch_size: int, precision: torch.dtype = torch.float32
    ) -> None:
        if precision != torch.float32:
            raise NotServed("a step that is written out computes in float32")
        shape = (model.config.norm, model.config.activation, model.config.positions, model.config.hidden)
        if shape != ("pre", "gelu", "learned", None):
            raise NotServed(
                "only the pre-norm decoder with GELU, learned positions and four times the width is written out"
            )
        assert model.norm is not None
        self.model, self.norm = model, model.norm
        self.layers: list[Block] = list(model.blocks)  # type: ignore[arg-type]
        self._recordable = False
        self._recorded: Callable[[], None] | None = None
        self._more: Flat | None = None  # gradients of further microbatches, before they are added
        c = model.config
        self.dropout = c.dropout
        self.heads, self.kv_heads = c.heads, c.kv_heads or c.heads
        self.B, self.T, self.C, self.V = batch_size, c.block_size, c.width, model.token.shape[0]
        self.R, self.D = self.B * self.T, c.head_dim
        self._bind()
        self.gradients = optimizer.flat_gradients()
        self._allocate()

    def __call__(
        self, tokens_BT: Tensor, targets_BT: Tensor, denominator: Tensor | None = None, *, add: bool = False
    ) -> Tensor:
        """Mean loss of a batch, as `GPT.forward` has it; its gradients are in the buffers afterwards.

        Args:
            tokens_BT, targets_BT: int64 [B, T].
            denominator: as in `GPT.forward`.
            add: to the gradients that are there, for a further microbatch.

        Returns:
            scalar loss, at least float32; a buffer that the next call writes again.
        """
        if tokens_BT.shape != (self.B, self.T):
            raise ValueError(f"this step is made for {self.B} x {self.T} tokens, not {tuple(tokens_BT.shape)}")
        with torch.no_grad():
            self.tokens.copy_(tokens_BT)
            self.targets.copy_(targets_BT)
            if denominator is None and not add and not self.dropout:
                self._replay()
            else:
                self._run(denominator, add=add)
        return self.loss

    def _run(self, denominator: Tensor | None = None, *, add: bool = False) -> None:
        if add:
            self._more = self._more or Flat({n: g.shape for n, g in self.gradients.views.items()},
                                            self.gradients.buffer.dtype, self.gradients.buffer.device)  # fmt: skip
        self._g = self._more.views if add and self._more else self.gradients.views
        self._forward(self.tokens)
        self._head(self.targets.view(-1), denominator)
        self._backward(self.tokens)
        if add and self._more:
            self.gradients.buffer += self._more.buffer

    def _replay(self) -> None:
        """Run the plain step; from the second time on as it was recorded, where the backend can."""
        if self._recorded is not None:
            self._recorded()
        elif self._recordable:
            self._recorded = self.products.record(self._run)
            self._recordable = self._recorded is not None
        else:
            self._run()

    # ---------------------------------------------------------------------------------------------------------- forward

    def _forward(self, tokens_BT: Tensor) -> None:
        model, branch = self.model, self.branch
        stream = self.blocks[0].attention_norm.h
        self._embedding[0](
            tokens_BT, model.token, model.position, None, 1.0, out=(stream.view(self.B, self.T, self.C),)
        )
        if self.embedding_mask is not None:
            self._drop(stream, self.embedding_mask)
        for i, (block, s) in enumerate(zip(self.layers, self.blocks, strict=True)):
            attention, ff = block.attention, block.feed_forward
            if i == 0:
                self._norm(block.attention_norm, s.attention_norm)
            else:
                self._add_norm(block.attention_norm, self.blocks[i - 1].feed_forward_norm.h, s.attention_norm)
            self._linear(s.attention_norm.y, attention.qkv, out=s.qkv.view(self.R, -1))
            if self.dropout:
                s.seed = torch.randint(2**63 - 1, (1,), device=branch.device)
            self._attention[0](
                s.qkv, None, s.seed, self.heads, self.kv_heads, True, None, self.dropout, out=(s.attended, s.lse)
            )
            self._linear(s.attended.view(self.R, self.C), attention.proj, out=branch)
            if s.masks is not None:
                self._drop(branch, s.masks[0])
            self._add_norm(block.feed_forward_norm, s.attention_norm.h, s.feed_forward_norm)
            self._linear_gelu(s.feed_forward_norm.y, ff.up, s)
            self._linear(s.wide, ff.down, out=branch)
            if s.masks is not None:
                self._drop(branch, s.masks[1])
        self._add_norm(self.norm, self.blocks[-1].feed_forward_norm.h, self.final)

    def _norm(self, norm: Norm, s: Saved) -> None:
        self._layer_norm[0](s.h, norm.weight, norm.bias, _EPS, out=(s.y, s.mean, s.rstd))

    def _add_norm(self, norm: Norm, stream: Tensor, s: Saved) -> None:
        self._add_layer_norm[0](self.branch, stream, norm.weight, norm.bias, _EPS, out=(s.y, s.h, s.mean, s.rstd))

    def _linear(self, x: Tensor, layer: nn.Linear, *, out: Tensor) -> None:
        self.products.linear_fwd(x, layer.weight, layer.bias, out=out)

    def _linear_gelu(self, x: Tensor, layer: nn.Linear, s: Activations) -> None:
        approximate = self.model.config.gelu
        if self.products.fuses_gelu:
            self.products.linear_gelu_fwd(x, layer.weight, layer.bias, approximate, out=(s.wide, s.up))
        else:
            self.products.linear_fwd(x, layer.weight, out=s.up)
            self._gelu[0](s.up, layer.bias, approximate, out=(s.wide,))

    def _drop(self, x: Tensor, mask: Tensor) -> None:
        x.mul_(mask.bernoulli_(1 - self.dropout).div_(1 - self.dropout))

    # ------------------------------------------------------------------------------------------------- loss, both ways

    def _head(self, targets_R: Tensor, denominator: Tensor | None) -> None:
        """The loss, the gradient of the last norm's output in `narrow`, and that of the token table as an output layer."""
        token, hidden, options = self.model.token, self.final.y, (-100, 0.0, self.model.padded_from)
        if self.logits is None:
            fwd, bwd, _ = self._linear_cross_entropy
            fwd(hidden, token, targets_R, denominator, *options, out=(self.loss, self.lse))
            bwd(self.one, hidden, token, targets_R, denominator, self.lse, *options, needs=(True, True, False, False),
                out=(self.narrow, self._g["token"], None, None))  # fmt: skip
            return
        fwd, bwd, _ = self._cross_entropy
        logits = self.products.linear_fwd(hidden, token, out=self.logits)
        fwd(logits, targets_R, denominator, *options, out=(self.loss, self.lse))
        bwd(
            self.one,
            logits,
            targets_R,
            denominator,
            self.lse,
            *options,
            needs=(True, False, False),
            out=(logits, None, None),
        )
        self.products.linear_bwd_input(logits, token, out=self.narrow)
        self.products.linear_bwd_weight(logits, hidden, out=self._g["token"])

    # --------------------------------------------------------------------------------------------------------- backward

    def _backward(self, tokens_BT: Tensor) -> None:
        g, s = self._g, self.final
        # dh is the gradient of the residual stream; the first one comes through the last norm alone.
        dh, spare = self.stream
        norm = self.norm
        self._layer_norm[1](self.narrow, s.h, norm.weight, norm.bias, s.mean, s.rstd, _EPS,
                            needs=(True, True, norm.bias is not None), out=(dh, g["norm.weight"], g.get("norm.bias")))  # fmt: skip
        for i in reversed(range(len(self.blocks))):
            block, a, name = self.layers[i], self.blocks[i], f"blocks.{i}."
            attention, ff = block.attention, block.feed_forward
            # dh stays as it is for the stream; times the mask it is the gradient of the branch.
            dbranch = self._undrop(dh, a, 1)
            self._linear_bwd_weight(name + "feed_forward.down", dbranch, a.wide)
            self._linear_gelu_bwd(name + "feed_forward.up", dbranch, ff.down.weight, ff.up, a)
            self._linear_bwd_weight(
                name + "feed_forward.up", self.wide, a.feed_forward_norm.y, bias=self.products.fuses_gelu
            )
            self.products.linear_bwd_input(self.wide, ff.up.weight, out=self.narrow)
            dh, spare = self._add_norm_bwd(
                name + "feed_forward_norm", block.feed_forward_norm, a.feed_forward_norm, dh, spare
            )

            dbranch = self._undrop(dh, a, 0)
            self._linear_bwd_weight(name + "attention.proj", dbranch, a.attended.view(self.R, self.C))
            self.products.linear_bwd_input(dbranch, attention.proj.weight, out=self.narrow)
            self._attention[1](
                self.narrow.view(a.attended.shape), a.qkv, None, a.seed, a.attended, a.lse, self.heads, self.kv_heads,
                True, None, self.dropout, needs=(True, False, False), out=(self.dqkv, None, None),
            )  # fmt: skip
            dqkv = self.dqkv.view(self.R, -1)
            self._linear_bwd_weight(name + "attention.qkv", dqkv, a.attention_norm.y)
            self.products.linear_bwd_input(dqkv, attention.qkv.weight, out=self.narrow)
            dh, spare = self._add_norm_bwd(name + "attention_norm", block.attention_norm, a.attention_norm, dh, spare)
        if self.embedding_mask is not None:
            dh.mul_(self.embedding_mask)
        self._embedding[1](
            dh.view(self.B, self.T, self.C), tokens_BT, self.model.token, self.model.position, None, 1.0,
            needs=(False, True, True, False), out=(None, self.dtoken, g["position"], None),
        )  # fmt: skip
        g["token"] += self.dtoken  # the table is tied: its other gradient came from the loss

    def _undrop(self, dh: Tensor, a: Activations, which: int) -> Tensor:
        return dh if a.masks is None else torch.mul(dh, a.masks[which], out=self.branch)

    def _linear_bwd_weight(self, name: str, dy: Tensor, x: Tensor, *, bias: bool = True) -> None:
        self.products.linear_bwd_weight(dy, x, out=self._g[name + ".weight"])
        if bias and name + ".bias" in self._g:
            torch.sum(dy, 0, out=self._g[name + ".bias"])

    def _linear_gelu_bwd(self, name: str, dy: Tensor, weight: Tensor, up: nn.Linear, a: Activations) -> None:
        """Back through `weight` and the GELU before it: the gradient of the GELU's input in `wide`."""
        if self.products.fuses_gelu:
            self.products.linear_bwd_input(dy, weight, a.up, out=self.wide)
            return
        self.products.linear_bwd_input(dy, weight, out=self.wide)
        dbias = self._g.get(name + ".bias")
        # `wide` holds the gradient of the output; the kernel reads and writes each element once, so one buffer serves.
        self._gelu[1](
            self.wide, a.up, up.bias, self.model.config.gelu, needs=(True, dbias is not None), out=(self.wide, dbias)
        )

    def _add_norm_bwd(self, name: str, norm: Norm, s: Saved, dh: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
        """Back through a norm and the addition before it, from `narrow` and dh; returns (the stream's gradient, a free buffer)."""
        # The sum may be split in any way: h + 0 is the one that needs no further buffer.
        self._add_layer_norm[1](
            self.narrow, dh, s.h, self.zero, norm.weight, norm.bias, s.y, s.h, s.mean, s.rstd, _EPS,
            needs=(True, False, True, norm.bias is not None),
            out=(out, None, self._g[name + ".weight"], self._g.get(name + ".bias")),
        )  # fmt: skip
        return out, dh

    # ------------------------------------------------------------------------------------------------ kernels and buffers

    def _bind(self) -> None:
        """Find each op's pair of kernels for the shapes of this step."""
        model, k = self.model, self.model.kernels
        B, T, C, V = self.B, self.T, self.C, self.V
        like: dict[str, Any] = {"dtype": model.token.dtype, "device": model.token.device}

        backends: set[str] = set()

        def pair(op: str, *args: Any, **kwargs: Any) -> Pair:
            found: Pair | None = getattr(k, op).pair(*args, **kwargs)
            if found is None:
                raise NotServed(f"{op} is on {getattr(k, op).choose(*args, grad=True, **kwargs).backend}, which leaves the "
                                "backward to autograd")  # fmt: skip
            backends.add(found.backend)
            return found

        x, wide = torch.empty(B * T, C, **like), torch.empty(B * T, 4 * C, **like)
        index = torch.zeros(B, T, dtype=torch.int64, device=x.device)
        norm = self.norm
        self._layer_norm = pair("layer_norm", x, norm.weight, norm.bias)
        self._add_layer_norm = pair("add_layer_norm", x, x, norm.weight, norm.bias)
        options = {"dropout_p": self.dropout, "seed": index[0, :1]} if self.dropout else {}
        qkv = torch.empty(B, T, self.heads + 2 * self.kv_heads, self.D, **like)
        self._attention = pair("attention_qkv", qkv, self.heads, self.kv_heads, causal=True, **options)
        ff = self.layers[0].feed_forward
        self._gelu = pair("gelu", wide, ff.up.bias, approximate=model.config.gelu)
        self._embedding = pair("embedding", index, model.token, model.position)
        self.keeps_logits = B * T * V <= _LOGITS_KEPT
        targets = index.view(-1)
        if self.keeps_logits:
            logits = torch.empty(B * T, V, **like)
            self._cross_entropy = pair("cross_entropy", logits, targets, vocab=model.padded_from)
        else:
            self._linear_cross_entropy = pair("linear_cross_entropy", x, model.token, targets, vocab=model.padded_from)
        self.products = k.products(x)
        self._recordable = backends == {self.products.backend}

    def _allocate(self) -> None:
        B, T, R, C, H = self.B, self.T, self.R, self.C, self.heads
        token = self.model.token
        at_least_fp32 = torch.promote_types(token.dtype, torch.float32)

        def empty(*shape: int, dtype: torch.dtype = token.dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=token.device)

        def saved() -> Saved:
            return Saved(empty(R, C), empty(R, C), empty(R, dtype=at_least_fp32), empty(R, dtype=at_least_fp32))

        def masks() -> tuple[Tensor, Tensor] | None:
            return (empty(R, C), empty(R, C)) if self.dropout else None

        E = H + 2 * self.kv_heads
        self.blocks = [
            Activations(saved(), empty(B, T, E, self.D), None, empty(B, T, H, self.D), empty(B, H, T, dtype=at_least_fp32),
                        saved(), empty(R, 4 * C), empty(R, 4 * C), masks())
            for _ in self.layers
        ]  # fmt: skip
        self.final = saved()
        self.embedding_mask = empty(R, C) if self.dropout else None
        self.logits = empty(R, self.V) if self.keeps_logits else None
        self.tokens, self.targets = (torch.zeros(B, T, dtype=torch.int64, device=token.device) for _ in range(2))
        self.loss, self.lse = empty(dtype=at_least_fp32), empty(R, dtype=at_least_fp32)
        self.one = torch.ones((), dtype=at_least_fp32, device=token.device)
        # Gradients of one block at a time.
        self.branch, self.narrow, self.zero = empty(R, C), empty(R, C), empty(R, C).zero_()
        self.stream = empty(R, C), empty(R, C)
        self.wide, self.dqkv = empty(R, 4 * C), empty(B, T, E, self.D)
        self.dtoken = empty(*token.shape)
