"""What this node enforces: the view realised in the tables, slot by slot.

    messages ──► View.apply ──► ViewChange ──► steps (slots.py) ──► writes (reconcile.py) ──► tables
                                                 │ a table is full
                                                 └──► undone; the slot's last good policy stays

Owns the slots, classes, endpoint rows and addresses in force, and is the only writer of the tables
they live in. Synchronous: one call leaves the tables consistent, and nothing runs in between. The
order of writes is reconcile.py's; a slot that could not be written is tried again with every later
batch until it fits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from pyroaring import BitMap

from datapath.agent.addresses import HOST_IDENTITY, AddressRows, Key, keys_of, note, place
from datapath.agent.classes import Classes
from datapath.agent.slots import (
    EVERYONE,
    Kind,
    Slot,
    SlotKey,
    SlotNumbers,
    Step,
    amend,
    build,
    lingering,
    peer_rows,
)
from datapath.agent.view import Update, View, ViewChange
from datapath.maps.layout import SLOT_OPEN, Endpoint
from datapath.reconcile import (
    Contents,
    Ops,
    PeerPut,
    PolicyTables,
    apply,
    apply_additions,
    apply_removals,
    plan,
    read,
    union,
)
from identity.numbers import NumericIdentity
from services.policy.clauses import (
    RULE_ALLOW_LOCALHOST,
    Action,
    Clause,
    Direction,
    GroupId,
    LocalPolicy,
)
from services.policy.compile import Compiled, compile_direction
from services.runtime.errors import Exhausted, Retry
from services.runtime.tracing import span

# Group ids are hashes; this one is the agent's own and holds the local host alone.
LOCALHOST_GROUP = GroupId(0)
_LOCALHOST = BitMap([HOST_IDENTITY])
_NOBODY = BitMap()
_LOCALHOST_CLAUSE = Clause(
    Direction.INGRESS, (LOCALHOST_GROUP,), (), Action.ALLOW, RULE_ALLOW_LOCALHOST
)


@dataclass(frozen=True, slots=True)
class Realised:
    """`failures`: every identity whose newest policy is not in force, with the reason."""

    revision: int
    failures: Mapping[NumericIdentity, str]
    rows: int
    change: ViewChange = field(default_factory=ViewChange)


class Enforcement:
    def __init__(
        self,
        tables: PolicyTables,
        view: View,
        *,
        own_nodes: frozenset[str],
        allow_localhost: bool = True,
        tunnelled: bool = False,
    ) -> None:
        """`own_nodes`: the names this node goes by in addresses. What the stream says of addresses
        of this node is ignored: the endpoints here are known first-hand."""
        self.view = view
        self._tables = tables
        self._addresses = AddressRows(
            view,
            own_nodes,
            lambda: (key for row in self._endpoints.values() for key in keys_of(row)),
            tunnelled=tunnelled,
        )
        self._allow_localhost = allow_localhost
        self._classes = Classes()
        self._numbers = SlotNumbers(tables.policy_slot.max_entries)
        self._slots: dict[SlotKey, Slot] = {}
        self._known: set[NumericIdentity] = set()
        self._stale: dict[SlotKey, str] = {}
        self._endpoints: dict[int, Endpoint] = {}
        self._users: Counter[NumericIdentity] = Counter()
        self._doubted: set[NumericIdentity] = set()

    # -------------------------------------------------------------- questions

    @property
    def failures(self) -> dict[NumericIdentity, str]:
        """Identity 0: a table that all endpoints of the node share."""
        found = {identity: reason for (identity, _), reason in self._stale.items()}
        if self._addresses.problem:
            found[NumericIdentity(EVERYONE)] = self._addresses.problem
        return found

    def problem_of(self, identity: NumericIdentity) -> str | None:
        """None: some policy of the identity is in force in both directions."""
        if identity in self._known:
            return None
        return self.failures.get(identity, "its policy has not arrived yet")

    def slot_numbers(self, identity: NumericIdentity) -> tuple[int, int]:
        """(in, out); SLOT_OPEN where no policy selects the identity."""
        ingress = self._slots.get((identity, Direction.INGRESS))
        egress = self._slots.get((identity, Direction.EGRESS))
        return (
            ingress.number if ingress else SLOT_OPEN,
            egress.number if egress else SLOT_OPEN,
        )

    @property
    def unconfirmed(self) -> bool:
        """The address tables are an earlier run's, and the stream has yet to speak of them."""
        return self._addresses.doubted

    def counts(self) -> dict[str, int]:
        return {
            "slots": len(self._slots),
            "classes": len({n for slot in self._slots.values() for n in slot.classes if n}),
            "peer_rows": sum(len(slot.held) for slot in self._slots.values()),
            "peer_capacity": self._tables.policy_peer.max_entries,
            "identities": len(self._known),
            "endpoints": len(self._endpoints),
        }

    # -------------------------------------------------------------- the stream

    def realise(self, batch: Sequence[Update]) -> Realised:
        """One whole batch (see View.apply) into the tables. Never raises for a full table: the
        failure is in the answer, and what did not fit is tried again with every later batch."""
        cause = next((update.traceparent for update in batch if update.traceparent), None)
        with span("agent.realise", traceparent=cause) as current:
            change = self.view.apply(batch)
            with span("maps.write") as writing:
                rows = self._follow(change)
                writing.set_attribute("rows", rows)
            current.set_attribute("revision", self.view.revision)
        return Realised(self.view.revision, self.failures, rows, change)

    def _follow(self, change: ViewChange) -> int:
        """In two phases: what identities may that an address is leaving changes after it left, so
        that on the way nobody is refused, or allowed, what neither end of it says."""
        renewed = change.locals | self._doubted
        addresses = self._addresses.following(change, self._tables)
        rows = self._carry_out(self._steps(change), change.locals, addresses)
        self._doubted.clear()
        if late := self._late_steps(change, renewed):
            rows += self._carry_out(late)
        if self._stale:  # what was removed may have made room
            rows += self._carry_out(self._steps(ViewChange()))
        return rows

    def _late_steps(self, change: ViewChange, renewed: Collection[NumericIdentity]) -> list[Step]:
        """Of the identities `left`, whose answers the steps before kept as they were."""
        if not change.left:
            return []
        found = (
            amend(
                key,
                slot,
                self._members,
                change.left if key[0] in renewed else change.left & _touched(slot, change),
                self._classes,
            )
            for key, slot in self._slots.items()
            if slot.compiled is not None and key not in self._stale
        )
        return [step for step in found if step is not None]

    def _steps(self, change: ViewChange) -> list[Step]:
        identities = set(change.locals) | {identity for identity, _ in self._stale}
        identities |= self._doubted
        rebuilt: dict[SlotKey, Step | None] = {}
        for identity in sorted(identities):
            for direction in Direction:
                key = (identity, direction)
                if key in self._stale or identity in change.locals | self._doubted:
                    rebuilt[key] = self._rebuild(key, change.left)
        amended = (
            self._amend(key, slot, change)
            for key, slot in self._slots.items()
            if change.groups and rebuilt.get(key) is None
        )
        return [step for step in (*rebuilt.values(), *amended) if step is not None]

    def _rebuild(self, key: SlotKey, left: BitMap) -> Step | None:
        """None: the clauses in force are those of the view."""
        identity, direction = key
        before = self._slots.get(key)
        policy = self.view.locals.get(identity)
        if policy is None and self._users[identity]:
            return None  # the policy in force stays until the last endpoint has gone
        compiled = compile_direction(self._completed(policy), direction) if policy else None
        if compiled is None:
            self._stale.pop(key, None)
            return Step(key, Kind.OPEN, before, None) if before else None
        if before is None or before.compiled != compiled:
            return self._build(key, compiled, before, left)
        if key not in self._stale:
            return None
        everybody = union(self._members(group) for group in compiled.groups)
        within = (everybody | before.held) - BitMap([EVERYONE])
        step = amend(key, before, self._members, within, self._classes)
        if step is None:
            del self._stale[key]
        return step

    def _build(
        self, key: SlotKey, compiled: Compiled, before: Slot | None, left: BitMap
    ) -> Step | None:
        try:
            number = self._numbers.take()
        except Exhausted as error:
            self._stale[key] = str(error)
            return None
        after = build(number, compiled, self._members, self._classes)
        if left:
            after = lingering(after, before, left, self._classes)
        return Step(key, Kind.BUILD, before, after, puts=peer_rows(after, self._classes))

    def _amend(self, key: SlotKey, slot: Slot, change: ViewChange) -> Step | None:
        if slot.compiled is None or key in self._stale:
            return None
        within = _touched(slot, change) - change.left
        return amend(key, slot, self._members, within, self._classes)

    def _members(self, group: GroupId) -> BitMap:
        """A group nobody told us of has no members: a clause that names it grants nothing."""
        if group == LOCALHOST_GROUP:
            return _LOCALHOST
        return self.view.groups.get(group, _NOBODY)

    def _completed(self, policy: LocalPolicy) -> LocalPolicy:
        """With the node's own clause: its processes reach their endpoints, unless denied."""
        if not (self._allow_localhost and policy.ingress_enforced):
            return policy
        return replace(policy, clauses=(*policy.clauses, _LOCALHOST_CLAUSE))

    # -------------------------------------------------------------- writing

    def _carry_out(
        self,
        steps: Sequence[Step],
        locals_: frozenset[NumericIdentity] = frozenset(),
        rest: Ops | None = None,
    ) -> int:
        """How many rows were written. `locals_`: identities whose policy arrived or went; `rest`:
        address rows."""
        rest = rest or Ops()
        done = self._write(steps)
        in_place, removals = Ops(), Ops()
        for step in done:
            self._commit(step, in_place if step.kind is Kind.AMEND else removals)
        apply_removals(in_place, self._tables)
        settled = locals_ | {step.key[0] for step in done}
        self._settle(settled)
        rest.endpoints = self._endpoint_rows(settled)
        for ifindex, row in rest.endpoints.items():
            place(rest, ifindex, row)
        try:
            apply_additions(rest, self._tables)
        except Exhausted as error:
            # An address without a row is judged as the world: stricter than its identity at worst.
            self._addresses.problem = str(error)
        removals.ipcache_removed = rest.ipcache_removed
        removals.prefixes_removed = rest.prefixes_removed
        removals.ipcache6_removed = rest.ipcache6_removed
        removals.prefixes6_removed = rest.prefixes6_removed
        self._sweep_classes(removals)
        apply_removals(removals, self._tables)
        written = sum(len(put.identities) for step in done for put in step.puts)
        addresses = len(rest.ipcache) + len(rest.prefixes) + len(rest.ipcache6)
        addresses += len(rest.prefixes6)
        return written + len(rest.endpoints) + addresses + in_place.rows() + removals.rows()

    def _sweep_classes(self, removals: Ops) -> None:
        in_force = {slot.number for slot in self._slots.values()}
        for swept in self._classes.take_unused():
            removals.ports_removed.extend(swept.rows.ports)
            removals.ranges_removed.extend(swept.rows.ranges)
            for number in swept.slots & in_force:
                removals.revisions_after[number] = self._next_revision(number)

    def _write(self, steps: Sequence[Step]) -> list[Step]:
        """Additions of all steps in one go; one by one when a table fills up, so that the slots
        that do fit are not held back. The steps that are in the tables."""
        try:
            self._write_together(steps)
        except Exhausted:
            return [step for step in steps if self._write_alone(step)]
        return list(steps)

    def _write_together(self, steps: Sequence[Step]) -> None:
        ops = Ops()
        fresh: set[int] = set()
        for step in steps:
            if step.after is not None:
                fresh |= self._classes.unwritten(step.after.classes)
            ops.peers.extend(step.puts)
            if step.after is not None and (step.kind is Kind.BUILD or step.judge_again):
                ops.revisions[step.after.number] = self._next_revision(step.after.number)
        for number in fresh:
            rows = self._classes.rows(number)
            ops.ports.update(rows.ports)
            ops.ranges.update(rows.ranges)
        apply_additions(ops, self._tables)
        self._classes.mark_written(fresh)

    def _write_alone(self, step: Step) -> bool:
        try:
            self._write_together([step])
        except Exhausted as error:
            self._undo(step)
            self._stale[step.key] = str(error)
            return False
        return True

    def _undo(self, step: Step) -> None:
        """Takes back what a failed step may have written; nobody was flipped to it yet."""
        after = step.after
        assert after is not None
        ops = Ops()
        put = union(each.identities for each in step.puts)
        if step.kind is Kind.BUILD:
            ops.peers_removed.append((after.number, put))
            self._numbers.free(after.number)
        elif step.before is not None:
            ops.peers_removed.append((after.number, put - step.before.held))
            ops.peers = [
                PeerPut(old.slot, old.row, again)
                for old in peer_rows(step.before, self._classes)
                if (again := old.identities & put)
            ]
            # A verdict cached meanwhile came from a row that is taken back.
            ops.revisions_after[after.number] = self._next_revision(after.number)
        for number in self._classes.unwritten(after.classes):
            rows = self._classes.rows(number)
            ops.ports_removed.extend(rows.ports)
            ops.ranges_removed.extend(rows.ranges)
        apply(ops, self._tables)

    def _commit(self, step: Step, removals: Ops) -> None:
        """`after` is in the tables: it is what is in force from here on. `removals` is given what
        it leaves behind."""
        before, after = step.before, step.after
        self._stale.pop(step.key, None)
        self._classes.move_references(
            after.number if after else SLOT_OPEN,
            to=after.classes if after else (),
            of=before.classes if before else (),
        )
        if after is None:
            del self._slots[step.key]
        else:
            self._slots[step.key] = after
        if step.kind is not Kind.AMEND:
            if before is not None:
                removals.peers_removed.append((before.number, before.held))
                self._numbers.free(before.number)
        elif step.removed and after is not None:
            removals.peers_removed.append((after.number, step.removed))
            if step.judge_again:
                removals.revisions_after[after.number] = self._next_revision(after.number)

    def _next_revision(self, number: int) -> int:
        held = self._tables.policy_slot.get(number)
        return (held.revision if held else 0) + 1

    def _settle(self, identities: Iterable[NumericIdentity]) -> None:
        for identity in identities:
            if identity in self.view.locals:
                if not any((identity, direction) in self._stale for direction in Direction):
                    self._known.add(identity)
            elif not self._users[identity]:
                self._known.discard(identity)

    # -------------------------------------------------------------- endpoints and addresses

    def add_endpoint(self, ifindex: int, row: Endpoint) -> None:
        """Its slots are filled in here. Raises `Retry` while its identity has no policy in force
        (`problem_of`), `Exhausted`; nothing is written then."""
        problem = self.problem_of(NumericIdentity(row.identity))
        if problem is not None:
            raise Retry(f"identity {row.identity}: {problem}")
        ops = Ops(endpoints={ifindex: self._with_slots(row)})
        place(ops, ifindex, row)
        try:
            apply_additions(ops, self._tables)
        except Exhausted:
            apply(self._endpoint_removal(ifindex, row), self._tables)
            raise
        before = self._hold(ifindex, row)
        if before is not None:
            self._let_go(NumericIdentity(before.identity))

    def judges(self, ifindex: int) -> bool:
        return ifindex in self._endpoints

    def remove_endpoint(self, ifindex: int) -> None:
        """No error when it is not there."""
        row = self._endpoints.pop(ifindex, None)
        if row is None:
            return
        identity = NumericIdentity(row.identity)
        self._users[identity] -= 1
        apply(self._endpoint_removal(ifindex, row), self._tables)
        self._let_go(identity)

    def _let_go(self, identity: NumericIdentity) -> None:
        """A policy that the stream took back stays in force while an endpoint here has it."""
        if not self._users[identity] and identity not in self.view.locals:
            gone = frozenset([identity])
            self._carry_out(self._steps(ViewChange(locals=gone)), gone)
            self._known.discard(identity)

    def own_addresses(self, addresses: Iterable[Key]) -> None:
        """The node's own addresses; packets from them are the host's."""
        apply(self._addresses.owning(addresses), self._tables)

    def _endpoint_removal(self, ifindex: int, row: Endpoint) -> Ops:
        ops = self._addresses.given_back(keys_of(row))
        ops.local4_removed, ops.endpoints_removed = [row.ipv4], [ifindex]
        ops.local6_removed = [row.ipv6] if row.ipv6 else []
        return ops

    def _hold(self, ifindex: int, row: Endpoint) -> Endpoint | None:
        """The endpoint that the interface was until now."""
        before = self._endpoints.get(ifindex)
        if before is not None:
            self._users[NumericIdentity(before.identity)] -= 1
        self._endpoints[ifindex] = row
        self._users[NumericIdentity(row.identity)] += 1
        return before

    def _with_slots(self, row: Endpoint) -> Endpoint:
        slot_in, slot_out = self.slot_numbers(NumericIdentity(row.identity))
        return replace(row, slot_in=slot_in, slot_out=slot_out)

    def _endpoint_rows(self, identities: Collection[NumericIdentity]) -> dict[int, Endpoint]:
        return {
            ifindex: self._with_slots(row)
            for ifindex, row in self._endpoints.items()
            if row.identity in identities and row.identity in self._known
        }

    # -------------------------------------------------------------- from scratch

    def recover(self, endpoints: Mapping[int, Endpoint], own: Iterable[Key] = ()) -> Ops:
        """Start-up: take over what the tables hold and mend what does not fit together. `endpoints`
        by ifindex; rows of others are removed. Normally nothing is written but new revisions: who
        wrote last may have died between a row and its revision.

        The view may be older than the tables (a checkpoint lags), so where they differ the tables
        win until the stream has spoken: a slot keeps its rows and gets a new revision, the address
        tables stay, and the next batch is compared with the tables instead of the view. Tables
        that hold nothing are filled from the view. The endpoint rows say which slot is whose."""
        actual = read(self._tables)
        self._classes.adopt(actual.ports, actual.ranges)
        for number in actual.peers:
            self._numbers.adopt(number)
        self._addresses.own = frozenset(own)
        for ifindex, row in endpoints.items():
            self._hold(ifindex, row)
        judged = {NumericIdentity(row.identity) for row in actual.endpoints.values()}
        kept = self._numbers_in_force(actual)
        for identity in sorted({*self.view.locals, *self._users}):
            for direction in Direction:
                key = (identity, direction)
                slot = self._recovered(key, kept.get(key), actual, judged=identity in judged)
                if slot is not None:
                    self._slots[key] = slot
                    self._classes.move_references(slot.number, to=slot.classes, of=())
        self._known = set(self.view.locals) | (judged & self._users.keys())
        self._addresses.doubted = bool(actual.endpoints or actual.ipcache)
        desired = self.desired(actual)
        revisions = {slot: self._next_revision(slot) - 1 for slot in desired.peers}
        ops = plan(desired, actual, revisions)
        for number in desired.peers.keys() - ops.revisions_after.keys():
            ops.revisions[number] = self._next_revision(number)
        apply(ops, self._tables)
        for number in actual.peers.keys() - desired.peers.keys():
            self._numbers.free(number)
        self._classes.mark_written(n for slot in self._slots.values() for n in slot.classes if n)
        self._classes.take_unused()
        return ops

    def _numbers_in_force(self, actual: Contents) -> dict[SlotKey, int]:
        kept: dict[SlotKey, int] = {}
        for row in actual.endpoints.values():
            identity = NumericIdentity(row.identity)
            sides = ((Direction.INGRESS, row.slot_in), (Direction.EGRESS, row.slot_out))
            for direction, number in sides:
                if number != SLOT_OPEN and number in actual.peers and number not in kept.values():
                    kept.setdefault((identity, direction), number)
        return kept

    def _recovered(
        self, key: SlotKey, number: int | None, actual: Contents, *, judged: bool
    ) -> Slot | None:
        identity, direction = key
        policy = self.view.locals.get(identity)
        compiled = compile_direction(self._completed(policy), direction) if policy else None
        if number is None:
            if compiled is None:
                return None
            if judged:  # by nothing: open in the tables, closed in the view
                self._doubted.add(identity)
                return None
            return build(self._numbers.take(), compiled, self._members, self._classes)
        held = actual.peers[number]
        if compiled is not None:
            slot = build(number, compiled, self._members, self._classes)
            if {put.row: put.identities for put in peer_rows(slot, self._classes)} == held:
                return slot
        self._doubted.add(identity)
        classes = frozenset(row.class_id for row in held)
        return Slot(number, None, {}, union(held.values()), classes)

    def desired(self, actual: Contents) -> Contents:
        """All rows this object stands for, computed anew. `actual` lends what was taken over from
        the tables and cannot be computed: rows of slots without clauses, doubted addresses."""
        peers = {}
        for slot in self._slots.values():
            if slot.compiled is None:
                peers[slot.number] = actual.peers[slot.number]
            else:
                puts = peer_rows(slot, self._classes)
                peers[slot.number] = {put.row: put.identities for put in puts}
        numbers = {n for slot in self._slots.values() for n in slot.classes if n}
        classes = [self._classes.rows(number) for number in sorted(numbers)]
        if self._addresses.doubted:
            addresses = Ops(
                ipcache=dict(actual.ipcache),
                prefixes=dict(actual.prefixes),
                ipcache6=dict(actual.ipcache6),
                prefixes6=dict(actual.prefixes6),
            )
            for row in actual.endpoints.values():
                addresses.ipcache.pop(row.ipv4, None)
                addresses.ipcache6.pop(row.ipv6, None)
        else:
            addresses = self._addresses.all()
        ready = self._endpoint_rows(set(self._known))
        for key in self._addresses.own:
            note(addresses, key, HOST_IDENTITY)
        for ifindex, row in ready.items():
            place(addresses, ifindex, row)
        return Contents(
            endpoints=ready,
            local4=addresses.local4,
            ipcache=addresses.ipcache,
            prefixes=addresses.prefixes,
            local6=addresses.local6,
            ipcache6=addresses.ipcache6,
            prefixes6=addresses.prefixes6,
            peers=peers,
            ports={key: row for each in classes for key, row in each.ports.items()},
            ranges={key: row for each in classes for key, row in each.ranges.items()},
        )


def _touched(slot: Slot, change: ViewChange) -> BitMap:
    """Identities that entered or left a group the slot's clauses name."""
    assert slot.compiled is not None
    deltas = (change.groups[group] for group in slot.compiled.groups & change.groups.keys())
    return union(each for delta in deltas for each in (delta.added, delta.removed))
