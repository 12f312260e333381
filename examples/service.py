"""Embed the engine in a service: one thread owns the sampler, any thread asks it for images.

python examples/service.py demo/digits.engine digits.png

Images of all callers share the network's batch. Each enters when a slot is free and leaves when it is finished.
"""

import queue
import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from engine import Sampler
from engine.images import grid, save_png, to_uint8


class Service:
    def __init__(self, bundle: str, capacity: int = 8) -> None:
        self._sampler, self._capacity = Sampler.open(bundle), capacity
        self._waiting: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work)
        self._thread.start()

    def image(self, label: int, seed: int, steps: int = 20) -> Future[Tensor]:
        """One image [C, H, W] in [-1, 1], as a future; a bad request raises RequestError here."""
        (request,) = self._sampler.requests(1, steps=steps, labels=label, seed=seed)
        future: Future[Tensor] = Future()
        self._waiting.put((request, future))
        return future

    def _work(self) -> None:
        futures = {}
        with self._sampler.slots(self._capacity) as slots:
            while True:
                while slots.free and (slots.is_empty or not self._waiting.empty()):
                    item = self._waiting.get()  # waits where there is nothing to do
                    if item is None:
                        return
                    slots.enter(slots.free[0], item[0])
                    futures[id(item[0])] = item[1]
                for step in slots.step():
                    if step.is_last:
                        futures.pop(id(step.request)).set_result(step.x_prev.clamp(-1, 1))

    def close(self) -> None:
        """Stop, once the images asked for are made."""
        self._waiting.put(None)
        self._thread.join()
        self._sampler.close()


def main(bundle: str, out: str, steps: int = 10) -> None:
    service = Service(bundle)
    with ThreadPoolExecutor(4) as callers:
        futures = list(callers.map(lambda i: service.image(label=i % 10, seed=i, steps=steps + i), range(20)))
    images = np.concatenate([to_uint8(future.result()[None]) for future in futures])
    service.close()
    save_png(Path(out), grid(images, columns=10))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
