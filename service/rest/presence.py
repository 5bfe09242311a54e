"""What a request's client does while it is worked on: leave, send too slowly, or still send when it is answered."""

import asyncio

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.errors import DrainingError
from service.rest.problems import REFUSAL, Refused, problem_from_error
from service.rest.safe_headers import add_headers

LEFT = "sam.left"  # in a request's scope: its client is gone


class ClientPresence:
    """Ends the work for a client that left, and the connection of one that was answered before it had sent all.

    The first: once the request's body is here, somebody must listen for the client's leaving, or nobody hears of it
    before the answer is sent. The second: what is left of the body would have to be read before the connection could be
    of use again; a client that is told so can stop sending.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = _Request(scope, receive, send)
        try:
            await self._app(scope, request.receive, request.send)
        except asyncio.CancelledError:
            if LEFT not in scope and request.began:
                raise
            request.task.uncancel()
            if LEFT not in scope:  # the server ends, and has waited for this request as long as it may
                await _answer_for_the_end(scope, receive, send)
        finally:
            request.stop_listening()


async def _answer_for_the_end(scope: Scope, receive: Receive, send: Send) -> None:
    answer = problem_from_error(DrainingError("the server was shut down meanwhile; send the request again, elsewhere"))
    answer.headers["connection"] = "close"
    add_headers(answer.headers)
    await answer(scope, receive, send)


def _announces_body(headers: Headers) -> bool:
    return headers.get("content-length", "0") != "0" or "transfer-encoding" in headers


class _Request:
    """One request under way, in the current task."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("there is no task to end")
        self.task = task
        self.began = False  # to be answered
        self._scope = scope
        self._receive = receive
        self._send = send
        self._owes_body = _announces_body(Headers(scope=scope))
        self._answered = False
        self._listener: asyncio.Task[None] | None = None

    async def receive(self) -> Message:
        """Pass on what the client sends; from the end of the body on, listen for its leaving.

        Raises:
            Refused: the server has something to say of how the body comes.
        """
        message = await self._receive()
        if REFUSAL in self._scope:
            raise Refused(*self._scope[REFUSAL])
        if message["type"] == "http.disconnect" and self._listener is None and not self._answered:
            self._scope[LEFT] = True
            raise asyncio.CancelledError  # past the framework, which would make an answer for nobody, at some cost
        if message["type"] == "http.request" and not message.get("more_body", False):
            self._owes_body = False
            if self._listener is None:
                self._listener = asyncio.create_task(self._listen())
        return message

    async def send(self, message: Message) -> None:
        """Pass on the answer."""
        self.began = True
        if message["type"] == "http.response.start" and self._owes_body:
            message = {**message, "headers": [*message.get("headers", []), (b"connection", b"close")]}
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            self._answered = True  # before it is sent: the server calls the end of an answer a disconnect, too
        await self._send(message)

    async def _listen(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        if not self._answered:
            self._scope[LEFT] = True
            self.task.cancel()

    def stop_listening(self) -> None:
        """Let the task go on, whatever the client does."""
        if self._listener is not None:
            self._listener.cancel()
