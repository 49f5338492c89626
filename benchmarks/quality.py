"""Does tinygpt learn as well as a plain PyTorch GPT? Same corpus, hyperparameters and estimate of the loss, several seeds.

    python benchmarks/quality.py [--seeds 3] [--steps 2000] [--data shakespeare]

Trains both with the char-cpu preset and prints their validation losses (200 batches of random windows, the same for both).
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from peers.plain_gpt import PlainGPT, plain_optimizer, plain_step

from tinygpt.config import override, preset
from tinygpt.data import prepare, random_batch, random_batches
from tinygpt.models.gpt import GPT
from tinygpt.optim import learning_rate
from tinygpt.training.display import Display
from tinygpt.training.trainer import Trainer


@torch.no_grad()
def estimate(model: torch.nn.Module, tokens, config) -> float:
    """Mean loss over the estimate's random windows."""
    model.eval()
    batches = random_batches(tokens, 200, config.training.batch_size, config.model.block_size, seed=7)
    losses = [model(x, y).item() for x, y in batches]
    return statistics.mean(losses)


def train_plain(config, corpus, vocab: int) -> tuple[float, float]:
    """(loss, seconds per step) of the plain model."""
    torch.manual_seed(config.seed)
    m, t = config.model, config.training
    model = PlainGPT(vocab, m.layers, m.heads, m.width, m.block_size)
    optimizer = plain_optimizer(model, config.optim.lr)
    start = time.perf_counter()
    for step in range(t.steps):
        x, y = random_batch(corpus.train, t.batch_size, m.block_size, seed=config.seed, step=step)
        plain_step(model, optimizer, x, y, learning_rate(config.optim, step, t.steps)).item()
    return estimate(model, corpus.validation, config), (time.perf_counter() - start) / t.steps


def train_ours(config) -> tuple[float, float]:
    """(loss, seconds per step) of tinygpt."""
    trainer = Trainer(config, Display(), None)
    assert isinstance(trainer.model, GPT)
    start = time.perf_counter()
    while trainer.step < config.training.steps:
        trainer.train_step(learning_rate(config.optim, trainer.step, config.training.steps))
        trainer.step += 1
    seconds = (time.perf_counter() - start) / config.training.steps
    return estimate(trainer.model, trainer.corpus.validation, config), seconds


def main() -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--data", default="shakespeare")
    arguments = parser.parse_args()
    results: dict[str, list[tuple[float, float]]] = {"plain": [], "tinygpt": []}
    for seed in range(1, arguments.seeds + 1):
        config = override(preset("char-cpu"), [f"seed={seed}", f"training.steps={arguments.steps}",
                                               f"data.sources={arguments.data}", "device=cpu"])  # fmt: skip
        corpus, tokenizer = prepare(config.data.sources)
        results["plain"].append(train_plain(config, corpus, tokenizer.vocab_size))
        results["tinygpt"].append(train_ours(config))
        for name, found in results.items():
            print(f"seed {seed}  {name:<8} loss {found[-1][0]:.4f}  {1e3 * found[-1][1]:.1f} ms a step", flush=True)
    means = {name: statistics.mean(loss for loss, _ in found) for name, found in results.items()}
    spread = {name: statistics.pstdev(loss for loss, _ in found) for name, found in results.items()}
    for name, mean in means.items():
        print(f"{name:<8} mean loss {mean:.4f} (spread {spread[name]:.4f} over {arguments.seeds} seeds)")
    print(f"difference {means['tinygpt'] - means['plain']:+.4f}")


if __name__ == "__main__":
    main()
