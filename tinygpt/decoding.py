"""From a source sequence to a target sequence: greedy and beam search over an encoder-decoder.

# B batch, K beams, S source tokens, T target tokens, V vocabulary
"""

from __future__ import annotations

import torch
from torch import Tensor

from .models.transformer import Transformer

PENALTY = 0.6
"""Length penalty of Vaswani et al. 2017, section 6.1."""


@torch.inference_mode()
def search(
    model: Transformer, source_BS: Tensor, lengths_B: Tensor, *, start: int, end: int, beams: int = 1,
    penalty: float = PENALTY,
) -> list[tuple[list[int], float]]:  # fmt: skip
    """The likeliest target of each source that was found, without its end token, and its log-probability with it.

    Beam search keeps the K best beginnings, by log P / ((5 + length) / 6)^penalty (Wu et al. 2016, eq. 14), until all of them
    have ended or fill the context. One beam is greedy decoding, whatever the penalty.

    Args:
        source_BS, lengths_B: as in `Transformer.forward`.
        start, end: ids of those tokens; start is never written.
        beams: K, at least 1.
    """
    was_training = model.training
    model.eval()
    B, K, limit = len(source_BS), beams, model.config.block_size
    lengths_R = lengths_B.repeat_interleave(K)
    memory_RSC = model.encode(source_BS, lengths_B).repeat_interleave(K, dim=0)
    tokens_BKT = torch.full((B, K, 1), start, device=source_BS.device)
    # All beams begin alike: only the first may be continued, or they would stay alike.
    scores_BK = torch.full((B, K), -torch.inf, device=source_BS.device)
    scores_BK[:, 0] = 0
    ended_BK = torch.zeros(B, K, dtype=torch.bool, device=source_BS.device)
    written_BK = torch.zeros(B, K, dtype=torch.int64, device=source_BS.device)
    for _ in range(limit):
        hidden = model.decode(tokens_BKT.flatten(0, 1), memory_RSC, lengths_R)[:, -1]
        logits = model.logits(hidden).float()
        logits[:, start] = -torch.inf
        steps_BKV = torch.log_softmax(logits, dim=-1).view(B, K, -1)
        # What has ended goes on as it is: one more end token, for nothing.
        steps_BKV = steps_BKV.masked_fill(ended_BK[..., None], -torch.inf)
        steps_BKV[..., end] = steps_BKV[..., end].masked_fill(ended_BK, 0.0)
        totals_BKV = scores_BK[..., None] + steps_BKV
        lengths_BK = written_BK + ~ended_BK
        ranks = totals_BKV / (((5 + lengths_BK) / 6) ** penalty)[..., None]
        best_BK = ranks.flatten(1).topk(K, dim=1).indices
        beam_BK, token_BK = best_BK // totals_BKV.shape[-1], best_BK % totals_BKV.shape[-1]
        scores_BK = totals_BKV.flatten(1).gather(1, best_BK)
        written_BK = lengths_BK.gather(1, beam_BK)
        ended_BK = ended_BK.gather(1, beam_BK) | (token_BK == end)
        past = tokens_BKT.gather(1, beam_BK[..., None].expand(-1, -1, tokens_BKT.shape[-1]))
        tokens_BKT = torch.cat([past, token_BK[..., None]], dim=-1)
        if ended_BK.all():
            break
    model.train(was_training)
    # topk sorts: the first beam is the best.
    found = []
    for row, score in zip(tokens_BKT[:, 0, 1:].tolist(), scores_BK[:, 0].tolist(), strict=True):
        found.append((row[: row.index(end)] if end in row else row, score))
    return found
