"""Containers come and go, many at once, while the agent is killed and etcd stands still.

TESSERA_SOAK_S: how long (8). TESSERA_SOAK_WORKERS: how many runtimes at once (8).

Each worker is a runtime: it adds, may check, deletes; what fails is deleted and given up, as the
specification wants it. Now and then one forgets to delete, as a runtime does that crashes; GC is
for those. In the end a checker compares what runtimes hold, the agent's journal on disk, the
kernel's tables, and etcd.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from datapath.agent import checkpoint
from datapath.agent.record import State
from datapath.maps.tables import Tables
from ipam.keys import ADDRESSES
from services.runtime.errors import TesseraError
from tests.fakes.libcni import PluginFailed, Runtime, install_plugin
from tests.fakes.netns import Namespace
from tests.fakes.stack import Stack, eventually
from tests.system.test_cni import nothing_left

pytestmark = [pytest.mark.kernel, pytest.mark.timeout(0)]

SOAK_S = float(os.environ.get("TESSERA_SOAK_S", "8"))
WORKERS = int(os.environ.get("TESSERA_SOAK_WORKERS", "8"))
TRY_AGAIN = 11
# A deletion that is put off this often was not put off by what this test does to the node.
MOST_TRIES = 10


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    made = Stack.start("soak", {"ipamd": {"release_cooldown_s": 1}})
    yield made
    made.stop()


@dataclass
class Books:
    """What all runtimes together hold: container -> address."""

    held: dict[str, str] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def count(self, what: str) -> None:
        with self.lock:
            self.counts[what] = self.counts.get(what, 0) + 1

    def hold(self, container: str, address: str) -> None:
        with self.lock:
            others = [c for c, a in self.held.items() if a == address and c != container]
            assert not others, f"{address} is {container}'s and {others}'s"
            self.held[container] = address

    def let_go(self, container: str) -> None:
        """Before it is deleted: from then on the address may be anybody's."""
        with self.lock:
            self.held.pop(container, None)


def only_put_off(failed: PluginFailed) -> None:
    if failed.code != TRY_AGAIN:
        raise failed


class Worker:
    def __init__(self, number: int, runtime: Runtime, books: Books, seed: int) -> None:
        self.number, self.runtime, self.books = number, runtime, books
        self.chance = random.Random(seed)
        self.space = Namespace.create("tsr-soak")
        self.forgotten: list[Namespace] = []
        self.serial = 0

    def run(self, until_s: float) -> None:
        try:
            while time.perf_counter() < until_s and not self.books.failures:
                self.one()
        except BaseException as error:  # noqa: BLE001  the test's thread raises it
            self.books.failures.append(f"worker {self.number}: {error!r}")

    def one(self) -> None:
        self.serial += 1
        container = f"w{self.number}-{self.serial}"
        if not self.added(container):
            self.delete(container)
            return
        if self.chance.random() < 0.2:
            self.check(container)
        if self.chance.random() < 0.1:
            self.forget()
            return
        self.delete(container)
        if self.chance.random() < 0.3:
            self.delete(container)

    def added(self, container: str) -> bool:
        try:
            made = self.runtime.add(container, self.space.path)
        except PluginFailed as failed:
            only_put_off(failed)
            self.books.count("put off")
            return False
        self.books.hold(container, made["ips"][0]["address"])
        self.books.count("added")
        return True

    def check(self, container: str) -> None:
        try:
            self.runtime.check(container, self.space.path)
            self.books.count("checked")
        except PluginFailed as failed:
            only_put_off(failed)

    def delete(self, container: str) -> None:
        self.books.let_go(container)
        for _ in range(MOST_TRIES):
            try:
                self.runtime.delete(container, self.space.path)
            except PluginFailed as failed:
                only_put_off(failed)
                continue
            self.books.count("deleted")
            return
        raise AssertionError(f"{container} cannot be deleted")

    def forget(self) -> None:
        """The runtime crashed; its namespace stays, and a new one is used from now on."""
        self.books.count("forgotten")
        self.forgotten.append(self.space)
        self.space = Namespace.create("tsr-soak")

    def end(self) -> None:
        for space in (self.space, *self.forgotten):
            space.delete()


def disturb(stack: Stack, until_s: float, chance: random.Random, books: Books) -> None:
    """One thing at a time, and some peace in between."""
    while time.perf_counter() + 3 < until_s and not books.failures:
        time.sleep(chance.uniform(0.2, 1.0))
        if chance.random() < 0.6:
            books.count("agent killed")
            stack.kill("agent")
            stack.start_process("agent")
            eventually(lambda: answers(stack), "the agent does not come back")
        else:
            books.count("etcd stopped")
            stack.signal("etcd", signal.SIGSTOP)
            time.sleep(chance.uniform(0.2, 2.0))
            stack.signal("etcd", signal.SIGCONT)


def answers(stack: Stack) -> bool:
    assert stack.processes["agent"].poll() is None, stack.log("agent")
    try:
        return bool(stack.agent.get("/v1/status"))
    except TesseraError:
        return False


def owned(stack: Stack) -> set[str]:
    """Addresses in etcd, where they stand at full length."""
    texts = (key.rsplit("/", 1)[1] for key in stack.etcd_keys(ADDRESSES))
    return {".".join(str(int(part)) for part in text.split(".")) for text in texts}


def books_agree(stack: Stack, books: Books) -> bool:
    """Runtimes, the agent, its journal, the kernel and etcd name the same addresses."""
    held = {address.split("/")[0] for address in books.held.values()}
    journal = checkpoint.load_journal(stack.layout.state_dir)
    tables = Tables.pinned(stack.bpf_dir)
    try:
        kernel = {row.id for _, row in tables.endpoints.items()}
        delivered = len(list(tables.local4.items()))
    finally:
        tables.close()
    agent = stack.endpoints()
    assert journal is not None
    return (
        held == {one["ip"] for one in agent} == {r.ip for r in journal.endpoints} == owned(stack)
        and kernel == {one["id"] for one in agent}
        and delivered == len(held)
        and all(r.state is State.READY for r in journal.endpoints)
    )


def test_no_address_is_given_twice_and_none_is_lost(stack: Stack, tmp_path) -> None:
    install_plugin(tmp_path, stack.layout.socket("agent"))
    plugins = [{"type": "tessera", "namespace": "soak"}]
    network = {"cniVersion": "1.1.0", "name": "soak", "plugins": plugins}
    seed = int(os.environ.get("TESSERA_SOAK_SEED", "1"))
    chance, books = random.Random(seed), Books()
    runtime = Runtime(network, [str(tmp_path)])
    workers = [Worker(n, runtime, books, seed + n) for n in range(WORKERS)]
    until_s = time.perf_counter() + SOAK_S
    try:
        threads = [threading.Thread(target=w.run, args=(until_s,)) for w in workers]
        for thread in threads:
            thread.start()
        try:
            disturb(stack, until_s, chance, books)
        finally:
            for thread in threads:
                thread.join()
        stack.wait_ready()
        print(f"\nsoak: {books.counts}")
        assert not books.failures, books.failures
        assert books.counts["added"] > WORKERS
        eventually(lambda: books_agree(stack, books), "the books do not agree")
        runtime.gc([])
        books.held.clear()
        eventually(lambda: books_agree(stack, books), "garbage is left")
        assert nothing_left(stack)
    finally:
        for worker in workers:
            worker.end()
