"""/v1/ipam: pools, blocks and addresses."""

from __future__ import annotations

from ipaddress import ip_address, ip_network

from services.apid.backends import Backends
from services.apid.ipam import model
from services.apid.ipam.backend import Ipam
from services.apid.rest import pages
from services.apid.rest.params import Chosen, Paged
from services.apid.rest.route import AnyRoute, Call, Route


class BlockQuery(Paged, frozen=True, kw_only=True):
    node: str = ""


class AddressQuery(Paged, frozen=True, kw_only=True):
    node: str = ""
    pool: str = ""


class IpamHandlers:
    def __init__(self, ipam: Ipam) -> None:
        self._ipam = ipam

    async def list_pools(self, _call: Call[Chosen]) -> model.Pools:
        return await self._ipam.pools()

    async def list_blocks(self, call: Call[BlockQuery]) -> model.Blocks:
        blocks = await self._ipam.blocks(call.takes.node)
        ordered = sorted(blocks, key=_block_key)
        return model.Blocks(*pages.page(call.takes, ordered, _block_key))

    async def list_addresses(self, call: Call[AddressQuery]) -> model.Addresses:
        addresses = await self._ipam.addresses(call.takes.node, call.takes.pool)
        ordered = sorted(addresses, key=_address_key)
        return model.Addresses(*pages.page(call.takes, ordered, _address_key))


def routes(backends: Backends) -> tuple[AnyRoute, ...]:
    on = IpamHandlers(Ipam(backends.ipamd))
    return (
        Route(
            "GET", "/v1/ipam/pools", "Address pools and their use",
            on.list_pools, Chosen, model.Pools, items="pools",
        ),
        Route(
            "GET", "/v1/ipam/blocks", "Which node holds which block",
            on.list_blocks, BlockQuery, model.Blocks, items="blocks",
        ),
        Route(
            "GET", "/v1/ipam/addresses", "Addresses and their owners",
            on.list_addresses, AddressQuery, model.Addresses, items="addresses",
        ),
    )  # fmt: skip


def _block_key(block: model.Block) -> tuple[str, ...]:
    network = ip_network(block.cidr)
    return (block.pool, str(network.version), network.network_address.packed.hex())


def _address_key(address: model.Address) -> tuple[str, ...]:
    ip = ip_address(address.ip)
    return (address.pool, str(ip.version), ip.packed.hex())
