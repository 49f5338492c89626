# %% [markdown]
# # Norm before, or after
#
# A block adds two branches to a stream: attention, and a feed-forward layer. A norm keeps the numbers in range, and can stand in two
# places:
#
# - **post**: x becomes norm(x + f(x)), as in the first transformers. Every norm is on the way of the stream itself.
# - **pre**: x becomes x + f(norm(x)), as in GPT-2. The stream is only ever added to, from the first layer to the last.
#
# Before anything is trained, the two send different gradients to their layers. That is measured here by depth.

# %%
from typing import Literal

import torch
from matplotlib.figure import Figure
from torch import nn

from tinygpt.config import ModelConfig
from tinygpt.lessons import picture
from tinygpt.models.gpt import GPT

torch.manual_seed(0)
DEPTHS, WIDTH, BLOCK, VOCABULARY, SEEDS = (4, 8, 16), 64, 16, 50, 3
tokens, probe = torch.randint(VOCABULARY, (4, BLOCK)), torch.randn(4, BLOCK, WIDTH) / BLOCK

# %% [markdown]
# The same weights for both (Glorot's), the same tokens, and in place of a loss the outputs weighted at random; one backward pass, no
# optimizer. Of each block are kept the spread of the stream that leaves it, and the norm of the gradient of its feed-forward
# layer's last matrix.


# %%
def by_depth(norm: Literal["pre", "post"], layers: int, seed: int) -> torch.Tensor:
    """(spread of the stream, gradient norm) of each block at initialisation, [2, layers]."""
    model = GPT(ModelConfig(layers=layers, heads=4, width=WIDTH, block_size=BLOCK, norm=norm), VOCABULARY)
    draw = torch.Generator().manual_seed(seed)
    for parameter in model.blocks.parameters():
        if parameter.dim() == 2:
            nn.init.xavier_uniform_(parameter, generator=draw)
    nn.init.normal_(model.token, generator=draw)
    spreads: list[torch.Tensor] = []

    def keep(block: nn.Module, inputs: object, output: tuple[torch.Tensor, torch.Tensor | None]) -> None:
        stream, branch = output  # pre-norm leaves the addition of its last branch to the next block
        spreads.append((stream if branch is None else stream + branch).detach().std())

    for block in model.blocks:
        block.register_forward_hook(keep)
    (model.hidden(tokens) * probe).sum().backward()
    named = dict(model.named_parameters())
    gradients = [named[f"blocks.{layer}.feed_forward.down.weight"].grad for layer in range(layers)]
    return torch.stack([torch.stack(spreads), torch.stack([g.norm() for g in gradients if g is not None])])


# %%
NORMS: tuple[Literal["post", "pre"], ...] = ("post", "pre")
found = {
    (norm, layers): torch.stack([by_depth(norm, layers, seed) for seed in range(SEEDS)]).mean(0)
    for norm in NORMS
    for layers in DEPTHS
}
print("gradient of the last block, by the number of blocks")
for norm in NORMS:
    print(f"{norm:>5}", *(f"{layers:4}: {found[norm, layers][1, -1]:.3f}" for layers in DEPTHS))

# %% [markdown]
# With **post** each block leaves a stream of spread 1, and the last block's gradient is as large in a deep model as in a shallow one.
# The step that suits a small model is then too large for all the blocks of a deep one together: such models are started with a
# warm-up, a learning rate that begins near zero.
#
# With **pre** the stream grows, for every block adds to it and nothing brings it back. The norm before each branch divides by that
# spread; so later blocks move the output less, and the more blocks there are, the smaller the gradient of the last one (Xiong et al.
# 2020 derive both, in expectation: independent of the depth L, and as 1 / √L).

# %%
shallow, deep = DEPTHS[0], DEPTHS[-1]
for layers in DEPTHS:
    assert (found["post", layers][0] - 1).abs().max() < 0.05
    assert (found["pre", layers][0].diff() > 0).all()
kept = {norm: (found[norm, deep][1, -1] / found[norm, shallow][1, -1]).item() for norm in NORMS}
print(
    f"from {shallow} to {deep} blocks the last gradient keeps {kept['post']:.2f} of itself with post, {kept['pre']:.2f} with pre"
)
assert kept["post"] > 0.8
assert kept["pre"] < 0.7

# %%
figure = Figure(figsize=(9.5, 3.6), dpi=130, layout="constrained")
for axes, row, title in zip(
    figure.subplots(1, 2), (1, 0), ("gradient norm of a block", "spread of the stream behind it"), strict=True
):
    for norm, color in zip(NORMS, ("#b3322b", "#3b6ea5"), strict=True):
        for layers, style in zip(DEPTHS, (":", "--", "-"), strict=True):
            axes.plot(range(1, layers + 1), found[norm, layers][row].numpy(), style, marker="o", markersize=3, color=color,
                      label=f"{norm}, {layers} blocks")  # fmt: skip
    axes.set_ylim(bottom=0)
    axes.set_xlabel("block")
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
figure.axes[1].legend(frameon=False, fontsize=8)
picture(figure, "norms")
