# %% [markdown]
# # Why divide by √d
#
# Attention scores a key by its dot product with the query, divided by √d, where d is their length. Here is what happens when it
# is not.

# %%
import math

import torch
from matplotlib.figure import Figure

from tinygpt.lessons import picture

torch.manual_seed(0)
DIMENSIONS = [2**i for i in range(2, 11)]
QUERIES, KEYS = 1000, 32

# %% [markdown]
# A dot product of d independent products of variance 1 has variance d. So long vectors make large scores, and a softmax of large
# scores puts nearly all of its weight on one key, whichever happens to lead. How much is left to choose is its entropy: log 32
# nats for 32 equal weights, 0 when one has all.
#
# That would be a matter of taste, were it not for learning. The gradient of weight i with respect to score j is
# w_i (δ_ij - w_j): where a weight is near 0 or 1, it vanishes. What follows measures the norm of that matrix.

# %%
measured: dict[str, dict[str, list[float]]] = {
    name: {"spread": [], "largest": [], "entropy": [], "gradient": []} for name in ("q · k", "q · k / √d")
}
print(f"{'d':>5}  {'':12}", *(f"{what:>9}" for what in measured["q · k"]))
for d in DIMENSIONS:
    q, k = torch.randn(QUERIES, 1, d), torch.randn(QUERIES, KEYS, d)
    scores = (q * k).sum(-1)  # [QUERIES, KEYS]
    for name, scaled in (("q · k", scores), ("q · k / √d", scores / math.sqrt(d))):
        w = scaled.softmax(-1)
        jacobian = torch.diag_embed(w) - w[:, :, None] * w[:, None, :]
        found = {
            "spread": scaled.std(),
            "largest": w.amax(-1).mean(),
            "entropy": torch.special.entr(w).sum(-1).mean(),
            "gradient": jacobian.flatten(1).norm(dim=1).median(),
        }
        for what, number in found.items():
            measured[name][what].append(number.item())
        columns = (f"{number.item():9.3f}" for number in found.values())
        print(f"{d:5}  {name:12}", *columns)

# %% [markdown]
# The spread of the raw scores is √d, as promised. At d = 1024 the softmax has all but decided before anything is learned, and
# half of all queries pass hardly any gradient to their scores. Divided by √d nothing of this depends on d.

# %%
raw, scaled_by = measured["q · k"], measured["q · k / √d"]
for d, spread in zip(DIMENSIONS, raw["spread"], strict=True):
    assert abs(spread / math.sqrt(d) - 1) < 0.1
assert raw["largest"][-1] > 0.9
assert raw["entropy"][-1] < 0.3
assert raw["gradient"][-1] < 0.05 * scaled_by["gradient"][-1]
for what in ("spread", "largest", "entropy", "gradient"):
    assert max(scaled_by[what]) < 1.5 * min(scaled_by[what]), what

# %%
figure = Figure(figsize=(10, 3.4), dpi=130, layout="constrained")
titles = {"largest": "largest of 32 weights (mean)", "entropy": "entropy of the weights, nats (mean)",
          "gradient": "gradient to the scores, norm (median)"}  # fmt: skip
for axes, (what, title) in zip(figure.subplots(1, 3), titles.items(), strict=True):
    for (name, values), color in zip(measured.items(), ("#b3322b", "#3b6ea5"), strict=True):
        axes.plot(DIMENSIONS, values[what], "o-", color=color, markersize=4, label=name)
    axes.set_xscale("log", base=2)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("d, length of queries and keys")
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
figure.axes[0].legend(frameon=False)
picture(figure, "scaling")
