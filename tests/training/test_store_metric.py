"""What was taken from object stores stands in every line of the log, and nothing of it where shards are in folders."""

from molmo2_nemo.data.objects import traffic
from molmo2_nemo.training.metrics import found
from molmo2_nemo.training.metrics.stores import ObjectStores


def test_what_was_taken_is_added_up_over_ranks(monkeypatch):
    metric = next(m for m in found() if isinstance(m, ObjectStores))
    step = None  # it looks at the process alone
    monkeypatch.setattr(traffic, "counts", traffic.Counter())
    monkeypatch.setattr("molmo2_nemo.training.metrics.stores.counts", traffic.counts)
    assert metric.figures(step, metric.summed(step), []) == {}
    traffic.add({"bytes": 5_000_000_000_000, "requests": 7})
    traffic.add({"requests": 1, "hits": 2})
    both = [2 * part for part in metric.summed(step)]  # of two ranks
    assert metric.figures(step, both, []) == {
        **{"store_bytes": 10_000_000_000_000, "store_requests": 16, "store_retries": 0},
        **{"store_hits": 4, "store_damaged": 0, "store_not_kept": 0},
    }
    assert set(metric.scalars(metric.figures(step, both, []))) == {f"store_{kind}" for kind in traffic.KINDS}


def test_a_process_hands_on_what_it_counted_once(monkeypatch):
    monkeypatch.setattr(traffic, "counts", traffic.Counter(hits=3))
    assert traffic.take() == {"hits": 3} and traffic.take() == {}
