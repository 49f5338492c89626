# %% [markdown]
# # Positions
#
# Attention is a mean, and a mean does not know the order of what it averages. So before the first layer every token is added to a
# vector that says where it stands.

# %%
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn

from tinygpt.config import ModelConfig
from tinygpt.lessons import picture
from tinygpt.models.block import sinusoids
from tinygpt.models.encoder import Encoder
from tinygpt_kernels import ops

torch.manual_seed(0)

# %% [markdown]
# **Without positions no order.** An encoder reads a text and the same text backwards. With its table of positions set to zero it
# cannot tell them apart; with the table it can.

# %%
encoder = Encoder(ModelConfig(layers=2, heads=2, width=32, block_size=8), vocab_size=16, classes=2)
text, length = torch.tensor([[7, 2, 9, 4, 1, 12, 3, 5]]), torch.tensor([8])
with torch.no_grad():
    told = (encoder(text, length) - encoder(text.flip(1), length)).abs().max().item()
    encoder.position.zero_()
    untold = (encoder(text, length) - encoder(text.flip(1), length)).abs().max().item()
print(f"forwards against backwards: differ by {told:.1e} with positions, by {untold:.1e} without")
assert untold < 1e-6 < 1e-5 < told

# %% [markdown]
# **Sinusoids.** Each pair of channels is a hand of a clock: (sin, cos) of the position times a speed of its own, from fast to very
# slow. Turning all hands by the same number of steps is a rotation, whatever they showed. Hence the dot product of two positions
# depends on their distance alone, and it is largest at distance 0.

# %%
LENGTH, WIDTH = 64, 64
clock = sinusoids(LENGTH, WIDTH)
products = clock @ clock.T
for distance in range(LENGTH):
    diagonal = products.diagonal(distance)
    assert (diagonal - diagonal.mean()).abs().max() < 1e-3
    assert distance == 0 or diagonal.mean() < products[0, 0] - 0.5
print("dot products at distance 0, 1, 2, 4, 8:", [f"{products[0, d]:.1f}" for d in (0, 1, 2, 4, 8)])

# %% [markdown]
# **A learned table** begins as noise and becomes whatever the task asks for. Here one head is to repeat the token that stood three
# places before. The tokens are random, so only positions can tell where to look.

# %%
BACK, TOKENS, LEN, C = 3, 16, 24, 32
token, position = nn.Parameter(torch.randn(TOKENS, C)), nn.Parameter(0.1 * torch.randn(LEN, C))
wq, wk = (nn.Parameter(torch.randn(C, C) / C**0.5) for _ in range(2))
before = (position @ wq) @ (position @ wk).T / C**0.5
optimizer = torch.optim.Adam([token, position, wq, wk], lr=1e-2)
for step in range(401):
    ids = torch.randint(TOKENS, (32, LEN))
    x = token[ids] + position
    q, k, v = (y.unsqueeze(2) for y in (x @ wq, x @ wk, token[ids]))
    logits = ops.attention(q, k, v, causal=True)[:, BACK:, 0] @ token.T
    loss = F.cross_entropy(logits.flatten(0, 1), ids[:, :-BACK].flatten())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 100 == 0:
        print(f"step {step:3}  loss {loss.item():.3f}")

# %% [markdown]
# What a position's query says to every position's key is now a line, three places left of the diagonal.

# %%
with torch.no_grad():
    after = (position @ wq) @ (position @ wk).T / C**0.5
past = torch.ones(LEN, LEN).tril() == 1
looks = after.masked_fill(~past, -torch.inf).argmax(1)
right = (looks[BACK:] == torch.arange(LEN - BACK)).float().mean().item()
print(f"of {LEN - BACK} positions {100 * right:.0f} % look three back")
assert loss < 0.5
assert right > 0.9

# %%
figure = Figure(figsize=(11, 2.8), dpi=130, layout="constrained")
shown = {"sinusoids": clock, "their dot products": products, "learned: before training": before.detach(),
         "learned: looks three back": after.masked_fill(~past, torch.nan)}  # fmt: skip
labels = [("channel", "position"), ("position", "position"), ("key of position", "query of position"),
          ("key of position", "query of position")]  # fmt: skip
for axes, (title, table), (x_label, y_label) in zip(figure.subplots(1, 4), shown.items(), labels, strict=True):
    figure.colorbar(axes.imshow(table.numpy(), cmap="RdBu" if table is clock else "viridis"), ax=axes, shrink=0.6)
    axes.set_title(title, fontsize=9)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
picture(figure, "positions")
