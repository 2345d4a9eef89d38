import asyncio
import json

import pytest

from identity import keys
from identity.selector import Selector
from services.identityd.announce import AddressValue
from services.runtime.clock import SystemClock
from services.runtime.errors import Invalid, NotFound
from services.store.memory import MemoryStore
from services.store.model import LeaseId
from tests.fakes.clock import FakeClock
from tests.fakes.identity_replica import SESSION_TTL_S, replica, until


@pytest.fixture
def clock():
    return FakeClock()


@pytest.fixture
async def store(clock):
    async with MemoryStore(clock) as memory:
        yield memory


@pytest.fixture
async def one(store, clock):
    async with replica(store, clock) as made:
        yield made


# ------------------------------------------------------------------ sessions


async def test_a_session_registers_the_node_in_the_public_format(store, one):
    session = await one.sessions.open("node-a", LeaseId(0), 60, "192.0.2.7")
    assert (session.ttl_s, session.resumed) == (60, False)
    kv = await store.get("cilium/state/nodes/v1/default/node-a")
    assert kv.lease == session.lease
    value = json.loads(kv.value)
    assert list(value)[:4] == ["Name", "Cluster", "IPAddresses", "IPv4AllocCIDR"]
    assert value["IPAddresses"] == [{"Type": "InternalIP", "IP": "192.0.2.7"}]
    assert (value["Name"], value["Cluster"], value["ClusterID"]) == ("node-a", "default", 0)
    assert (value["Labels"], value["Annotations"], value["IPv4HealthIP"]) == ({}, None, "")


async def test_a_returning_node_resumes_its_session_and_nothing_flaps(store, one):
    lease = await one.open()
    [number] = await one.allocate(lease, "k8s:app=web")
    before = store.revision
    session = await one.sessions.open("node-a", lease, 0, "192.0.2.1")
    assert (session.lease, session.resumed) == (lease, True)
    assert store.revision == before
    moved = await one.sessions.open("node-a", lease, 0, "192.0.2.99")
    assert moved.lease == lease
    assert b"192.0.2.99" in (await store.get(keys.node_key("default", "node-a"))).value
    assert (await store.get(keys.ref_key(number, "node-a"))).lease == lease


async def test_a_lease_of_another_node_or_of_the_past_is_not_adopted(store, one, clock):
    lease = await one.open("node-a")
    stranger = await one.sessions.open("node-b", lease, 0, "")
    assert (stranger.resumed, stranger.lease != lease) == (False, True)
    await clock.advance(SESSION_TTL_S + 1)
    late = await one.sessions.open("node-a", lease, 0, "")
    assert (late.resumed, late.lease != lease) == (False, True)


async def test_keeping_a_lease_alive_tells_when_it_is_gone(one, clock):
    lease = await one.open()
    await clock.advance(SESSION_TTL_S - 1)
    assert await one.sessions.keep_alive([lease]) == SESSION_TTL_S
    await clock.advance(SESSION_TTL_S + 1)
    assert await one.sessions.keep_alive([lease]) == 0


async def test_closing_a_session_takes_everything_with_it_and_may_be_repeated(store, one):
    lease = await one.open()
    [number] = await one.allocate(lease, "k8s:app=web")
    await one.sessions.close("node-a", lease)
    await one.sessions.close("node-a", lease)
    assert await store.get(keys.node_key("default", "node-a")) is None
    assert await store.get(keys.ref_key(number, "node-a")) is None
    assert await store.get(keys.id_key(number)) is not None


@pytest.mark.parametrize("node", ["", "a/b", "-a", "a b", "x" * 254])
async def test_node_names_that_would_break_keys_are_refused(one, node):
    with pytest.raises(Invalid, match="node name"):
        await one.sessions.open(node, LeaseId(0), 0, "")


async def test_unreasonable_sessions_are_refused(one):
    with pytest.raises(Invalid, match="ttl_s 1 "):
        await one.sessions.open("node-a", LeaseId(0), 1, "")
    with pytest.raises(Invalid, match="internal_ip 'x'"):
        await one.sessions.open("node-a", LeaseId(0), 0, "x")


# ------------------------------------------------------------------ announcements


async def test_an_address_is_announced_in_the_public_format(store, one):
    lease = await one.open()
    full = AddressValue("10.244.2.74", "172.18.0.2", 300, namespace="bar", name="cep", uid="u-1")
    bare = AddressValue("2001:db8::1", "172.18.0.2", 4)
    await one.announcer.announce("node-a", lease, [full, bare])
    kv = await store.get("cilium/state/ip/v1/default/10.244.2.74")
    assert kv.lease == lease
    assert kv.value == (
        b'{"IP":"10.244.2.74","HostIP":"172.18.0.2","ID":300,"Mask":null,"Key":0,"Metadata":"",'
        b'"K8sNamespace":"bar","K8sPodName":"cep","K8sPodUID":"u-1"}'
    )
    kv = await store.get("cilium/state/ip/v1/default/2001:db8::1")
    assert json.loads(kv.value) == {
        "IP": "2001:db8::1",
        "Mask": None,
        "HostIP": "172.18.0.2",
        "ID": 4,
        "Key": 0,
        "Metadata": "",
    }


