"""What goes wrong in a request, as OpenAI's error object."""

from __future__ import annotations

from typing import Any

from fastapi.responses import JSONResponse


class Failure(Exception):
    """A request that gets an error. `code` is for programs, the sentence for people."""

    def __init__(
        self,
        status: int,
        sentence: str,
        *,
        code: str | None = None,
        field: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(sentence)
        self.status, self.sentence, self.code, self.field, self.retry_after = status, sentence, code, field, retry_after

    @property
    def document(self) -> dict[str, Any]:
        """The error object."""
        kind = _KINDS.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.sentence, "type": kind, "param": self.field, "code": self.code}}

    def response(self) -> JSONResponse:
        """With the right status."""
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.document, self.status, headers)


_KINDS = {401: "authentication_error", 429: "rate_limit_error", 503: "service_unavailable_error"}


def full() -> Failure:
    """There is no place now."""
    sentence = "The server has as many requests as it takes: try again later."
    return Failure(429, sentence, code="queue_full", retry_after=1)


def refused(sentence: str, field: str | None = None, code: str | None = None) -> Failure:
    """The request is wrong."""
    return Failure(400, sentence, code=code, field=field)
