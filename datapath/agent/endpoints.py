"""The life of an endpoint, from a namespace without a network to a judged one and back.

    create                                                  delete
    ┌ note the intent on disk ──┐                           ▲ forget it on disk
    ├ identity ─┬► interest ──► │ policy in force           │ release identity, address; withdraw
    │           ├► announce     ▼                           │ veth, programs, conntrack
    ├ address ──┴► veth (no carrier) ──► programs           │ rows
    │ rows ──► carrier                                      ┘
    ▼ note the result on disk

The branches run side by side. Taking down is idempotent and serves three callers: a
deletion, a creation that failed, and start-up finding what a killed agent left half made. What
concerns this node is undone at once; what the control plane must be told waits for it (RELEASING).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from ipaddress import IPv4Address
from typing import Any, Protocol, TypeVar

from datapath.agent.addressing import Given
from datapath.agent.record import (
    EndpointRecord,
    State,
    identity_labels,
    outer_name,
)
from datapath.agent.session import Announced, Granted, Sets
from datapath.maps.layout import Endpoint
from identity.numbers import NumericIdentity
from services.runtime.clock import Clock
from services.runtime.errors import Conflict, Invalid, NotFound, Retry, TesseraError
from services.runtime.log import logger

log = logger(__name__)

# Allocation, resolution and distribution of one identity take milliseconds; this is for a control
# plane that is just starting.
POLICY_DEADLINE_S = 15.0
RELEASE_PAUSE_S = 2.0

T = TypeVar("T")
Vanished = Callable[[Sequence[EndpointRecord]], list[EndpointRecord]]
"""Those of the given records whose interface is no longer there."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """`container` to `routes`: as in the record that is made of it."""

    namespace: str
    name: str
    labels: tuple[str, ...]
    netns: str
    interface: str
    container: str = ""
    network: str = ""
    mtu: int = 0
    routes: tuple[str, ...] = ()
    pool: str = ""
    static: tuple[str, ...] = ()
    retain_s: int = 0
    adopted: bool = False
    mac: bytes = bytes(6)


class Identities(Protocol):
    async def allocate(self, labels: tuple[str, ...]) -> NumericIdentity: ...
    async def refer(self, sets: Sets) -> Mapping[tuple[str, ...], Granted | TesseraError]: ...
    async def release(self, identities: list[NumericIdentity]) -> None: ...
    async def announce(self, items: list[Announced]) -> None: ...
    async def withdraw(self, ips: list[str]) -> None: ...


class Addresses(Protocol):
    async def allocate(self, record: EndpointRecord) -> Given: ...
    async def release(self, record: EndpointRecord) -> None: ...


class Policies(Protocol):
    def want(self, identity: NumericIdentity) -> None: ...
    def unwant(self, identity: NumericIdentity) -> None: ...
    async def in_force(self, identity: NumericIdentity, timeout: float) -> None: ...


class Rows(Protocol):
    def add_endpoint(self, ifindex: int, row: Endpoint) -> None: ...
    def remove_endpoint(self, ifindex: int) -> None: ...


class Veth(Protocol):
    @property
    def ifindex(self) -> int: ...
    @property
    def mac(self) -> bytes: ...
    @property
    def host_mac(self) -> bytes: ...


class Existing(Veth, Protocol):
    @property
    def outer(self) -> str: ...
    @property
    def address(self) -> IPv4Address: ...


class Machine(Protocol):
    """The kernel, but for the policy tables; every call blocks, and runs in a thread."""

    def netns_exists(self, netns: str) -> bool: ...
    def create_veth(self, record: EndpointRecord, address: IPv4Address) -> Veth: ...
    def find_veth(self, record: EndpointRecord) -> Existing: ...
    def attach(self, ifindex: int, outer: str) -> None: ...
    def set_up(self, record: EndpointRecord) -> None: ...
    def delete_veth(self, outer: str) -> bool: ...
    def detach(self, outer: str) -> None: ...
    def forget_flows(self, record: EndpointRecord) -> int: ...


class Endpoints:
    """`save` writes the records to disk and returns when they are there. `before_forgetting` runs
    before a number stops to be an endpoint's, `on_renumbered` when some should be moved."""

    def __init__(
        self,
        *,
        node: str,
        identities: Identities,
        addresses: Addresses,
        policies: Policies,
        rows: Rows,
        machine: Machine,
        save: Callable[[], Awaitable[None]],
        before_forgetting: Callable[[], None],
        on_renumbered: Callable[[], None],
        clock: Clock,
        next_id: int = 1,
        records: Iterable[EndpointRecord] = (),
    ) -> None:
        self._node = node
        self._identities = identities
        self._addresses = addresses
        self._policies = policies
        self._rows = rows
        self._machine = machine
        self._save = save
        self._before_forgetting = before_forgetting
        self._on_renumbered = on_renumbered
        self._clock = clock
        self.next_id = next_id
        self._records = {record.key: record for record in records}
        # Being created or deleted, and what tells when that is over.
        self._busy: dict[tuple[str, str], asyncio.Event] = {}
        # An identity between "nobody here uses it" and "the control plane knows".
        self._letting_go: dict[NumericIdentity, asyncio.Event] = {}
        self._interests: dict[tuple[str, str], NumericIdentity] = {}
        for record in self._records.values():
            if record.state is State.READY:
                self._want(record.key, record.identity)

    # -------------------------------------------------------------- questions

    @property
    def records(self) -> tuple[EndpointRecord, ...]:
        return tuple(self._records.values())

    def find(self, ref: str) -> EndpointRecord:
        """`ref`: a number, or namespace/name. Raises `NotFound`."""
        for record in self._records.values():
            if ref in (str(record.id), record.ref) and record.state is not State.RELEASING:
                return record
        raise NotFound(f"no endpoint {ref} on this node; see GET /v1/endpoints")

    async def at_rest(self, record: EndpointRecord) -> None:
        """Returns when nobody is creating or deleting it."""
        while record.key in self._busy:
            await self._busy[record.key].wait()

    @contextmanager
    def _alone(self, key: tuple[str, str]) -> Iterator[None]:
        over = self._busy[key] = asyncio.Event()
        try:
            yield
        finally:
            del self._busy[key]
            over.set()

    # -------------------------------------------------------------- create

    async def create(self, wanted: Wanted) -> EndpointRecord:
        """Raises `Invalid`, `Conflict`, `Retry`, `Exhausted`; then nothing of it is left."""
        record = await self._admit(wanted)
        with self._alone(record.key):
            made = await self._make(record)
        log.info(
            "endpoint.created",
            endpoint=made.ref,
            identity=made.identity,
            address=made.ip,
            interface=made.outer,
        )
        return made

    async def _admit(self, wanted: Wanted) -> EndpointRecord:
        key = (wanted.namespace, wanted.name)
        if not await asyncio.to_thread(self._machine.netns_exists, wanted.netns):
            raise Invalid(
                f"no network namespace {wanted.netns}: make it with `ip netns add NAME`, or give "
                "the path of one"
            )
        held = self._records.get(key)
        if held is not None and held.state is State.RELEASING and key not in self._busy:
            with self._alone(key):
                await self._finish(held)
            held = self._records.get(key)
        if held is not None:
            raise Conflict(
                f"endpoint {held.ref} exists already (number {held.id}); delete it first"
            )
        for other in self._records.values():
            if other.state is State.RELEASING:
                continue
            if (other.netns, other.interface) == (wanted.netns, wanted.interface):
                taken = f"interface {wanted.interface} of {wanted.netns}"
                raise Conflict(f"{taken} belongs to endpoint {other.ref}")
        record = EndpointRecord(
            id=self.next_id,
            namespace=wanted.namespace,
            name=wanted.name,
            labels=identity_labels(wanted.namespace, wanted.labels),
            netns=wanted.netns,
            interface=wanted.interface,
            outer=outer_name(self._node, wanted.namespace, wanted.name),
            state=State.CREATING,
            container=wanted.container,
            network=wanted.network,
            mtu=wanted.mtu,
            routes=wanted.routes,
            pool=wanted.pool,
            static=wanted.static,
            retain_s=wanted.retain_s,
            adopted=wanted.adopted,
            mac=wanted.mac,
        )
        self.next_id += 1
        self._records[key] = record
        return record

    async def _make(self, record: EndpointRecord) -> EndpointRecord:
        """Every branch runs to its end even when another fails, so that what was made is known."""
        loop = asyncio.get_running_loop()
        identity: asyncio.Future[NumericIdentity] = loop.create_future()
        address: asyncio.Future[Given] = loop.create_future()
        noted: asyncio.Future[None] = loop.create_future()
        async with asyncio.TaskGroup() as group:
            branches = [
                group.create_task(_outcome(branch))
                for branch in (
                    _feed(noted, self._save()),
                    _feed(identity, self._identify(record)),
                    _feed(address, self._address(record)),
                    self._policy(record, identity),
                    self._connect(record, address, noted),
                    self._announce(record, identity, address),
                )
            ]
        made = self._records[record.key]
        try:
            for branch in branches:
                outcome = branch.result()
                if isinstance(outcome, TesseraError):
                    raise outcome
            return await self._open(replace(made, state=State.READY))
        except TesseraError:
            await self._take_down(self._records[record.key])
            raise

    def _learnt(self, record: EndpointRecord, **fields: Any) -> EndpointRecord:  # noqa: ANN401
        """`record` with what is known of it by now, for whoever must take it down."""
        now = self._records[record.key] = replace(self._records[record.key], **fields)
        return now

    async def _identify(self, record: EndpointRecord) -> NumericIdentity:
        identity = await self._identities.allocate(record.labels)
        while identity in self._letting_go:
            await self._letting_go[identity].wait()
            identity = await self._identities.allocate(record.labels)
        self._learnt(record, identity=identity)
        self._want(record.key, identity)
        return identity

    async def _policy(
        self, record: EndpointRecord, identity: asyncio.Future[NumericIdentity]
    ) -> None:
        await self._policies.in_force(await identity, POLICY_DEADLINE_S)

    async def _address(self, record: EndpointRecord) -> Given:
        if not record.adopted:
            return await self._addresses.allocate(record)
        found = await asyncio.to_thread(self._machine.find_veth, record)
        for other in self._records.values():
            if other.key != record.key and other.ifindex == found.ifindex:
                raise Conflict(f"interface {found.outer} belongs to endpoint {other.ref}")
        known = self._learnt(
            record,
            outer=found.outer,
            ifindex=found.ifindex,
            mac=found.mac,
            host_mac=found.host_mac,
            static=(str(found.address),),
        )
        with suppress(Invalid):  # of no pool, so that nobody else can be given it
            await self._addresses.allocate(known)
        return Given(int(found.address))

    async def _connect(
        self,
        record: EndpointRecord,
        address: asyncio.Future[Given],
        noted: asyncio.Future[None],
    ) -> None:
        """An interface that nobody has noted would be nobody's after a crash."""
        await noted
        given = await address
        known = self._learnt(record, address=given.ipv4, address6=given.ipv6)
        if known.adopted:
            return  # its packets flow; they are judged once there is something to judge them by
        ip = IPv4Address(known.address)
        veth = await asyncio.to_thread(self._machine.create_veth, known, ip)
        self._learnt(record, ifindex=veth.ifindex, mac=veth.mac, host_mac=veth.host_mac)
        await asyncio.to_thread(self._machine.attach, veth.ifindex, record.outer)

    async def _announce(
        self,
        record: EndpointRecord,
        identity: asyncio.Future[NumericIdentity],
        address: asyncio.Future[Given],
    ) -> None:
        """Before the carrier: peers know who it is when its first packet arrives."""
        given = await address
        known = replace(record, identity=await identity, address=given.ipv4, address6=given.ipv6)
        await self._identities.announce(announced(known))

    async def _open(self, made: EndpointRecord) -> EndpointRecord:
        await self._write_rows(made)
        self._records[made.key] = made
        if made.adopted:
            await asyncio.to_thread(self._machine.attach, made.ifindex, made.outer)
        else:
            await asyncio.to_thread(self._machine.set_up, made)
        await self._save()
        return made

    async def _write_rows(self, made: EndpointRecord) -> None:
        deadline_s = self._clock.monotonic_s() + POLICY_DEADLINE_S
        while True:
            try:
                return self._rows.add_endpoint(made.ifindex, made.row())
            except Retry:
                # The identity's last other endpoint went away in this very moment.
                left_s = deadline_s - self._clock.monotonic_s()
                if left_s <= 0:
                    raise
                await self._policies.in_force(made.identity, left_s)

    # -------------------------------------------------------------- labels

    async def relabel(self, ref: str, labels: tuple[str, ...]) -> EndpointRecord:
        """Notes what it is called from now on; it keeps its number until it is moved
        (`on_renumbered`). Raises `NotFound`, `Conflict` while it is being created or deleted."""
        record = self.find(ref)
        if record.key in self._busy:
            raise Conflict(f"endpoint {record.ref} is being created or deleted; ask again later")
        now = replace(record, labels=identity_labels(record.namespace, labels))
        if now.labels != record.labels:
            self._records[record.key] = now
            await self._save()
            log.info("endpoint.labelled", endpoint=now.ref, labels=now.labels)
        self._on_renumbered()
        return now

    # -------------------------------------------------------------- delete

    async def delete(self, ref: str) -> EndpointRecord:
        """Raises `NotFound`, `Conflict` while it is being created or deleted."""
        record = self.find(ref)
        if record.key in self._busy:
            raise Conflict(f"endpoint {record.ref} is being created or deleted; ask again later")
        with self._alone(record.key):
            await self._take_down(record)
        log.info("endpoint.deleted", endpoint=record.ref, identity=record.identity)
        return record

    async def _take_down(self, record: EndpointRecord) -> None:
        """Idempotent. Rows first: nobody reaches an endpoint whose interface is being removed. One
        that was adopted goes on without us, so its programs go first."""
        if record.adopted and record.ifindex:
            await asyncio.to_thread(self._machine.detach, record.outer)
        if record.ifindex:
            self._rows.remove_endpoint(record.ifindex)
        leaving = replace(record, state=State.RELEASING)
        self._records[record.key] = leaving
        await asyncio.to_thread(self._unplug, record)
        self._unwant(record.key)
        try:
            await self._finish(leaving)
        except TesseraError as error:
            log.warning("endpoint.release_waits", endpoint=record.ref, error=str(error))
            await self._save()

    def _unplug(self, record: EndpointRecord) -> None:
        if not record.adopted:
            self._machine.detach(record.outer)
            self._machine.delete_veth(record.outer)
        if record.address:
            self._machine.forget_flows(record)

    async def _finish(self, leaving: EndpointRecord) -> None:
        """Tells the control plane; raises what it raises, and the record stays."""
        if leaving.address:
            await self._identities.withdraw(list(leaving.ips))
        await self._addresses.release(leaving)
        if leaving.identity:
            await self._let_go(leaving)
        self._before_forgetting()
        del self._records[leaving.key]
        await self._save()

    async def _let_go(self, leaving: EndpointRecord) -> None:
        """Of two label sets with one number (the label filter) neither alone keeps the other's
        reference; a set that is being asked for has no number yet."""
        others = [r for r in self._records.values() if r.key != leaving.key]
        if any(r.labels == leaving.labels or r.identity == leaving.identity for r in others):
            return
        await self._give_back(leaving.identity)

    async def let_go(self, identity: NumericIdentity) -> None:
        """The node's reference, if no endpoint has the number."""
        if all(record.identity != identity for record in self._records.values()):
            await self._give_back(identity)

    async def _give_back(self, identity: NumericIdentity) -> None:
        if identity in self._letting_go:
            return
        done = self._letting_go[identity] = asyncio.Event()
        try:
            await self._identities.release([identity])
        finally:
            del self._letting_go[identity]
            done.set()

    async def tidy(self, vanished: Vanished) -> None:
        """Until cancelled: clears what an earlier run left and what vanishes without being deleted,
        and tells the control plane what it could not be told at once."""
        await self.clear_leftovers(vanished)
        while True:
            await self._finish_released()
            await self._clock.sleep(RELEASE_PAUSE_S)
            await self._clear_vanished(vanished)

    async def _finish_released(self) -> None:
        for key in tuple(self._records):
            record = self._records.get(key)  # others go on meanwhile
            if record is None or record.state is not State.RELEASING or key in self._busy:
                continue
            try:
                with self._alone(key):
                    await self._finish(record)
            except TesseraError:
                return

    # -------------------------------------------------------------- after a break

    async def clear_leftovers(self, vanished: Vanished) -> None:
        """Start-up: take down what was half made, and what vanished while the agent was away."""
        for record in self.records:
            if record.state is State.CREATING:
                await self._clear(record, "half made")
        await self._clear_vanished(vanished)

    async def _clear_vanished(self, vanished: Vanished) -> None:
        """An interface goes with its namespace, whoever took that away."""
        for record in vanished([r for r in self.records if r.state is State.READY]):
            await self._clear(record, "interface is gone")

    async def _clear(self, record: EndpointRecord, reason: str) -> None:
        if record.key in self._busy or self._records.get(record.key) != record:
            return  # somebody else's since
        log.warning("endpoint.cleared", endpoint=record.ref, reason=reason)
        with self._alone(record.key):
            await self._take_down(record)

    async def republish(self) -> None:
        """After a lost lease: references and announcements again, before anybody misses them.
        An endpoint whose number is another one now keeps the old one until it is moved."""
        ready = [record for record in self.records if record.state is State.READY]
        answers = await self._identities.refer({r.labels: r.identity for r in ready if r.labels})
        now: list[Announced] = []
        for record in ready:
            answer = answers.get(record.labels)
            if isinstance(answer, TesseraError):
                log.warning("endpoint.keeps_identity", endpoint=record.ref, error=str(answer))
            elif answer is not None and answer.number != record.identity:
                self._on_renumbered()
                continue
            now += announced(self._records.get(record.key, record))
        if now:
            await self._identities.announce(now)

    async def move(self, record: EndpointRecord, identity: NumericIdentity) -> bool:
        """The old number stays in force until the new one's policy is in the tables. False when
        the endpoint is not what it was any more."""
        if record.key in self._busy or self._records.get(record.key) != record:
            return False
        with self._alone(record.key):
            self._policies.want(identity)
            try:
                await self._policies.in_force(identity, POLICY_DEADLINE_S)
                made = replace(record, identity=identity)
                self._rows.add_endpoint(made.ifindex, made.row())
                self._records[record.key] = made
                self._unwant(record.key)
                self._want(record.key, identity)
            finally:
                self._policies.unwant(identity)
            await self._save()
        log.info("endpoint.renumbered", endpoint=record.ref, identity=identity, was=record.identity)
        return True

    def _want(self, key: tuple[str, str], identity: NumericIdentity) -> None:
        self._interests[key] = identity
        self._policies.want(identity)

    def _unwant(self, key: tuple[str, str]) -> None:
        identity = self._interests.pop(key, None)
        if identity is not None:
            self._policies.unwant(identity)


def announced(record: EndpointRecord) -> list[Announced]:
    """One of each family it has."""
    return [Announced(ip, record.identity, record.namespace, record.name) for ip in record.ips]


async def _feed(into: asyncio.Future[T], work: Awaitable[T]) -> None:
    """Raises what `work` raises, and so does `into`."""
    try:
        into.set_result(await work)
    except TesseraError as error:
        into.set_exception(error)
        into.exception()  # whether or not another branch comes to ask
        raise


async def _outcome(work: Awaitable[T]) -> T | TesseraError:
    try:
        return await work
    except TesseraError as error:
        return error
