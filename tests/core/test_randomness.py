"""Named random streams."""

from __future__ import annotations

import torch
from torch import Generator

from lustral.core.randomness import child, fork, on_device


def draws(generator: Generator) -> list[float]:
    values: list[float] = torch.rand(4, generator=generator).tolist()
    return values


def test_equal_names_give_equal_streams_and_others_differ() -> None:
    assert draws(child(7, "poison", 3)) == draws(child(7, "poison", 3))
    streams = [
        child(7, "poison", 3),
        child(8, "poison", 3),
        child(7, "poison", 4),
        child(7, "poison"),
        child(7, "order", 3),
    ]
    seen = {tuple(draws(stream)) for stream in streams}
    assert len(seen) == len(streams)


def test_names_do_not_run_together() -> None:
    assert draws(child(7, "ab", "c")) != draws(child(7, "a", "bc"))
    assert draws(child(7, "1")) != draws(child(7, 1))


def test_a_stream_stays_the_same_between_versions() -> None:
    # victims on disk are made again from their seeds, so this number must never change
    assert child(0, "poison").initial_seed() == 4343532921674966093


def test_fork_takes_one_number_whatever_is_drawn_from_the_fork() -> None:
    one, other = child(1), child(1)
    draws(fork(one, "a"))
    torch.rand(1000, generator=fork(other, "a"))
    assert draws(one) == draws(other)


def test_forks_differ_by_name_and_by_turn() -> None:
    assert draws(fork(child(1), "a")) == draws(fork(child(1), "a"))
    assert draws(fork(child(1), "a")) != draws(fork(child(1), "b"))
    parent = child(1)
    assert draws(fork(parent, "a")) != draws(fork(parent, "a"))


def test_on_device_gives_a_stream_there_from_the_parent() -> None:
    stream = on_device(child(2), torch.device("cpu"))
    assert stream.device.type == "cpu"
    assert draws(stream) == draws(on_device(child(2), torch.device("cpu")))
    parent = child(2)
    assert draws(on_device(parent, torch.device("cpu"))) != draws(on_device(parent, torch.device("cpu")))


def test_global_streams_are_left_alone() -> None:
    before = torch.random.get_rng_state()
    fork(child(3), "x")
    on_device(child(3), torch.device("cpu"))
    assert torch.equal(before, torch.random.get_rng_state())
