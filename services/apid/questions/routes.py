"""/v1/policies/explain and /v1/policies/diff: why, and what if."""

from __future__ import annotations

import msgspec

from services.apid.backends import Backends
from services.apid.policies.model import Refused
from services.apid.policies.routes import refusal
from services.apid.questions import model
from services.apid.questions.backend import Questions
from services.apid.rest.errors import BAD_BODY, Refusal
from services.apid.rest.route import AnyRoute, Body, Call, Nothing, Route
from services.runtime.errors import Invalid, NotFound

_CANDIDATES = (Body("application/json", model.Candidates),)


class ExplainQuery(Nothing, frozen=True):
    source: str
    target: str
    port: str


class QuestionHandlers:
    def __init__(self, questions: Questions) -> None:
        self._questions = questions

    async def explain(self, call: Call[ExplainQuery]) -> model.Explained:
        query = call.takes
        return await self._questions.explain(
            model.Connection(query.source, query.target, query.port)
        )

    async def diff(self, call: Call[Nothing]) -> model.Difference:
        try:
            asked = msgspec.json.decode(call.body, type=model.Candidates)
        except msgspec.DecodeError as error:
            raise Refusal(BAD_BODY, f"body: {error}") from error
        found = await self._questions.diff(asked)
        if any(problem.severity == "error" for problem in found.problems):
            raise refusal(found.problems, "the candidates are refused")
        return found


def routes(backends: Backends) -> tuple[AnyRoute, ...]:
    on = QuestionHandlers(Questions(backends.policyd))
    return (
        Route(
            "GET", "/v1/policies/explain", "Why a connection passes or not, at both its ends",
            on.explain, ExplainQuery, model.Explained, raises=(Invalid, NotFound),
        ),
        Route(
            "POST", "/v1/policies/diff", "What candidates would newly deny or allow",
            on.diff, Nothing, model.Difference,
            body=_CANDIDATES, raises=(Invalid, NotFound), refusal=Refused,
        ),
    )  # fmt: skip
