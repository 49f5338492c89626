# %% [markdown]
# # What a head looks at
#
# A small decoder learns to write words backwards: after `badge=` it has to write `egdab`. The letters are drawn at random, so nothing
# can be guessed; the only way is to look at the right letter. Trained, its heads show where they look.

# %%
import math
import random
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from matplotlib.figure import Figure

from tinygpt import models
from tinygpt.checkpoint import Run
from tinygpt.generation import generate
from tinygpt.lessons import picture
from tinygpt.models.block import Block
from tinygpt.models.gpt import GPT
from tinygpt.training.trainer import train
from tinygpt_kernels import ops

STEPS, LETTERS, LENGTH = 300, "abcdefgh", 5
torch.set_num_threads(1)  # for models this small a second thread is little help, and where others work a great loss
torch.manual_seed(0)
draw = random.Random(0)


# %%
def line() -> str:
    """A word, and the word backwards."""
    word = "".join(draw.choice(LETTERS) for _ in range(LENGTH))
    return f"{word}={word[::-1]}\n"


# %% [markdown]
# The run is one that `tinygpt train --model minilm --data words.txt --tokenizer char` makes with these settings: a row is a line, two
# blocks of two heads, 300 steps.

# %%
with TemporaryDirectory() as folder:
    words = Path(folder) / "words.txt"
    words.write_text("".join(line() for _ in range(8000)))
    settings = {
        "data.sources": words, "data.tokenizer": "char", "model.layers": 2, "model.heads": 2, "model.width": 64,
        "model.block_size": 2 * LENGTH + 2, "model.norm": "pre", "model.dropout": 0, "optim.lr": 3e-3, "optim.warmup": 30,
        "training.batch_size": 64, "training.steps": STEPS, "training.eval_every": 50, "device": "cpu",
    }  # fmt: skip
    config = models.configure(models.kind("minilm").defaults, [f"{key}={value}" for key, value in settings.items()])
    result = train(config, Path(folder) / "run")
    run = Run.open(result.path)
    model, tokenizer = models.load(run), run.tokenizer
    losses = [(entry["step"], entry["val_loss"]) for entry in run.metrics() if "val_loss" in entry]
assert isinstance(model, GPT)

# %% [markdown]
# Five letters of twelve tokens are random, log 8 nats each. No model can do better than that; one that reverses can do as well.

# %%
least = LENGTH * math.log(len(LETTERS)) / (2 * LENGTH + 2)
print(
    "step: loss   " + ", ".join(f"{step}: {loss:.3f}" for step, loss in losses) + f"   the least there is: {least:.3f}"
)
prompt = [int(i) for i in tokenizer.encode("\nbadge=")]
written = tokenizer.decode(list(generate(model, prompt, count=LENGTH, temperature=0)))
print(f"badge= {written}")
assert losses[-1][1] < least + 0.03
assert written == "egdab"

# %% [markdown]
# Kernels never hold the attention weights: they are used up block by block. To see them they are computed again from q and k, which a
# hook catches where the model computes them: softmax(q kᵀ / √d), with the future struck out.

# %%
caught: list[torch.Tensor] = []
for block in model.blocks:
    assert isinstance(block, Block)
    block.attention.qkv.register_forward_hook(lambda layer, inputs, output: caught.append(output))
text = "\nbadge=egdab"
T, H, D = len(text), config.model.heads, config.model.head_dim
with torch.no_grad():
    model(torch.tensor(tokenizer.encode(text))[None])

maps = []  # of each block [H, T, T]
for qkv in caught:
    q, k, v = qkv.view(1, T, 3 * H, D).split(H, dim=2)
    scores = torch.einsum("bthd,bshd->bhts", q, k) / math.sqrt(D)
    weights = scores.masked_fill(torch.ones(T, T).triu(1) == 1, -torch.inf).softmax(-1)
    mine = torch.einsum("bhts,bshd->bthd", weights, v)
    assert torch.allclose(mine, ops.attention(q, k, v, causal=True), atol=1e-5)
    assert torch.allclose(weights.sum(-1), torch.ones(1, H, T))
    maps.append(weights[0])

# %% [markdown]
# To write a letter of `egdab` the model stands on the token before it, and should look at that letter in `badge`. Some head gives
# these places most of its weight: its map shows a line that runs backwards.

# %%
places = [(LENGTH + 1 + i, LENGTH - i) for i in range(LENGTH)]  # (stands here, must look there)
on_mirror = {
    (layer + 1, head + 1): sum(maps[layer][head, t, s].item() for t, s in places) / LENGTH
    for layer in range(len(maps))
    for head in range(H)
}
for (layer, head), share in on_mirror.items():
    print(f"block {layer}, head {head}: {100 * share:.0f} % of its weight on the letter to write")
chance = sum(1 / (t + 1) for t, _ in places) / LENGTH
print(f"a plain mean of the past: {100 * chance:.0f} %")
assert max(on_mirror.values()) > 4 * chance

# %%
figure = Figure(figsize=(12, 3.6), dpi=130, layout="constrained")
shown = [repr(c)[1:-1] for c in text]
for axes, (layer, head) in zip(figure.subplots(1, len(on_mirror)), on_mirror, strict=True):
    axes.imshow(maps[layer - 1][head - 1].numpy(), cmap="Blues", vmin=0, vmax=1)
    axes.plot([s for _, s in places], [t for t, _ in places], "s", markersize=14, fillstyle="none", color="#d9a441")
    axes.set_xticks(range(T), shown)
    axes.set_yticks(range(T), shown)
    axes.set_title(f"block {layer}, head {head}: {100 * on_mirror[layer, head]:.0f} % in the squares", fontsize=9)
    axes.set_xlabel("looks at")
figure.axes[0].set_ylabel("stands on")
picture(figure, "attention")
