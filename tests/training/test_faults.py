"""Which steps the guard skips."""

from __future__ import annotations


def judge(figures: list[tuple[float, list[float]]], sigma: float) -> list[str | None]:
    """The guard's reasons, step by step; half-way its state goes through a checkpoint."""
    from molmo2_nemo.settings.run import FaultConfig
    from molmo2_nemo.training.faults import FaultGuard

    config = FaultConfig(spike_sigma=sigma, spike_window=8)
    guard, reasons = FaultGuard(config), []
    for number, (loss, norms) in enumerate(figures):
        if number == len(figures) // 2:
            state, guard = guard.state(), FaultGuard(config)
            guard.load(state)
        assert guard.skips(loss, norms) == (guard.reason is not None)
        reasons.append(guard.reason)
    return reasons


def test_spikes(workers):
    """Mean 2, deviation about 0.1 after eight steps. A spike does not count towards either; below is never one."""
    calm = [(2.0 + 0.1 * (-1) ** n, [1.0, 1.0 + 0.01 * n, 1.0]) for n in range(8)]
    then = [(2.5, [1.0] * 3), (2.2, [1.0] * 3), (0.1, [1.0] * 3), (2.0, [1.0, 50.0, 1.0]), (float("inf"), [1.0] * 3)]
    reasons = workers.run(judge, calm + then, 4.0)[0]
    assert reasons[:8] == [None] * 8 and reasons[9:11] == [None, None]
    assert reasons[8].startswith("loss 2.5 is 4.7 deviations above its mean 2")
    assert reasons[11].startswith("gradient norm of connector 50") and reasons[12] == "loss is not finite"
    early = workers.run(judge, [(1.0, [1.0] * 3), (9.0, [1.0] * 3)], 1.0)[0]
    assert early == [None, None]  # too few steps to say what is usual
