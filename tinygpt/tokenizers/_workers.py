"""Encoding in Python on all cores: processes that are sent text and answer with ids.

They are started as `python -m tinygpt.tokenizers._workers` and not by `multiprocessing`, which would run the caller's script a second
time where that does not guard against it, or fork a process whose libraries hold threads.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import IO, TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from ._base import Tokenizer

ALONE = 8 << 20
"""Characters that are encoded here before processes are started: that takes as long as encoding so much."""


def encode_in_processes(
    tokenizer: Tokenizer, pieces: Iterable[str], processes: int | None = None
) -> Iterator[tuple[str, NDArray[np.int64]]]:
    """Each piece with its ids (unknown="error"), in order. processes: None, as many as there are cores."""
    pieces = iter(pieces)
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count = processes or count
    alone = 0
    for piece in pieces:
        yield piece, tokenizer.encode(piece, unknown="error")
        alone += len(piece)
        if alone >= ALONE and count > 1 and sys.executable:
            break
    else:
        return
    workers: queue.SimpleQueue[subprocess.Popen[bytes]] = queue.SimpleQueue()
    description = json.dumps(tokenizer.to_json()).encode()
    started = [_start(description) for _ in range(count)]
    for worker in started:
        workers.put(worker)

    def encode(piece: str) -> NDArray[np.int64]:
        worker = workers.get()
        try:
            return _ask(worker, piece)
        except (OSError, EOFError):  # it died; what is wrong shows here
            return tokenizer.encode(piece, unknown="error")
        finally:
            workers.put(worker)

    waiting: deque[tuple[str, Future[NDArray[np.int64]]]] = deque()
    threads = ThreadPoolExecutor(count)
    try:
        for piece in pieces:
            waiting.append((piece, threads.submit(encode, piece)))
            if len(waiting) > 2 * count:
                first, ids = waiting.popleft()
                yield first, ids.result()
        for first, ids in waiting:
            yield first, ids.result()
    finally:
        threads.shutdown(cancel_futures=True)
        for worker in started:
            worker.kill()
            worker.communicate()


def _start(description: bytes) -> subprocess.Popen[bytes]:
    path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)
    worker = subprocess.Popen(
        [sys.executable, "-m", __name__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"},
    )  # fmt: skip
    assert worker.stdin is not None
    _send(worker.stdin, description)
    return worker


def _ask(worker: subprocess.Popen[bytes], piece: str) -> NDArray[np.int64]:
    assert worker.stdin is not None
    assert worker.stdout is not None
    _send(worker.stdin, piece.encode("utf-8", "surrogatepass"))
    return np.frombuffer(_receive(worker.stdout), np.uint32).astype(np.int64)


def _send(file: IO[bytes], message: bytes | memoryview) -> None:
    file.write(len(message).to_bytes(8, "little"))
    file.write(message)
    file.flush()


def _receive(file: IO[bytes]) -> bytes:
    """The next message. Raises EOFError where there is none."""
    size = int.from_bytes(head, "little") if len(head := file.read(8)) == 8 else -1
    message = file.read(size) if size >= 0 else b""
    if len(message) != size:
        raise EOFError
    return message


def _work(requests: IO[bytes], answers: IO[bytes]) -> None:
    from . import from_json

    try:
        tokenizer = from_json(json.loads(_receive(requests)))
        while True:
            text = _receive(requests).decode("utf-8", "surrogatepass")
            _send(answers, tokenizer.encode(text, unknown="error").astype(np.uint32).tobytes())
    except EOFError:  # no more is asked, or whoever asked was killed
        return


if __name__ == "__main__":
    _work(sys.stdin.buffer, sys.stdout.buffer)
