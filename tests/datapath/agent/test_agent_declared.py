"""Endpoints declared in a folder, on endpoints that only remember what was asked of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from datapath.agent.declared import Declared, read
from datapath.agent.endpoints import Wanted
from services.runtime.clock import SystemClock
from services.runtime.errors import Conflict, Invalid, TesseraError

GOOD = 'namespace = "shop"\nname = "db"\nnetns = "db"\nlabels = ["k8s:app=db"]\nadopt = true\n'


class Asked:
    def __init__(self) -> None:
        self.records: tuple[Wanted, ...] = ()
        self.fails: TesseraError | None = None
        self.count = 0

    async def create(self, wanted: Wanted):
        self.count += 1
        if self.fails is not None:
            raise self.fails
        self.records = (*self.records, Keyed(wanted))


class Keyed:
    def __init__(self, wanted: Wanted) -> None:
        self.wanted, self.key = wanted, (wanted.namespace, wanted.name)


def test_a_file_is_a_request_for_an_endpoint(tmp_path: Path) -> None:
    (tmp_path / "db.toml").write_text(GOOD)
    wanted = Wanted("shop", "db", ("k8s:app=db",), "db", "eth0", adopted=True)
    assert read(tmp_path / "db.toml") == wanted


@pytest.mark.parametrize(
    "text", ["", "{", "namespace = 7", GOOD + "unknown = 1\n", GOOD.replace("k8s:", "")]
)
def test_a_file_that_is_none_names_itself(tmp_path: Path, text: str) -> None:
    (tmp_path / "db.toml").write_text(text)
    with pytest.raises(Invalid):
        read(tmp_path / "db.toml")


async def test_what_is_missing_is_made_once(tmp_path: Path) -> None:
    asked = Asked()
    declared = Declared(tmp_path, asked, SystemClock())
    await declared.once()
    (tmp_path / "db.toml").write_text(GOOD)
    (tmp_path / "broken.toml").write_text("{")
    await declared.once()
    await declared.once()
    assert [record.key for record in asked.records] == [("shop", "db")]
    assert asked.count == 1


async def test_what_cannot_be_made_is_tried_again(tmp_path: Path) -> None:
    asked = Asked()
    declared = Declared(tmp_path, asked, SystemClock())
    (tmp_path / "db.toml").write_text(GOOD)
    asked.fails = Conflict("not now")
    await declared.once()
    asked.fails = None
    await declared.once()
    assert len(asked.records) == 1
