"""An amount that threads share. A module of its own, because it is logged with models (see `models.photo_model`)."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Condition


class Budget:
    """An amount that threads share, such as bytes of memory: each waits until its part is free.

    Args:
        total: the whole amount; no part may be larger.
    """

    def __init__(self, total: int) -> None:
        self._free, self._changed = total, Condition()

    @contextmanager
    def part(self, amount: int) -> Iterator[None]:
        """Wait until `amount` is free, and keep it while the block runs."""
        with self._changed:
            self._changed.wait_for(lambda: self._free >= amount)
            self._free -= amount
        try:
            yield
        finally:
            with self._changed:
                self._free += amount
                self._changed.notify_all()
