"""The OpenAPI 3.1 document, from the route table and the structs it names."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.metadata import version
from typing import Final

import msgspec

from services.apid import model
from services.apid.routes import Route

Json = dict[str, object]

_REF: Final = "#/components/schemas/{name}"
_VARIABLE: Final = re.compile(r"\{(\w+)\}")


def document(routes: Sequence[Route]) -> Json:
    named: set[type[msgspec.Struct]] = {model.Problem, model.Refused}
    named.update(route.answer for route in routes)
    named.update(body for route in routes for _, body in route.body if body is not None)
    kinds = sorted(named, key=lambda kind: kind.__name__)
    schemas, components = msgspec.json.schema_components(kinds, ref_template=_REF)
    schema_of: dict[type[msgspec.Struct], Json] = dict(zip(kinds, schemas, strict=True))
    paths: dict[str, Json] = {}
    for route in routes:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route, schema_of)
    return {
        "openapi": "3.1.0",
        "info": {"title": "Tessera", "version": version("tessera")},
        "paths": paths,
        "components": {"schemas": components},
    }


def _operation(route: Route, schema_of: dict[type[msgspec.Struct], Json]) -> Json:
    refusal = schema_of[model.Refused if route.path == "/v1/policies" else model.Problem]
    operation: Json = {
        "operationId": route.handler.__name__,
        "summary": route.summary,
        "parameters": [*_path_parameters(route), *_query_parameters(route)],
        "responses": {
            "200": _content({"application/json": schema_of[route.answer]}, "Done"),
            "422": _content({"application/problem+json": refusal}, "The input is refused"),
            "default": _content(
                {"application/problem+json": schema_of[model.Problem]}, "Anything else"
            ),
        },
    }
    if route.body:
        content = {
            kind: {"schema": {} if body is None else schema_of[body]} for kind, body in route.body
        }
        operation["requestBody"] = {"required": True, "content": content}
    return operation


def _content(content: dict[str, Json], description: str) -> Json:
    return {
        "description": description,
        "content": {kind: {"schema": schema} for kind, schema in content.items()},
    }


def _path_parameters(route: Route) -> list[Json]:
    return [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name in _VARIABLE.findall(route.path)
    ]


def _query_parameters(route: Route) -> list[Json]:
    schema = msgspec.json.schema(route.query)
    fields = schema["$defs"][route.query.__name__]
    return [
        {
            "name": name,
            "in": "query",
            "required": name in fields["required"],
            "schema": described,
        }
        for name, described in fields["properties"].items()
    ]
