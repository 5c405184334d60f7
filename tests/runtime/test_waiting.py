"""The store's connections."""

import ppdiffusers_train  # noqa: F401

import contextlib
import os
import socket
import time

import pytest
from paddle.base import core

from ppdiffusers_train.runtime.waiting import send_at_once
from tests.distributed.kill_harness import free_port

pytestmark = pytest.mark.once  # both versions of Paddle wait


def test_a_question_to_the_store_is_sent_at_once():
    """When Paddle's store does so by itself, `send_at_once` can go."""
    before = connections()
    store = core.TCPStore("127.0.0.1", free_port(), True, 1)
    made = connections() - before
    assert not all(map(sends_at_once, made))
    send_at_once()
    assert made and all(map(sends_at_once, made))
    start = time.monotonic()
    for _ in range(50):
        store.add("questions", 1)
    assert time.monotonic() - start < 1, "50 take 2.2 s when each waits for an acknowledgement"


def connections():
    """The file descriptors of this process that are connections over TCP."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(int(name))) as connection:
            if connection.family in (socket.AF_INET, socket.AF_INET6) and connection.getpeername():
                found.add(name)
    return found


def sends_at_once(name):
    with socket.socket(fileno=os.dup(int(name))) as connection:
        return bool(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
