"""A folder of features: what is read is what was written, it never grows beyond its limit, and nothing that happens to
it stops a run."""

from __future__ import annotations

import multiprocessing
import os
import time
from pathlib import Path

import numpy as np
import pytest

from molmo2_nemo.features import store as module
from molmo2_nemo.features.store import HEADER, Damaged, FeatureStore, key_of

SIZE = 1000
ENTRY = HEADER.size + SIZE


def opened(folder: Path, fingerprint: str = "a" * 64, limit: int = 10**9, free: int = 0, processes: int = 1):
    return FeatureStore(folder, fingerprint, SIZE, limit=limit, keep_free=free, processes=processes)


def entry(number: int) -> tuple[bytes, np.ndarray]:
    rng = np.random.default_rng(number)
    return key_of(rng.integers(0, 256, (3, 5), np.uint8)), rng.integers(0, 256, SIZE, np.uint8)


def on_disk(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_what_is_read_is_what_was_written(tmp_path):
    store = opened(tmp_path)
    key, features = entry(1)
    into = np.zeros(SIZE, np.uint8)
    assert not store.read(key, into) and not store.has(key)
    assert store.write(key, features) == ENTRY == on_disk(tmp_path)
    assert store.write(key, features) == 0  # it is there
    assert opened(tmp_path).read(key, into) and np.array_equal(into, features)
    assert not opened(tmp_path, "b" * 64).has(key)  # another encoder
    assert store.used() == (ENTRY, 0) and opened(tmp_path, "b" * 64).used() == (ENTRY, ENTRY)


def test_a_key_is_of_every_byte(tmp_path):
    pixels = np.zeros((2, 4, 3), np.uint8)
    other = pixels.copy()
    other[1, 3, 2] = 1
    assert key_of(pixels[0]) == key_of(pixels[1]) == key_of(other[0]) != key_of(other[1])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[HEADER.size + 17] ^= 4
    path.write_bytes(content)


def cut(path: Path) -> None:
    os.truncate(path, ENTRY - 1)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def longer(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"x")


@pytest.mark.parametrize("damage", [flip, cut, empty, longer])
def test_a_damaged_entry_is_found_and_made_room_for(tmp_path, damage):
    store, (key, features) = opened(tmp_path), entry(1)
    store.write(key, features)
    damage(store.path(key))
    with pytest.raises(Damaged, match=str(store.path(key))):
        store.read(key, np.zeros(SIZE, np.uint8))
    assert not store.has(key) and store.write(key, features) == ENTRY


def test_an_entry_under_another_name_is_damaged(tmp_path):
    store, (one, features), (other, _) = opened(tmp_path), entry(1), entry(2)
    store.write(one, features)
    store.path(other).parent.mkdir(exist_ok=True)
    os.rename(store.path(one), store.path(other))
    with pytest.raises(Damaged):
        store.read(other, np.zeros(SIZE, np.uint8))


def fill(folder: Path, first: int, limit: int, processes: int) -> str | None:
    store = opened(folder, limit=limit, processes=processes)
    for number in range(first, first + 60):
        store.write(*entry(number))
    return store.stopped


def test_it_never_grows_beyond_its_limit_with_other_encoders_counted(tmp_path):
    before = opened(tmp_path, "b" * 64)
    for number in range(5):
        before.write(*entry(number))
    assert "limit" in str(fill(tmp_path, 0, 20 * ENTRY + ENTRY // 2, 1))
    assert on_disk(tmp_path) == 20 * ENTRY


def test_several_processes_stay_below_it_together(tmp_path):
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        stopped = pool.starmap(fill, [(tmp_path, 100 * n, 50 * ENTRY, 3) for n in range(3)])
    assert all("limit" in str(why) for why in stopped)
    assert 50 - 3 < on_disk(tmp_path) // ENTRY <= 50


def test_it_leaves_room_on_the_disk(tmp_path):
    store = opened(tmp_path, free=10**18)
    assert store.write(*entry(1)) == 0 and "left free" in str(store.stopped)
    assert on_disk(tmp_path) == 0


def test_a_disk_that_cannot_be_written_ends_its_growth_alone(tmp_path):
    """A file where the folder should be; the same branch that a full disk takes (below)."""
    store = opened(tmp_path)
    store.write(*entry(1))
    second = entry(next(n for n in range(2, 99) if entry(n)[0][:1] != entry(1)[0][:1]))
    (store.own / second[0].hex()[:2]).write_text("in the way")
    assert store.write(*second) == 0 and str(store.own) in str(store.stopped)
    assert store.read(entry(1)[0], np.zeros(SIZE, np.uint8))  # what is there is read on
    assert store.write(*entry(3)) == 0


def write_with_a_limit_on_files(folder: Path) -> tuple[str | None, list[str]]:
    """The system refuses in the middle of an entry, as a full disk does."""
    import resource
    import signal

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (ENTRY // 2, ENTRY // 2))
    store = opened(folder)
    assert store.write(*entry(1)) == 0
    return store.stopped, [path.name for path in folder.rglob("*") if path.is_file() and path.name != module.COUNTED]


def test_an_entry_that_is_cut_off_while_written_leaves_nothing(tmp_path):
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        stopped, left = pool.apply(write_with_a_limit_on_files, (tmp_path,))
    assert stopped and not left


def test_what_a_killed_process_left_is_swept(tmp_path):
    store = opened(tmp_path)
    store.write(*entry(1))
    old, new = (store.path(entry(1)[0]).parent / f".x.{n}.part" for n in range(2))
    for path in (old, new):
        path.write_text("half")
    os.utime(old, (0, time.time() - 2 * module.ABANDONED))
    store.sweep()
    assert not old.exists() and new.exists() and store.has(entry(1)[0])
    assert store.used() == (ENTRY, 0)
