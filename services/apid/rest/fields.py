"""`fields=`: the chosen fields of each object of an answer, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import get_args, get_type_hints

import msgspec

from services.apid.rest.errors import BAD_QUERY, Refusal
from services.apid.rest.route import Route


def chosen_of(route: Route[msgspec.Struct], fields: str) -> tuple[str, ...]:
    """Names, in the order given; empty for all."""
    names = tuple(dict.fromkeys(name.strip() for name in fields.split(",") if name.strip()))
    known = object_of(route).__struct_fields__
    for name in names:
        if name not in known:
            raise Refusal(BAD_QUERY, f"fields: {name!r} is not a field; known: {', '.join(known)}")
    return names


def object_of(route: Route[msgspec.Struct]) -> type[msgspec.Struct]:
    """The struct that `fields` chooses within."""
    if not route.items:
        return route.answer
    item: type[msgspec.Struct] = get_args(get_type_hints(route.answer)[route.items])[0]
    return item


def encoded(body: msgspec.Struct, items: str, names: tuple[str, ...]) -> bytes:
    if not names:
        return msgspec.json.encode(body)
    project = _projection(names)
    if not items:
        return msgspec.json.encode(project(body))
    whole = {name: getattr(body, name) for name in body.__struct_fields__}
    whole[items] = [project(one) for one in whole[items]]
    return msgspec.json.encode(whole)


def _projection(names: tuple[str, ...]) -> Callable[[object], dict[str, object]]:
    if len(names) == 1:
        (name,) = names
        return lambda one: {name: getattr(one, name)}
    values = attrgetter(*names)
    return lambda one: dict(zip(names, values(one), strict=True))
