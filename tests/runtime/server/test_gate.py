"""Turns: one thread computes, and each comes in its turn."""

from __future__ import annotations

import threading
import time

from trimkv_edge.runtime.server.gate import Turns


def test_one_at_a_time_and_round_and_round() -> None:
    turns, inside, most, order = Turns(), 0, 0, []
    ready = threading.Barrier(4)

    def work(name: int) -> None:
        nonlocal inside, most
        ready.wait()
        with turns:
            for _ in range(50):
                inside += 1
                most = max(most, inside)
                order.append(name)
                time.sleep(0.0005)
                inside -= 1
                turns.pass_on()

    threads = [threading.Thread(target=work, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert (most, len(order)) == (1, 200)
    # Once all are there, nobody has a second turn before everybody else had one.
    start = max(order.index(name) for name in range(4)) + 1
    end = min(len(order) - 1 - order[::-1].index(name) for name in range(4)) - 4
    assert end - start > 100
    for index in range(start, end):
        assert len(set(order[index : index + 4])) == 4, order[index : index + 4]


def test_a_turn_ends_with_an_error_too() -> None:
    turns = Turns()
    try:
        with turns:
            raise ValueError
    except ValueError:
        pass
    with turns:
        turns.pass_on()  # nobody waits
