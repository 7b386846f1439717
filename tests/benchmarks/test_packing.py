"""benchmarks/packing.py: packs and their work per rank on a stream like the published mixture."""

from __future__ import annotations

from benchmarks.packing import measure


def test_spread_on_a_stream_like_the_mixture():
    """8 data-parallel ranks, 128 packs a step, packs as the packer makes them of an SFT-like stream."""
    found = measure("balanced", "SFT", 256, 48)
    assert found["spread_balanced"][2] <= 1.05 < found["spread_as_packed"][2] + 0.05
    assert found["efficiency"] > 0.97 and found["longest_wait"] <= 96
