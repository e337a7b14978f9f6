"""What is in front of the addresses: who may ask, how much, and in what form a request is refused."""

import ipaddress
import secrets
from typing import Any
from urllib.parse import urlsplit

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mdl_toolkit.errors import ToolkitError
from mdl_toolkit.i18n import Localized, Verbatim
from mdl_toolkit.serving.protocol import ForbiddenError, RequestError, TooLargeError, UnauthorizedError

# Kinds of pydantic's errors that say that there is no object at all.
NO_OBJECT = {"json_invalid", "model_attributes_type", "missing"}
# What everybody may see: the page, and whether the models answer.
PUBLIC = ("/", "/health")


class BodyLimit:
    """Refuse a request whose body is larger than is accepted, before it is held in memory."""

    def __init__(self, app: ASGIApp, most: float) -> None:
        self._app, self._most = app, most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > 1e6 * self._most:
                raise TooLargeError(
                    "the request is larger than {most:g} MB, the most that is taken here (--max-request-mb)",
                    most=self._most,
                )
            return message

        await self._app(scope, counted, send)


class Gate:
    """Refuse, before its body is read, a request of another site's page, and one without the token.

    Args:
        app: what answers the others.
        token: what requests have to send; None for nothing.
        host: the name or address that is listened at.
    """

    def __init__(self, app: ASGIApp, token: str | None, host: str) -> None:
        self._app, self._token, self._names = app, token, ("localhost", host.lower())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        try:
            if scope["type"] == "http":
                self.check(Request(scope))
        except RequestError as problem:
            response = await error_response(Request(scope), problem)
            await response(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def check(self, request: Request) -> None:
        """Refuse what must not be answered.

        Raises:
            RequestError: why.
        """
        host = request.headers.get("host", "")
        # A site whose name is made to lead here is asked by its name; no name belongs to an address.
        if self._token is None and not is_address(name := host_name(host)) and name not in self._names:
            raise ForbiddenError(
                "{host}: this server is not asked by that name without a token; give --token, or --host with "
                "that name",
                host=host,
            )
        if request.url.path in PUBLIC:
            return
        site, origin = request.headers.get("sec-fetch-site"), request.headers.get("origin")
        is_foreign = origin is not None and urlsplit(origin).netloc != host
        if site not in ("same-origin", "none") if site is not None else is_foreign:
            raise ForbiddenError("pages of other sites are not answered ({origin})", origin=origin or site)
        sent = request.headers.get("authorization", "").removeprefix("Bearer ").encode("latin-1")
        if self._token is not None and not secrets.compare_digest(sent, self._token.encode()):
            raise UnauthorizedError("the token is missing or wrong; send Authorization: Bearer TOKEN")


def host_name(host: str) -> str:
    """Return the name or address in a header `Host`, without port and brackets."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def is_address(name: str) -> bool:
    """Tell an IP address from a name."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def error_of(request: Request, problem: Exception) -> dict[str, Any]:
    """Return OpenAI's form of the reason why a request has no answer, in the language that it prefers."""
    status, message = 400, Localized.of(Verbatim(str(problem), str(problem)), {})
    if isinstance(problem, HTTPException):
        status = problem.status_code
        message = getattr(problem, "message", Verbatim(problem.detail, problem.detail))
    elif isinstance(problem, ToolkitError):
        message = problem.message
    elif isinstance(problem, RequestValidationError | ValidationError):
        # Of several ways to be right, the last one is the one with parts.
        last = problem.errors()[-1]
        where = ".".join(part for part in map(str, last["loc"]) if part.isidentifier() or part.isdecimal())
        where, reason = where.removeprefix("body").removeprefix("."), last["msg"]
        message = Localized("{where}: {reason}", where=where, reason=reason)
        if last["type"] == "json_invalid" or (last["type"] in NO_OBJECT and not where):
            message = Localized(
                "the request: expected a JSON object, as application/json ({reason})", reason=reason
            )
    wanted = request.headers.get("accept-language", "")[:2]
    text = {"zh": message.zh, "en": message.en}.get(wanted, str(message))
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"message": text, "type": kind, "param": None, "code": status}


async def error_response(request: Request, problem: Exception) -> Response:
    """Answer with the reason why a request is refused."""
    error = error_of(request, problem)
    headers = {"WWW-Authenticate": "Bearer"} if error["code"] == 401 else None
    return JSONResponse({"error": error}, error["code"], headers)
