# %% [markdown]
# # Averaging the past, four ways
#
# A token should learn from those before it. The plainest way is the mean of the past, the token itself included. Four programs
# compute that mean; each is a small change of the one before, and the last is attention.

# %%
import torch
from matplotlib.figure import Figure

from tinygpt.lessons import picture
from tinygpt_kernels import ops

torch.manual_seed(0)
B, T, C = 2, 8, 16  # batch, tokens, channels
x_BTC = torch.randn(B, T, C)

# %% [markdown]
# **1. A loop.** For each token the mean of all up to it: what is meant, and slow.

# %%
loop_BTC = torch.empty_like(x_BTC)
for b in range(B):
    for t in range(T):
        loop_BTC[b, t] = x_BTC[b, : t + 1].mean(0)

# %% [markdown]
# **2. A triangular matrix.** Row t holds 1 / (t + 1) up to place t and 0 behind it. One matrix product takes all the means.

# %%
ones_TT = torch.ones(T, T).tril()
weights_TT = ones_TT / ones_TT.sum(1, keepdim=True)
matrix_BTC = weights_TT @ x_BTC

# %% [markdown]
# **3. The softmax of a mask.** The same weights, made in another way: scores of 0 for the past, -inf for the future. A softmax of
# equal scores is a mean; but now the scores may differ, and a token may prefer some of its past.

# %%
scores_TT = torch.zeros(T, T).masked_fill(ones_TT == 0, -torch.inf)
softmax_TT = scores_TT.softmax(1)
softmax_BTC = softmax_TT @ x_BTC

# %% [markdown]
# **4. Query, key, value.** Every token asks with a query; every token answers with a key; their dot product is the score, and what
# is averaged are values. With queries of zero all scores are 0: attention is the mean of the past until it learns better.

# %%
query, key, value = torch.zeros(C, C), torch.randn(C, C), torch.eye(C)
q, k, v = ((x_BTC @ matrix).view(B, T, 1, C) for matrix in (query, key, value))  # one head
attention_BTC = ops.attention(q, k, v, causal=True).view(B, T, C)

# %%
for name, mean_BTC in (("matrix", matrix_BTC), ("softmax", softmax_BTC), ("query-key-value", attention_BTC)):
    error = (mean_BTC - loop_BTC).abs().max().item()
    print(f"{name:>15} against the loop: largest difference {error:.1e}")
    assert error < 1e-6

# %% [markdown]
# With a query that is not zero the weights depend on what the tokens are. They still add up to 1, and still none looks ahead.

# %%
scores_TT = (x_BTC[0] @ torch.randn(C, C)) @ x_BTC[0].T / C**0.5
asked_TT = scores_TT.masked_fill(ones_TT == 0, -torch.inf).softmax(1)
assert torch.allclose(asked_TT.sum(1), torch.ones(T))
assert (asked_TT.triu(1) == 0).all()
assert not torch.allclose(asked_TT, softmax_TT, atol=0.05)

# %%
figure = Figure(figsize=(9.5, 3.6), dpi=130, layout="constrained")
shown = {"allowed: the past": ones_TT, "softmax of equal scores: a mean": softmax_TT, "query · key: a choice": asked_TT}
for axes, (title, matrix) in zip(figure.subplots(1, 3), shown.items(), strict=True):
    image = axes.imshow(matrix.numpy(), cmap="Blues", vmin=0, vmax=1)
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("token that is seen")
    axes.set_ylabel("token that looks")
figure.colorbar(image, ax=figure.axes, shrink=0.8, label="weight")
picture(figure, "averaging")
