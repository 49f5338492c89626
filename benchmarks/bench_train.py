"""Does `tinygpt train` keep what its step gains? Whole runs, with data, logging, evaluation and checkpoints, beside a plain loop.

    python benchmarks/bench_train.py [--steps 1000] [--turns 3] [--data shakespeare]

Both train with the preset char-cpu on the same batches, log every 10 steps, and every 250 evaluate the same 20 batches and save;
tinygpt also draws its curve and writes a sample. Runs take turns, and so do the bare steps in between. Prints how many times faster
than the plain loop the run is, and the step by itself.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from bench_training_step import PLAIN, plain, tinygpt
from peers.plain_gpt import PlainGPT, plain_optimizer, plain_step

from tinygpt.config import RunConfig, override, preset
from tinygpt.data import prepare, random_batch
from tinygpt.data.batches import consecutive_batches
from tinygpt.data.corpus import Corpus
from tinygpt.optim import learning_rate
from tinygpt.training.trainer import train
from tinygpt_kernels import timing
from tinygpt_kernels.workloads import CHAR_CPU


def plain_run(config: RunConfig, corpus: Corpus, vocab: int, out: Path) -> None:
    """Training written the usual way."""
    m, t = config.model, config.training
    model = PlainGPT(vocab, m.layers, m.heads, m.width, m.block_size)
    optimizer = plain_optimizer(model, config.optim.lr)

    def evaluate(step: int) -> None:
        model.eval()
        with torch.no_grad():
            batches = consecutive_batches(corpus.validation, t.batch_size, m.block_size, count=t.eval_batches)
            loss = statistics.mean(model(x, y).item() for x, y in batches)
        model.train()
        log.write(json.dumps({"step": step, "val_loss": loss}) + "\n")
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, out / "checkpoint.pt")

    with (out / "log.jsonl").open("w") as log:
        evaluate(0)
        for step in range(1, t.steps + 1):
            x, y = random_batch(corpus.train, t.batch_size, m.block_size, seed=config.seed, step=step)
            loss = plain_step(model, optimizer, x, y, learning_rate(config.optim, step, t.steps)).item()
            if step % t.log_every == 0:
                log.write(json.dumps({"step": step, "loss": loss}) + "\n")
            if step % t.eval_every == 0:
                evaluate(step)


def main() -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--data", default="shakespeare")
    arguments = parser.parse_args()
    settings = [f"data.sources={arguments.data}", "device=cpu", "training.final_evaluation=false"]
    config, first = (override(preset("char-cpu"), [*settings, f"training.steps={n}"]) for n in (arguments.steps, 1))
    corpus, tokenizer = prepare(config.data.sources)
    steps = {PLAIN: plain(CHAR_CPU), "tinygpt": tinygpt(CHAR_CPU, "auto")}
    runs: dict[str, list[float]] = {name: [] for name in steps}
    bare: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(arguments.turns):
        for name, times in timing.interleaved(steps, rounds=25, seconds=0.1).items():
            bare[name] += times
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            plain_run(config, corpus, tokenizer.vocab_size, Path(folder))
            middle = time.perf_counter()
            train(first, Path(folder, "start"))  # what starting takes, which is not of the steps
            begun = time.perf_counter()
            train(config, Path(folder, "run"))
            end = time.perf_counter()
        runs[PLAIN].append(middle - start)
        runs["tinygpt"].append((end - begun) - (begun - middle))
        of_run, of_step = timing.ratio(runs[PLAIN], runs["tinygpt"]), timing.ratio(bare[PLAIN], bare["tinygpt"])
        per_step = {name: 1e3 * timing.median(times) / config.training.steps for name, times in runs.items()}
        print(
            f"run {per_step[PLAIN]:.1f} and {per_step['tinygpt']:.1f} ms a step: {of_run:.2f} times faster; the step alone "
            f"{of_step:.2f} times; kept {100 * of_run / of_step:.0f} %",
            flush=True,
        )


if __name__ == "__main__":
    main()
