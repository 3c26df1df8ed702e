"""Choosing free ports, and saying who holds a taken one."""

import os
import random
import socket

import pytest

from tokenloom.cli import ports


@pytest.fixture
def listener():
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_a_port_with_a_listener_is_not_free(listener):
    assert not ports.is_free(listener)


def test_a_port_is_free_although_its_last_connections_linger():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        caller = socket.create_connection(("127.0.0.1", port))
        accepted, _ = server.accept()
        # The side that closes first is the one that lingers in TIME_WAIT.
        accepted.close()
        caller.close()
    assert ports.is_free(port)


def test_chosen_ports_differ_are_free_and_lie_below_those_of_outgoing_connections():
    chosen = ports.free_ports(50, random.Random(7))
    assert len(set(chosen)) == 50
    assert all(ports.FIRST_PORT <= port <= ports.LAST_PORT for port in chosen)
    assert all(ports.is_free(port) for port in chosen)


def test_a_port_named_as_taken_is_never_chosen():
    rng = random.Random(7)
    first = ports.free_ports(1, random.Random(7))
    assert ports.free_ports(1, rng, taken=first) != first


def test_too_many_ports_are_refused_in_one_line():
    with pytest.raises(OSError, match="free ports"):
        ports.free_ports(ports.TRIES_MAX + 1, random.Random(7))


def test_the_holder_of_a_port_is_named(listener):
    assert ports.holder(listener).endswith(f"(pid {os.getpid()})")


def test_nobody_is_named_for_a_free_port():
    (port,) = ports.free_ports(1, random.Random())
    assert ports.holder(port) == ""
