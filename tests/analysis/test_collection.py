"""Collected features: computed once, resumed after a kill, shared by processes, refused when they cannot be stored."""

import json

import pytest
import torch

from repa.analysis import collection
from repa.analysis.collection import best, collect
from repa.base.errors import UserError

NUM = 50


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    monkeypatch.setattr(collection, "CHUNK", 16)


class Maker:
    """Row i of "twice" is 2 i, of "square" i * i; records its requests and may be killed."""

    def __init__(self, dies_at=None):
        self.asked, self.dies_at = [], dies_at

    def __call__(self, rows, fields):
        if rows.start == self.dies_at:
            raise KeyboardInterrupt
        self.asked.append((rows.start, rows.stop, tuple(fields)))
        i = torch.arange(rows.start, rows.stop)[:, None]
        return {field: {"twice": 2.0 * i, "square": i * i / 7}[field] for field in fields}


def test_rows_come_back_in_order_and_a_second_call_computes_none(tmp_path):
    first, second, seen = Maker(), Maker(), []
    load = collect(tmp_path, {"a": 1}, ["twice", "square"], NUM, first, progress=lambda *n: seen.append(n))
    assert first.asked == [(s, min(s + 16, NUM), ("twice", "square")) for s in (0, 16, 32, 48)]
    assert torch.equal(load("twice"), 2.0 * torch.arange(NUM)[:, None])
    assert seen == [(16, NUM), (32, NUM), (48, NUM), (50, NUM)]
    again = collect(tmp_path, {"a": 1}, ["square"], NUM, second)
    assert second.asked == []
    assert torch.allclose(again("square"), torch.arange(NUM)[:, None] ** 2 / 7)


def test_a_killed_collection_resumes(tmp_path):
    killed, rest = Maker(dies_at=32), Maker()
    with pytest.raises(KeyboardInterrupt):
        collect(tmp_path, {}, ["twice"], NUM, killed)
    load = collect(tmp_path, {}, ["twice"], NUM, rest)
    assert [start for start, *_ in rest.asked] == [32, 48]
    assert torch.equal(load("twice"), 2.0 * torch.arange(NUM)[:, None])
    assert not list(tmp_path.rglob("*.tmp"))


def test_only_the_missing_field_of_a_chunk_is_computed(tmp_path):
    collect(tmp_path, {}, ["twice"], NUM, Maker())
    more = Maker()
    collect(tmp_path, {}, ["twice", "square"], NUM, more)
    assert {fields for *_, fields in more.asked} == {("square",)}


def test_other_facts_use_another_folder_that_records_them(tmp_path):
    for identity, num, store in [({"t": 0.5}, NUM, "float32"), ({"t": 0.6}, NUM, "float32"), ({"t": 0.5}, 20, "float32"),
                                 ({"t": 0.5}, NUM, "float16")]:  # fmt: skip
        maker = Maker()
        load = collect(tmp_path, identity, ["twice"], num, maker, store=store)
        assert maker.asked
        assert load("twice").dtype == getattr(torch, store)
    told = [json.loads(path.read_text()) for path in tmp_path.glob("*/identity.json")]
    assert {"t": 0.6, "num": NUM, "store": "float32"} in told
    assert len(told) == 4


def test_without_a_cache_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    load = collect(None, {}, ["square"], NUM, Maker())
    assert torch.allclose(load("square"), torch.arange(NUM)[:, None] ** 2 / 7)
    assert not list(tmp_path.iterdir())


def test_processes_share_the_chunks(tmp_path, monkeypatch):
    """Two processes, one after the other, compute every second chunk each and read all of them."""
    makers = [Maker(), Maker()]
    monkeypatch.setattr(collection.dist, "world", lambda: 2)
    for rank in (0, 1):
        monkeypatch.setattr(collection.dist, "rank", lambda rank=rank: rank)
        load = collect(tmp_path, {}, ["twice"], NUM, makers[rank])
    assert [[start for start, *_ in maker.asked] for maker in makers] == [[0, 32], [16, 48]]
    assert torch.equal(load("twice"), 2.0 * torch.arange(NUM)[:, None])


def test_values_that_cannot_be_stored_are_refused(tmp_path):
    def large(rows, fields):
        return {"x": torch.full((len(rows), 2), 1e5)}

    with pytest.raises(UserError, match="x has values outside the range of float16: use --store float32"):
        collect(tmp_path, {}, ["x"], NUM, large, store="float16")
    with pytest.raises(UserError, match="values outside the range of float32"):
        collect(tmp_path, {}, ["x"], NUM, lambda rows, fields: {"x": torch.full((len(rows), 2), torch.nan)})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collection.files.shutil, "disk_usage", lambda _: type("U", (), {"free": 100})())
        with pytest.raises(UserError, match="Keeping the features of 50 images needs"):
            collect(tmp_path, {"new": 1}, ["twice"], NUM, Maker())


@pytest.mark.parametrize("damage", [lambda data: data[:90], lambda data: data[:-1] + bytes([data[-1] ^ 1])])
def test_a_damaged_file_is_computed_again(damage, tmp_path):
    load = collect(tmp_path, {}, ["twice"], NUM, Maker())
    wanted = load("twice")
    (path,) = tmp_path.glob("*/twice-000000016-*.npy")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match="run the same command again"):
        load("twice")
    maker = Maker()
    assert torch.equal(collect(tmp_path, {}, ["twice"], NUM, maker)("twice"), wanted)


def test_best_chooses_the_best_learning_rate_per_block():
    rows = [
        {"run": "a", "step": 1, "t": 0.0, "depth": depth, "lr": lr, "top1": top1}
        for depth, lr, top1 in ((1, 0.1, 0.2), (1, 0.2, 0.4), (1, 0.3, 0.3), (2, 0.1, 0.9), (2, 0.2, 0.1))
    ]
    assert [(row["depth"], row["lr"]) for row in best(rows, "top1")] == [(1, 0.2), (2, 0.1)]
