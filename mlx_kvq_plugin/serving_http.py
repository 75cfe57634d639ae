"""mlx-lm's HTTP handler, with the report and with errors that clients understand."""

from __future__ import annotations

import json
import logging
import sys
from http.server import ThreadingHTTPServer
from typing import Any

from mlx_lm import server

from .errors import KVQError

log = logging.getLogger(__name__)


class Handler(server.APIHandler):
    """mlx-lm's, with the report and with errors as HTTP answers."""

    def do_GET(self) -> None:
        """Also `/v1/kvq`."""
        if self.path.partition("?")[0] != "/v1/kvq":
            super().do_GET()
            return
        try:
            status, body = 200, self.response_generator.report()
        except KVQError as error:
            status, body = 503, {"error": {"message": str(error), "type": type(error).__name__, "code": 503}}
        self._reply(status, body)

    def _reply(self, status: int, body: dict[str, Any]) -> None:
        text = json.dumps(body).encode()
        self._set_completion_headers(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)
        self.wfile.flush()

    def _set_completion_headers(self, status_code: int = 200) -> None:
        error = sys.exception()
        if status_code == 404 and error is not None:
            raise error  # mlx-lm would answer 404 to whatever went wrong; handle_completion tells it better
        super()._set_completion_headers(status_code)

    def _set_stream_headers(self, status_code: int = 200) -> None:
        self._streaming = True
        super()._set_stream_headers(status_code)

    def handle_completion(self, request: Any, stop_words: list[str]) -> None:
        """As mlx-lm's; an error becomes an answer in OpenAI's format, or the last event of a stream."""
        self._streaming = False
        try:
            super().handle_completion(request, stop_words)
        except ConnectionError:
            log.info("kvq: a client left before its answer was complete")
            self.close_connection = True
        except Exception as error:
            self.close_connection = True
            self._tell(error)

    def _tell(self, error: Exception) -> None:
        wrong = isinstance(error, ValueError)
        status = 400 if wrong else 404 if isinstance(error, OSError) else 500  # OSError: no such model
        log.log(logging.INFO if wrong else logging.ERROR, "kvq: a request failed: %s", error)
        kind = "invalid_request_error" if status < 500 else "server_error"
        body = {"error": {"message": str(error), "type": kind, "param": None, "code": status}}
        try:
            if self._streaming:
                self.wfile.write(f"data: {json.dumps(body)}\n\n".encode())
                self.wfile.flush()
            else:
                self.__dict__.pop("_headers_buffer", None)  # of the answer that did not come: nothing was sent yet
                self._reply(status, body)
        except ConnectionError:
            pass


class HTTPServer(ThreadingHTTPServer):
    """With a queue for many clients that connect at once."""

    request_queue_size = 128
