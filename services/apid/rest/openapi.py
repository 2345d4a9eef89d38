"""The OpenAPI 3.1 document, from the route table and the structs it names.

Every status a route can answer is listed; there is no `default`, so that an answer the document
does not know is a mistake of one of the two.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib.metadata import version
from typing import Any, Final

import msgspec

from services.apid.rest import errors
from services.apid.rest.errors import KIND_OF, PROBLEM_JSON, Kind, Problem
from services.apid.rest.fields import object_of
from services.apid.rest.params import Chosen, Paged
from services.apid.rest.route import AnyRoute, Body, Route, Stream, variables
from services.apid.rest.sse import EVENT_STREAM, PROBLEM
from services.runtime.errors import NotFound

Json = dict[str, Any]
_Kinds = dict[type[msgspec.Struct], Json]

_REF: Final = "#/components/schemas/{name}"
_ABOUT: Final = """\
Errors are application/problem+json (RFC 9457); branch on `type`. An unknown query parameter is an
error. A GET carries an ETag and heeds If-None-Match. Lists that grow have `limit` and `cursor`; the
next cursor is `next` in the body and in the Link header. `fields` leaves out every other field.
Event streams heed Last-Event-ID.

Problem types:

"""
_ETAG: Final = {"description": "Changes with the body.", "schema": {"type": "string"}}
_LINK: Final = {
    "description": "The next page, rel=next; absent on the last.",
    "schema": {"type": "string"},
}
_RETRY_AFTER: Final = {"description": "Seconds.", "schema": {"type": "integer"}}
_ETAGS: Final = r'^(\*|(W/)?"[!#-~]*"(, *(W/)?"[!#-~]*")*)$'


def document(routes: Sequence[AnyRoute]) -> Json:
    kinds = sorted(_named(routes), key=lambda kind: kind.__name__)
    schemas, components = msgspec.json.schema_components(kinds, ref_template=_REF)
    schema_of: _Kinds = dict(zip(kinds, schemas, strict=True))
    paths: dict[str, Json] = {}
    for route in routes:
        operation = (
            _stream(route, schema_of)
            if isinstance(route, Stream)
            else _operation(route, schema_of, components)
        )
        paths.setdefault(route.path, {})[route.method.lower()] = operation
    tags = dict.fromkeys(_tag(route) for route in routes)
    types = "".join(f"- `{kind.type}` ({kind.status}): {kind.title}\n" for kind in errors.KINDS)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Tessera",
            "version": version("tessera"),
            "description": _ABOUT + types,
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "tags": [{"name": tag} for tag in tags],
        "paths": paths,
        "components": {"schemas": components},
    }


def _named(routes: Iterable[AnyRoute]) -> set[type[msgspec.Struct]]:
    named: set[type[msgspec.Struct]] = {Problem}
    for route in routes:
        match route:
            case Stream():
                named.update(route.events.values())
            case Route():
                named.update((route.answer, route.refusal))
                named.update(body.schema for body in route.body if body.schema is not None)
    return named


def _operation(route: Route[Any], schema_of: _Kinds, components: Json) -> Json:
    schema = schema_of[route.answer]
    if issubclass(route.takes, Chosen):
        schema = _with_optional_fields(route, components)
    done: Json = {"description": "Done", "content": {"application/json": {"schema": schema}}}
    if route.example is not None:
        done["content"]["application/json"]["example"] = msgspec.to_builtins(route.example)
    responses: Json = {"200": done}
    if route.method == "GET":
        done["headers"] = {"ETag": _ETAG}
        if issubclass(route.takes, Paged):
            done["headers"]["Link"] = _LINK
        responses["304"] = {
            "description": "The body is the one that If-None-Match names",
            "headers": {"ETag": _ETAG},
        }
    responses |= _refusals(_kinds_of(route), route.refusal, schema_of)
    operation: Json = {
        **_head(route),
        "parameters": [*_parameters(route), *_conditions(route)],
        "responses": responses,
    }
    if route.body:
        content = {one.content_type: _content(one, schema_of) for one in route.body}
        operation["requestBody"] = {"required": True, "content": content}
    return operation


def _stream(route: Stream[Any], schema_of: _Kinds) -> Json:
    events: dict[str, type[msgspec.Struct]] = {**route.events, PROBLEM: Problem}
    words = [
        f"- `{name}`: `{kind.__name__}`. {_first_line(kind)}\n" for name, kind in events.items()
    ]
    resume = {
        "name": "Last-Event-ID",
        "in": "header",
        "required": False,
        "description": "The `id` last seen: what came after it follows.",
        "schema": {"type": "string"},
    }
    done = {
        "description": "Events until either end goes",
        "content": {EVENT_STREAM: {"schema": {"type": "string"}}},
    }
    return {
        **_head(route),
        "description": "Server-sent events; `data` is JSON:\n\n" + "".join(words),
        "parameters": [*_parameters(route), resume],
        "responses": {"200": done, **_refusals(_kinds_of(route), Problem, schema_of)},
        "x-events": {name: schema_of[kind] for name, kind in events.items()},
    }


def _head(route: AnyRoute) -> Json:
    tag = _tag(route)
    name = route.handler.__name__.strip("_")
    return {
        "operationId": name if tag in name else f"{tag}_{name}",
        "summary": route.summary,
        "tags": [tag],
    }


def _tag(route: AnyRoute) -> str:
    return route.path.split("/")[2]


def _kinds_of(route: AnyRoute) -> list[Kind]:
    kinds = {errors.BAD_QUERY, errors.BAD_HEADER, errors.NOT_ACCEPTABLE, errors.INTERNAL}
    kinds |= {errors.UNAVAILABLE, errors.UNUSABLE}
    kinds |= {KIND_OF[raised] for raised in route.raises}
    if variables(route.path):
        kinds.add(KIND_OF[NotFound])
    if issubclass(route.takes, Paged):
        kinds |= {errors.BAD_CURSOR, errors.CURSOR_EXPIRED}
    if isinstance(route, Route) and (route.method == "GET" or route.guarded):
        kinds.add(errors.PRECONDITION_FAILED)
    if isinstance(route, Route) and route.method != "GET":
        # Any write may meet another, and a full store.
        kinds |= {errors.CONFLICT, errors.EXHAUSTED}
    if isinstance(route, Route) and route.body:
        kinds |= {errors.BAD_BODY, errors.TOO_LARGE, errors.BAD_MEDIA_TYPE}
    return [kind for kind in errors.KINDS if kind in kinds]


def _refusals(kinds: Iterable[Kind], refusal: type[Problem], schema_of: _Kinds) -> Json:
    by_status: dict[int, list[Kind]] = {}
    for kind in kinds:
        by_status.setdefault(kind.status, []).append(kind)
    responses: Json = {}
    for status, those in sorted(by_status.items()):
        schema = schema_of[refusal if errors.INVALID in those else Problem]
        response: Json = {
            "description": "; ".join(f"{kind.title} (`{kind.type}`)" for kind in those),
            "content": {PROBLEM_JSON: {"schema": schema}},
        }
        if errors.UNAVAILABLE in those:
            response["headers"] = {"Retry-After": _RETRY_AFTER}
        responses[str(status)] = response
    return responses


def _content(body: Body, schema_of: _Kinds) -> Json:
    schema: Json = {} if body.schema is None else schema_of[body.schema]
    return {"schema": schema, **({"example": body.example} if body.example else {})}


def _parameters(route: AnyRoute) -> list[Json]:
    in_path = variables(route.path)
    described = msgspec.json.schema(route.takes)["$defs"][route.takes.__name__]
    parameters: list[Json] = []
    for name, full in described["properties"].items():
        schema = dict(full)
        parameter = {
            "name": name,
            "in": "path" if name in in_path else "query",
            "required": name in in_path or name in described["required"],
        }
        if words := schema.pop("description", ""):
            parameter["description"] = words
        if examples := schema.pop("examples", ()):
            parameter["example"] = examples[0]
        parameters.append({**parameter, "schema": schema})
    return parameters


def _conditions(route: Route[Any]) -> list[Json]:
    names = ["If-None-Match", "If-Match"] if route.method == "GET" or route.guarded else []
    return [
        {
            "name": name,
            "in": "header",
            "required": False,
            "description": "Entity tags as an ETag header gave them, or *.",
            "schema": {"type": "string", "pattern": _tags_of(name, route)},
        }
        for name in names
    ]


def _tags_of(name: str, route: Route[Any]) -> str:
    """A write may insist that there is nothing, not that there is something else."""
    return r"^\*$" if route.guarded and name == "If-None-Match" else _ETAGS


def _with_optional_fields(route: Route[Any], components: Json) -> Json:
    """The schema of the answer, with nothing required of what `fields` may leave out."""
    whole = components[route.answer.__name__]
    if not route.items:
        return {key: value for key, value in whole.items() if key != "required"}
    item = object_of(route).__name__
    some = {key: value for key, value in components[item].items() if key != "required"}
    properties = whole["properties"] | {route.items: {"type": "array", "items": some}}
    return {**whole, "properties": properties}


def _first_line(kind: type[msgspec.Struct]) -> str:
    return (kind.__doc__ or "").partition("\n")[0]
