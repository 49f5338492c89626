"""Run or resume a small training that kills itself, with SIGKILL, at the n-th passage of a chosen place.

python killed.py RUN CORPUS_FOLDER PLACE COUNT
"""

import os
import signal
import sys
from pathlib import Path

from small import small

from tinygpt import checkpoint
from tinygpt.training import trainer

PLACES = {
    "step": (trainer.Trainer, "train_step"),
    "weights": (checkpoint, "save_file"),
    "state": (checkpoint.torch, "save"),
    "sync": (checkpoint, "_sync"),
    "rename": (Path, "rename"),
    "prune": (checkpoint.Run, "_prune"),
    "log": (checkpoint.Run, "log"),
}


def arm(place: str, count: int) -> None:
    owner, name = PLACES[place]
    original, passed = getattr(owner, name), 0

    def armed(*args, **kwargs):
        nonlocal passed
        passed += 1
        if passed == count:
            if place == "log":  # in the middle of a line
                with (args[0].path / "metrics.jsonl").open("a") as file:
                    file.write('{"step": 9')
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(owner, name, armed)


if __name__ == "__main__":
    run, folder, steps, place, count = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4], int(sys.argv[5])
    if place != "never":
        arm(place, count)
    resume = (run / "config.json").exists()
    trainer.train(
        small(folder, "model.dropout=0.1", "training.accumulate=2", f"training.steps={steps}"), run, resume=resume
    )
