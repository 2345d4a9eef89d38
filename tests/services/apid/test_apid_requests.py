"""What every request goes through, whatever its route: forms, conditions, pages, fields, errors."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp.test_utils import TestClient, TestServer

from services.apid.app import application
from services.apid.rest.errors import KINDS
from tests.fakes.rest_table import Fruit, Orchard

Client = TestClient[Any, Any]


@pytest.fixture
def orchard() -> Orchard:
    return Orchard()


@pytest.fixture
async def client(orchard: Orchard) -> AsyncIterator[Client]:
    async with TestClient(TestServer(application(orchard.routes()))) as client:
        yield client


async def refusal(client: Client, method: str, path: str, status: int, **request: Any) -> Any:
    """The problem, which has all that RFC 9457 asks for."""
    async with client.request(method, path, **request) as response:
        assert response.status == status, await response.text()
        assert response.content_type == "application/problem+json"
        problem = await response.json(content_type=None)
        assert problem["status"] == status
        assert problem["title"]
        assert problem["detail"]
        assert problem["type"] in {kind.type for kind in KINDS}
        return problem | {"headers": dict(response.headers)}


async def names(client: Client, path: str) -> tuple[list[str], str]:
    async with client.get(path) as response:
        assert response.status == 200, await response.text()
        body = await response.json()
        return [one["name"] for one in body["fruits"]], body["next"]


def test_every_problem_type_has_one_meaning() -> None:
    assert len({kind.type for kind in KINDS}) == len(KINDS)


# ------------------------------------------------------------------ forms


@pytest.mark.parametrize(
    "accept",
    ["*/*", "application/json", "application/*;q=0.1", "text/html, */*;q=0.8", "APPLICATION/JSON"],
)
async def test_json_is_given_to_who_takes_it(client: Client, accept: str) -> None:
    async with client.get("/v1/fruits", headers={"Accept": accept}) as response:
        assert response.status == 200


@pytest.mark.parametrize(
    "accept", ["text/html", "application/json;q=0", "*/*, application/json;q=0", "image/*", ";"]
)
async def test_who_takes_no_json_is_told_what_there_is(client: Client, accept: str) -> None:
    problem = await refusal(client, "GET", "/v1/fruits", 406, headers={"Accept": accept})
    assert "application/json" in problem["detail"]


@pytest.mark.parametrize(
    ("sent", "taken"),
    [
        ("application/yaml", "application/yaml"),
        ("text/yaml; charset=utf-8", "application/yaml"),
        ("application/x-yaml", "application/yaml"),
        ("application/json", "application/json"),
    ],
)
async def test_a_body_comes_with_its_type(
    client: Client, orchard: Orchard, sent: str, taken: str
) -> None:
    async with client.post("/v1/fruits", data=b"x", headers={"Content-Type": sent}) as response:
        assert response.status == 200
    assert [(call.content_type, call.body) for call in orchard.sent] == [(taken, b"x")]


async def test_a_body_of_a_foreign_type_is_refused_with_what_is_taken(
    client: Client, orchard: Orchard
) -> None:
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    problem = await refusal(client, "POST", "/v1/fruits", 415, data=b"x", headers=form)
    assert "Content-Type: application/yaml" in problem["detail"]
    assert problem["headers"]["Accept-Post"] == "application/yaml, application/json"
    assert orchard.sent == []


async def test_a_method_that_a_path_does_not_take_is_told_which_it_does(client: Client) -> None:
    problem = await refusal(client, "PATCH", "/v1/fruits", 405)
    assert problem["headers"]["Allow"] == "GET, HEAD, POST"


async def test_head_is_get_without_the_body(client: Client) -> None:
    async with client.head("/v1/fruits") as head, client.get("/v1/fruits") as get:
        assert head.status == 200
        assert head.headers["ETag"] == get.headers["ETag"]
        assert await head.read() == b""


@pytest.mark.parametrize("number", ["x", "-1", "4294967296", "1.5", "%2F"])
async def test_a_variable_of_the_path_that_cannot_be_one_names_nothing(
    client: Client, number: str
) -> None:
    await refusal(client, "GET", f"/v1/fruits/{number}", 404)


# ------------------------------------------------------------------ conditions


async def etag(client: Client, path: str) -> str:
    async with client.get(path) as response:
        assert response.status == 200
        return response.headers["ETag"]


async def test_a_body_is_sent_once_until_it_changes(client: Client, orchard: Orchard) -> None:
    held = await etag(client, "/v1/fruits")
    for known in (held, f'"other", {held}', f"W/{held}", "*"):
        async with client.get("/v1/fruits", headers={"If-None-Match": known}) as response:
            assert (response.status, await response.read()) == (304, b"")
            assert response.headers["ETag"] == held
    orchard.fruits[0] = Fruit("apple", 101)
    async with client.get("/v1/fruits", headers={"If-None-Match": held}) as response:
        assert response.status == 200
        assert response.headers["ETag"] != held


async def test_fields_are_part_of_what_a_tag_stands_for(client: Client) -> None:
    assert await etag(client, "/v1/fruits") != await etag(client, "/v1/fruits?fields=name")


async def test_a_read_may_insist_on_what_it_knows(client: Client) -> None:
    held = await etag(client, "/v1/fruits/0")
    async with client.get("/v1/fruits/0", headers={"If-Match": held}) as response:
        assert response.status == 200
    await refusal(client, "GET", "/v1/fruits/1", 412, headers={"If-Match": held})
    await refusal(client, "GET", "/v1/fruits/0", 412, headers={"If-Match": f"W/{held}"})


async def test_a_guarded_write_hears_of_the_guard(client: Client, orchard: Orchard) -> None:
    for header in ({}, {"If-Match": "*"}, {"If-Match": '"a", "b"'}):
        async with client.delete("/v1/fruits/0", headers=header) as response:
            assert response.status == 200
    assert [call.if_match for call in orchard.sent] == [None, None, ("a", "b")]


@pytest.mark.parametrize("header", ["If-Match", "If-None-Match"])
async def test_a_guard_that_would_be_passed_over_is_refused(
    client: Client, orchard: Orchard, header: str
) -> None:
    problem = await refusal(client, "POST", "/v1/fruits", 400, data=b"", headers={header: '"a"'})
    assert header in problem["detail"]
    assert orchard.sent == []


@pytest.mark.parametrize("tags", ["a", '"a" "b"', '"', '"a",,b'])
async def test_tags_that_cannot_be_read_are_refused(client: Client, tags: str) -> None:
    await refusal(client, "GET", "/v1/fruits", 400, headers={"If-None-Match": tags})


# ------------------------------------------------------------------ pages


async def test_pages_follow_each_other_to_the_end(client: Client) -> None:
    first, following = await names(client, "/v1/fruits?limit=3")
    second, end = await names(client, f"/v1/fruits?limit=3&cursor={following}")
    assert (first, second, end) == (["apple", "lime", "pear"], ["plum"], "")


async def test_the_link_header_leads_through_the_pages(client: Client) -> None:
    path, seen = "/v1/fruits?limit=1&colour=", []
    while path:
        async with client.get(path) as response:
            seen += [one["name"] for one in (await response.json())["fruits"]]
            path = response.headers.get("Link", "").partition(">")[0].lstrip("<")
    assert seen == ["apple", "lime", "pear", "plum"]


async def test_what_comes_and_goes_meanwhile_moves_nothing(
    client: Client, orchard: Orchard
) -> None:
    _, following = await names(client, "/v1/fruits?limit=2")
    del orchard.fruits[:2]
    orchard.fruits.insert(0, Fruit("fig", 10))
    assert (await names(client, f"/v1/fruits?cursor={following}"))[0] == ["pear", "plum"]


@pytest.mark.parametrize("cursor", ["x", "%00", "AAAA", "é", "a" * 1000, "kqEx"])
async def test_a_cursor_of_nobodys_is_refused(client: Client, cursor: str) -> None:
    problem = await refusal(client, "GET", f"/v1/fruits?cursor={cursor}", 400)
    assert problem["type"].endswith(":bad-cursor")


async def test_a_cursor_belongs_to_one_query(client: Client) -> None:
    _, following = await names(client, "/v1/fruits?limit=2")
    path = f"/v1/fruits?colour=red&cursor={following}"
    problem = await refusal(client, "GET", path, 400)
    assert "other parameters" in problem["detail"]


@pytest.mark.parametrize("limit", ["0", "10001", "-1", "x", "1.5"])
async def test_a_page_has_bounds(client: Client, limit: str) -> None:
    problem = await refusal(client, "GET", f"/v1/fruits?limit={limit}", 400)
    assert "limit" in problem["detail"]


# ------------------------------------------------------------------ fields


async def test_fields_leave_out_all_others(client: Client) -> None:
    async with client.get("/v1/fruits?fields=weight_g,name&limit=1") as response:
        body = await response.json()
    assert body["fruits"] == [{"weight_g": 100, "name": "apple"}]
    assert body["next"]


async def test_a_field_that_is_not_one_is_refused_with_those_that_are(client: Client) -> None:
    problem = await refusal(client, "GET", "/v1/fruits?fields=name,size", 400)
    assert "'size'" in problem["detail"]
    assert "name, weight_g, colours" in problem["detail"]
