"""Run as a script: builds a cache, stopping after a number of views rendered for it until it is killed."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch

from support.images import make_images
from support.tiny import TinyTransform, make_trainer, tiny_vit


class Stopping(TinyTransform):
    """Sleeps for ever at the given view of the build; what is rendered before is not counted. Hashes like ``TinyTransform(augment=True)`` thanks to ``transform_id``."""

    def __init__(self, stop_at: int, mark: Path) -> None:
        super().__init__(augment=True)
        self.stop_at, self.mark, self.seen = stop_at, mark, 0

    def __call__(self, batch):
        self.seen += any(Path("caches").glob("k*"))
        if self.seen == self.stop_at:
            self.mark.touch()
            time.sleep(600)
        return super().__call__(batch)


def main(stop_at: int, mark: str) -> None:
    torch.set_num_threads(1)  # as in the tests: bits depend on it
    trainer = make_trainer(
        tiny_vit(),
        make_images(50).with_transform(Stopping(stop_at, Path(mark))),
        schedule="0:2",
        cache={"num_views": 2, "transform_id": "tiny"},
        num_train_epochs=1,
    )
    trainer.train()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
