"""Messages through a store, with threads in place of processes: ordered, deleted after use, missing ranks named."""

import threading
from datetime import timedelta

import torch.distributed as td

from repa.base.errors import UserError
from repa.base.mailbox import Mailbox


def together(world, work, patience=timedelta(seconds=30)):
    """Results or exceptions of `work(mailbox, rank)` in `world` threads, and the store."""
    store, found = td.HashStore(), [None] * world

    def run(rank):
        try:
            found[rank] = work(Mailbox(store, rank, world, patience), rank)
        except Exception as error:
            found[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found, store


def test_values_reach_every_rank_in_order_in_every_round():
    def work(mailbox, rank):
        return [
            mailbox.from_main({"of": rank}), mailbox.gather((rank, "x" * rank)), mailbox.gather(None), mailbox.from_main([rank])
        ]  # fmt: skip

    found, _ = together(5, work)
    assert found == [[{"of": 0}, [(r, "x" * r) for r in range(5)], [None] * 5, [0]]] * 5


def test_nothing_stays_in_the_store():
    found, store = together(3, lambda mailbox, rank: [mailbox.gather(rank) for _ in range(10)])
    assert found == [[[0, 1, 2]] * 10] * 3
    assert store.num_keys() == 0


def test_a_missing_process_is_named():
    def work(mailbox, rank):
        return mailbox.gather(rank) if rank != 2 else "asleep"

    found, _ = together(3, work, timedelta(seconds=0.3))
    assert isinstance(found[0], UserError)
    assert "Waited 0.005 minutes for processes 2, which did not arrive" in str(found[0])
    assert isinstance(found[1], RuntimeError)  # the main process never answers
