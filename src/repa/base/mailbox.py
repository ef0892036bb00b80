"""Small values between processes through the store at which they met: for what is not a tensor, and for waits without a limit of minutes.

A collective of tensors that is late means a dead process, and its time-out is minutes. Waiting for the main process to write
samples is not one. So objects and barriers go through the key-value store, over one connection a process: nothing
connects every process with every other, and a process that sleeps in them holds no device.
"""

import pickle
from datetime import timedelta
from typing import TypeVar

import torch.distributed as td

from repa.base.errors import UserError

Value = TypeVar("Value")
PATIENCE = timedelta(hours=2)  # the others wait while one process measures a reference or writes samples


class Mailbox:
    """Rounds of messages, which all processes take in the same order.

    Args:
        store: at which the processes met.
        rank, world: of this process.
        patience: how long a round may take.
    """

    def __init__(self, store: td.Store, rank: int, world: int, patience: timedelta = PATIENCE):
        self.origin, self.store = store, td.PrefixStore("mailbox", store)
        self.rank, self.world, self.patience = rank, world, patience
        self.round = 0

    def from_main(self, value: Value) -> Value:
        """The main process's (picklable) value, in every process. It stays until all have it: the store may end with it."""
        key = self._next()
        read, done = f"{key}/read", f"{key}/done"
        if self.rank == 0:
            self.store.set(key, pickle.dumps(value))  # type: ignore[arg-type]  # torch's stubs know texts alone
            self.store.wait([done], self.patience)
            for name in (key, read, done):
                self.store.delete_key(name)
            return value
        self.store.wait([key], self.patience)
        found = pickle.loads(self.store.get(key))  # of a process of this run
        # Counted, so that the main process waits for one key and not for one of every process.
        if self.store.add(read, 1) == self.world - 1:
            self.store.set(done, "")
        return found

    def gather(self, value: Value) -> list[Value]:
        """The value of every process, in rank order, in every process: the main one collects them, so nobody reads world^2."""
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
        except RuntimeError as error:  # of which the store's time-out is one
            absent = [key.rpartition("/")[2] for key in keys if not self.store.check([key])]
            if not absent:
                raise
            minutes = self.patience.total_seconds() / 60
            raise UserError(
                f"Waited {minutes:g} minutes for processes {', '.join(absent[:8])}, which did not come: check whether their machines "
                "are alive, and start the same command again."
            ) from error

    def _next(self) -> str:
        self.round += 1
        return str(self.round)
