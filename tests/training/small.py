"""A run small enough to be repeated many times."""

from pathlib import Path

from tinygpt.config import RunConfig, override, preset

TEXT = "the quick brown fox jumps over the lazy dog; pack my box with five dozen liquor jugs.\n" * 60


def corpus(folder: Path) -> Path:
    path = folder / "corpus.txt"
    if not path.exists():
        path.write_text(TEXT)
    return path


def small(folder: Path, *assignments: str, backend: str = "torch") -> RunConfig:
    return override(
        preset("char-cpu"),
        [
            f"data.sources={corpus(folder)}", "model.layers=2", "model.heads=2", "model.width=32", "model.block_size=16",
            "training.steps=20", "training.batch_size=4", "training.eval_every=5", "training.eval_batches=2",
            "training.checkpoint_every=5", "training.sample_every=0", "training.sample_tokens=10", "training.log_every=1",
            "optim.warmup=2", f"backend={backend}", "device=cpu", *assignments,
        ],
    )  # fmt: skip
