# %% [markdown]
# # Who sees whom: masks
#
# Attention is the same everywhere; what differs from model to model is which scores are struck out before the softmax.
#
# - An **encoder** reads a text that is all there: every token sees every other.
# - A **decoder** writes: a token sees itself and those before it, for it must not see what it has to say. That is the causal mask.
# - **Padding** fills short rows of a batch up to one length, and must be seen by nobody.

# %%
import torch
from matplotlib.figure import Figure

from tinygpt.config import ModelConfig
from tinygpt.lessons import picture
from tinygpt.models.encoder import Encoder
from tinygpt.models.gpt import GPT
from tinygpt_kernels import ops
from tinygpt_kernels.ops import visible_keys

torch.manual_seed(0)
T, S, REAL = 6, 8, 5  # tokens that look, tokens that are seen in another text, real ones of those
cpu = torch.device("cpu")

# %% [markdown]
# `visible_keys` is what the kernels are held to. Four masks make all models here: the last one is a decoder which looks into what
# an encoder has read, as a translator does.

# %%
masks = {
    "encoder": visible_keys(T, T, False, None, cpu),
    "decoder: causal": visible_keys(T, T, True, None, cpu),
    "encoder, 2 of padding": visible_keys(T, T, False, torch.tensor([T - 2]), cpu),
    "cross-attention, 3 of padding": visible_keys(T, S, False, torch.tensor([REAL]), cpu),
}
counts = [int(mask.sum()) for mask in masks.values()]
print("pairs that see each other:", dict(zip(masks, counts, strict=True)))
assert counts == [T * T, T * (T + 1) // 2, T * (T - 2), T * REAL]

# %% [markdown]
# A mask says what cannot matter. Change the last token of a text, and look where the outputs of two models change.

# %%
config = ModelConfig(layers=2, heads=2, width=32, block_size=T)
tokens = torch.tensor([[3, 1, 4, 1, 5, 2]])
changed = tokens.clone()
changed[0, -1] = 6

decoder = GPT(config, vocab_size=8)
with torch.no_grad():
    moved = (decoder.hidden(tokens) - decoder.hidden(changed)).abs().amax(-1)[0]
print("decoder: change at each place", [f"{m:.2f}" for m in moved.tolist()])
assert (moved[:-1] == 0).all()
assert moved[-1] > 0

# %% [markdown]
# In the decoder only the last place notices. That is why it can be trained on all places at once, and why text already written
# need not be computed again. In an encoder's attention every place notices.

# %%
x = torch.randn(1, T, 2, 16)
other = x.clone()
other[0, -1] += 1
moved = (
    (ops.attention(x, x, x, causal=False) - ops.attention(other, other, other, causal=False)).abs().amax((-1, -2))[0]
)
print("encoder: change at each place", [f"{m:.2f}" for m in moved.tolist()])
assert (moved > 0).all()

# %% [markdown]
# And padding: the encoder below is told that 4 tokens are real. What stands behind them changes nothing. Without being told, it
# would take padding for text.

# %%
encoder = Encoder(config, vocab_size=8, classes=2)
four, six = torch.tensor([4]), torch.tensor([6])
with torch.no_grad():
    told, told_changed = encoder(tokens, four), encoder(changed, four)
    alone = encoder(tokens[:, :4], four)
    untold = encoder(tokens, six)
assert torch.equal(told, told_changed)
assert torch.allclose(told, alone, atol=1e-6)
assert not torch.allclose(told, untold, atol=1e-6)
print("padding that is masked changes nothing:", [round(x, 4) for x in told[0].tolist()], "with and without it")

# %%
figure = Figure(figsize=(11, 3.1), dpi=130, layout="constrained")
for axes, (title, mask) in zip(figure.subplots(1, 4, width_ratios=[T, T, T, S]), masks.items(), strict=True):
    seen = mask[0, 0]
    axes.imshow(seen.numpy(), cmap="Blues", vmin=0, vmax=1.4)
    axes.set_xticks([s - 0.5 for s in range(1, seen.shape[1])], minor=True)
    axes.set_yticks([t - 0.5 for t in range(1, T)], minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5)
    axes.tick_params(which="minor", length=0)
    axes.set_title(title, fontsize=9)
    axes.set_xlabel("token that is seen")
figure.axes[0].set_ylabel("token that looks")
picture(figure, "masks")
