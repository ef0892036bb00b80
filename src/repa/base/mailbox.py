"""Exchange of small objects between processes, and long waits, through the key-value store of the process group.

Collectives of tensors have a time-out of minutes, because a late process is a dead one. A wait for the main process, which
writes samples, may take longer. Objects and barriers therefore use the store: each process has one connection to it, and a
waiting process occupies no device.
"""

import pickle
from datetime import timedelta
from typing import TypeVar

import torch.distributed as td

from repa.base.errors import UserError

Value = TypeVar("Value")
PATIENCE = timedelta(hours=2)  # of processes that wait while another computes a reference or writes samples


class Mailbox:
    """Rounds of messages; all processes take part in the same order.

    Args:
        store: the store of the process group.
        rank, world: of this process.
        patience: the longest duration of a round.
    """

    def __init__(self, store: td.Store, rank: int, world: int, patience: timedelta = PATIENCE):
        self.origin, self.store = store, td.PrefixStore("mailbox", store)
        self.rank, self.world, self.patience = rank, world, patience
        self.round = 0

    def from_main(self, value: Value) -> Value:
        """The main process's (picklable) value, in every process. It waits until all have read it, because the store ends with it."""
        key = self._next()
        read, done = f"{key}/read", f"{key}/done"
        if self.rank == 0:
            self.store.set(key, pickle.dumps(value))  # type: ignore[arg-type]  # torch's stubs know texts alone
            self.store.wait([done], self.patience)
            for name in (key, read, done):
                self.store.delete_key(name)
            return value
        self.store.wait([key], self.patience)
        found = pickle.loads(self.store.get(key))  # trusted: written by a process of this run
        # A counter, so that the main process waits for one key instead of one per process.
        if self.store.add(read, 1) == self.world - 1:
            self.store.set(done, "")
        return found

    def gather(self, value: Value) -> list[Value]:
        """The values of all processes, in rank order, in every process. The main process collects them, which avoids world^2 reads."""
        key = self._next()
        values: list[Value] = []
        if self.rank == 0:
            keys = [f"{key}/{other}" for other in range(1, self.world)]
            self._wait_for(keys)
            values = [value, *(pickle.loads(self.store.get(other)) for other in keys)]
            for other in keys:
                self.store.delete_key(other)
        else:
            self.store.set(f"{key}/{self.rank}", pickle.dumps(value))  # type: ignore[arg-type]  # torch's stubs know texts alone
        return self.from_main(values)

    def _wait_for(self, keys: list[str]) -> None:
        try:
            self.store.wait(keys, self.patience)
        except RuntimeError as error:  # the store's time-out is one
            absent = [key.rpartition("/")[2] for key in keys if not self.store.check([key])]
            if not absent:
                raise
            minutes = self.patience.total_seconds() / 60
            raise UserError(
                f"Waited {minutes:g} minutes for processes {', '.join(absent[:8])}, which did not arrive: check whether their machines "
                "are alive, and start the same command again."
            ) from error

    def _next(self) -> str:
        self.round += 1
        return str(self.round)
