"""Hosts that answer, that refuse, and that hang."""

import threading
import types

from arbiter_jax.datasets import _reachability
from arbiter_jax.datasets._reachability import unreachable_host

URLS = [f"https://{name}.example/file" for name in "abc"]


def test_hosts_that_answer(monkeypatch):
    attempts = []

    class Connection:
        def close(self):
            pass

    def connect(address, timeout):
        attempts.append(address)
        if address[0] == "down.example":
            raise OSError
        return Connection()

    monkeypatch.setattr("socket.create_connection", connect)
    urls = ["https://up.example/a", "http://up.example/b", "no url", "https://up.example/c"]
    assert unreachable_host(urls) is None
    assert sorted(attempts) == [("up.example", 80), ("up.example", 443)]
    assert unreachable_host([*urls, "https://down.example"]) == "down.example"
    assert unreachable_host([]) is None


def test_a_proxy_is_asked_instead(monkeypatch):
    monkeypatch.setenv("https_proxy", "http://proxy.example:3128")
    assert unreachable_host(["https://up.example"]) == "proxy.example"


def test_a_resolver_that_hangs_is_abandoned(monkeypatch):
    released, returned = threading.Event(), []

    def hang(*args, **kwargs):
        released.wait(60)
        returned.append(args)
        raise OSError

    monkeypatch.setattr("socket.getaddrinfo", hang)
    try:
        assert unreachable_host(URLS[:1], timeout=0.01) == "a.example"
        assert not returned
    finally:
        released.set()


def test_the_timeout_is_for_all_hosts_together(monkeypatch):
    """With a fake clock that only waiting for a thread moves."""
    clock = types.SimpleNamespace(now=100.0)

    class HangingThread:
        def __init__(self, target, args, daemon):
            assert daemon  # or the interpreter could not exit while it hangs

        def start(self):
            pass

        def join(self, timeout):
            clock.now += timeout

    fake_time = types.SimpleNamespace(monotonic=lambda: clock.now)
    monkeypatch.setattr(_reachability, "time", fake_time)
    monkeypatch.setattr(_reachability, "threading", types.SimpleNamespace(Thread=HangingThread))
    assert unreachable_host(URLS) == "a.example"
    assert clock.now == 101.5
