import types

import pytest
import torch

from experiments.lib import benchmark_suites as timing

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch):
    """A clock that only the functions of `taking` advance."""
    clock = types.SimpleNamespace(now=0.0)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock.now)
    return clock


def taking(clock, seconds, order=None, name=None):
    """A function whose successive calls take the given seconds."""
    seconds = iter(seconds)

    def function():
        clock.now += next(seconds)
        if order is not None:
            order.append(name)

    return function


def test_functions_take_turns_after_a_warm_up(clock):
    order = []
    arms = {"a": taking(clock, [100, 1, 2, 9], order, "a"), "b": taking(clock, [50, 4, 4, 4], order, "b")}
    assert timing.interleaved(arms, 3, CPU) == {"a": 2, "b": 4}
    assert order == ["a", "b"] * 4


def test_short_functions_are_repeated_and_the_first_call_does_not_count(clock, monkeypatch):
    monkeypatch.setattr(timing, "MIN_TURN", 2**-9)
    monkeypatch.setattr(timing, "SHORT", 2**-6)
    order, cold = [], 2**-6 - 2**-12
    times = [4.0] + [cold] + [2**-12] * 8 + [cold] + [2**-12, 3 * 2**-12] * 2
    assert timing.interleaved({"a": taking(clock, times, order, "a")}, 2, CPU) == {"a": 1.5 * 2**-12}
    assert len(order) == len(times)
    times = [2**-6] * 2 + [2**-6 - 2**-12, 2**-7]
    assert timing.interleaved({"a": taking(clock, times)}, 2, CPU) == {"a": (2**-6 + 2**-7) / 2}
