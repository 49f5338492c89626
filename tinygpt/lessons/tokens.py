# %% [markdown]
# # Tokens and blocks
#
# A model reads numbers. A tokenizer cuts text into pieces and gives each an id; training cuts the ids into windows of a fixed
# length, its blocks. Every place of a window is an example of its own: from all tokens up to here, say the next one.

# %%
import numpy as np
import torch
from matplotlib.figure import Figure

from tinygpt.data import random_batch
from tinygpt.lessons import picture
from tinygpt.tokenizers import tokenizer_class

TEXT = "the cat sat on the mat, and the rat that sat on the cat ran.\n" * 20

# %% [markdown]
# The plainest tokenizer knows the characters of the text, sorted. Decoding gives the text back, always.

# %%
characters = tokenizer_class("char").train([TEXT])
ids = characters.encode(TEXT)
print(f"{characters.vocab_size} tokens: {''.join(characters.tokens())!r}")
print(f"{TEXT[:12]!r} becomes {ids[:12].tolist()}")
assert characters.decode(ids) == TEXT
assert len(ids) == len(TEXT)

# %% [markdown]
# A tokenizer that merges pairs of bytes which often stand together (BPE) has more tokens, and needs fewer of them for the same
# text. More text fits into a window; but the tables of the model grow, and each of their rows is trained less often.

# %%
pairs = tokenizer_class("bpe").train([TEXT], vocab_size=256 + 20)
merged = pairs.encode(TEXT)
print(f"char: {len(ids)} ids of {characters.vocab_size}; bpe with 20 merges: {len(merged)} ids of {pairs.vocab_size}")
assert pairs.decode(merged) == TEXT
assert len(merged) < len(ids) / 2

# %% [markdown]
# A batch is some windows from random places. The targets are the same windows one token later.

# %%
BATCH, BLOCK = 4, 8
x_BT, y_BT = random_batch(ids, BATCH, BLOCK, seed=1, step=0)
print(f"inputs {tuple(x_BT.shape)}, targets {tuple(y_BT.shape)}")
assert torch.equal(x_BT[:, 1:], y_BT[:, :-1])
for row, targets in zip(x_BT, y_BT, strict=True):
    window = [*row.tolist(), targets[-1].item()]
    assert characters.decode(window) in TEXT

# %% [markdown]
# One window of 8 holds 8 examples, with contexts of 1 to 8 tokens. So a model learns to go on from short beginnings too.

# %%
for t in range(BLOCK):
    context, target = characters.decode(x_BT[0, : t + 1].numpy()), characters.decode(y_BT[0, t : t + 1].numpy())
    print(f"{context!r:>12} -> {target!r}")

# %% [markdown]
# The windows of a step depend on the seed and the step alone: whoever asks for step 0 again gets the same ones.

# %%
again, _ = random_batch(ids, BATCH, BLOCK, seed=1, step=0)
later, _ = random_batch(ids, BATCH, BLOCK, seed=1, step=1)
assert torch.equal(again, x_BT)
assert not torch.equal(later, x_BT)

# %%
figure = Figure(figsize=(9, 2.8), dpi=130, layout="constrained")
for axes, (title, rows) in zip(
    figure.subplots(1, 2), {"inputs": x_BT, "targets: one token later": y_BT}.items(), strict=True
):
    axes.imshow(rows.numpy(), cmap="tab20", alpha=0.35, vmin=0, vmax=characters.vocab_size)
    for (b, t), token in np.ndenumerate(rows.numpy()):
        axes.text(t, b, repr(characters.decode([token]))[1:-1].replace(" ", "␣"), ha="center", va="center", fontsize=13)
        axes.text(t + 0.42, b + 0.42, str(token), ha="right", va="bottom", fontsize=7, color="#555555")
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("place in the window")
    axes.set_yticks(range(BATCH), [f"row {b}" for b in range(BATCH)])
picture(figure, "tokens")