async def test_many_addresses_are_announced_and_withdrawn(store, one):
    lease = await one.open()
    ips = [f"10.244.{i // 250}.{i % 250}" for i in range(450)]
    await one.announcer.announce(
        "node-a", lease, [AddressValue(ip, "192.0.2.1", 300) for ip in ips]
    )
    assert len((await store.list(keys.IP_PREFIX)).items) == 450
    await one.announcer.withdraw("192.0.2.1", [*ips[:440], "10.9.9.9"])
    assert len((await store.list(keys.IP_PREFIX)).items) == 10


async def test_what_many_nodes_announce_at_once_is_a_few_transactions(store, one):
    lease = await one.open()

    async def announce(number: int) -> None:
        ip = f"10.3.{number // 250}.{number % 250}"
        await one.announcer.announce(f"n{number}", lease, [AddressValue(ip, "192.0.2.1", 300)])

    before = store.revision
    async with asyncio.TaskGroup() as group:
        for number in range(1000):
            group.create_task(announce(number))
    assert len((await store.list(keys.IP_PREFIX)).items) == 1000
    assert store.revision - before <= 1000 / 64 + 8


async def test_only_addresses_that_still_name_the_host_are_withdrawn(store, one):
    lease = await one.open()
    await one.announcer.announce("node-a", lease, [AddressValue("10.0.0.1", "192.0.2.1", 300)])
    await one.announcer.announce("node-b", lease, [AddressValue("10.0.0.1", "192.0.2.2", 300)])
    await store.put(keys.ip_key("10.0.0.2"), b"not json")
    await one.announcer.withdraw("192.0.2.1", ["10.0.0.1", "10.0.0.2"])
    assert len((await store.list(keys.IP_PREFIX)).items) == 2
    await one.announcer.withdraw("192.0.2.2", ["10.0.0.1", "10.0.0.2"])
    assert [kv.key for kv in (await store.list(keys.IP_PREFIX)).items] == [keys.ip_key("10.0.0.2")]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (AddressValue("10.0.0", "192.0.2.1", 300), "no IP address"),
        (AddressValue("2001:DB8::1", "192.0.2.1", 300), "write '2001:db8::1'"),
        (AddressValue("10.0.0.1", "", 300), "host_ip of 10.0.0.1 ''"),
        (AddressValue("10.0.0.1", "192.0.2.1", 0), "identity 0"),
        (AddressValue("10.0.0.1", "192.0.2.1", 70000), "identity 70000"),
        (AddressValue("10.0.0.1", "192.0.2.1", 1 << 24), "announce the number"),
    ],
)
async def test_an_announcement_a_peer_would_reject_is_refused_before_any_is_written(
    store, one, value, words
):
    lease = await one.open()
    before = store.revision
    with pytest.raises(Invalid, match=words):
        await one.announcer.announce(
            "node-a", lease, [AddressValue("10.0.0.9", "192.0.2.1", 300), value]
        )
    assert store.revision == before


async def test_announcing_on_a_dead_lease_asks_for_a_new_session(store, one):
    lease = await one.open()
    await store.revoke(lease)
    with pytest.raises(NotFound, match="open a new session"):
        await one.announcer.announce("node-a", lease, [AddressValue("10.0.0.1", "192.0.2.1", 300)])


# ------------------------------------------------------------------ the view


async def test_a_selection_names_its_members(store, one):
    lease = await one.open()
    numbers = sorted(await one.allocate(lease, *(f"k8s:app=app{i}" for i in range(25))))
    await until(lambda: one.view.in_use == 25, "the view has seen all")
    selector = Selector.parse("app,app!=etcd,io.cilium.k8s.policy.cluster=default")
    assert list(one.view.members(selector)) == numbers
    [third] = await one.allocate(lease, "k8s:app=app3")
    assert list(one.view.members(Selector.parse("app=app3"))) == [third]
    assert list(one.view.members(Selector.parse("reserved:host"))) == [1]
    standing = [*range(1, 12), *range(100, 116), 128]
    assert list(one.view.members(Selector.EVERYTHING)) == standing + numbers


async def test_the_view_survives_lost_history_with_nothing_left_over(store, one):
    lease = await one.open()
    first, second = await one.allocate(lease, "k8s:app=a", "k8s:app=b")
    await until(lambda: one.view.in_use == 2, "both seen")
    await store.delete(keys.id_key(first))
    await store.delete(keys.ref_key(second, "node-a"))
    store.compact()
    store.break_watches()
    await until(lambda: not one.view.nodes_of(second), "the released reference")
    await until(lambda: one.view.labels_of(first) is None, "the removed identity")
    assert list(one.view.members(Selector.parse("app,app!=etcd"))) == [second]


async def test_a_view_that_starts_over_forgets_what_is_gone(store):
    async with replica(store, SystemClock(), follow=False) as one:
        await store.put(keys.id_key(300), b"k8s:app=a;")
        for expected in ([300], []):
            async with asyncio.TaskGroup() as tasks:
                following = tasks.create_task(one.view.follow())
                await asyncio.sleep(0)
                await one.view.ready()
                assert list(one.view.members(Selector.parse("app,app!=etcd"))) == expected
                following.cancel()
            await store.delete(keys.id_key(300))
