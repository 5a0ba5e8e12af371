"""A real HTTP server on the loopback interface that speaks /v1/chat/completions, well or badly, as a test says."""

import http.server
import json
import threading

import pytest


class Endpoint(http.server.ThreadingHTTPServer):
    """Answers every request as `respond(body)` says: (status, content type, body, headers?), or a function that writes
    to the handler itself."""

    daemon_threads = True
    request_queue_size = 512

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.respond = None
        self.requests = []
        self.release = threading.Event()  # ends every hang
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request, client_address):
        pass  # a client that hangs up in the middle is what some tests are about


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # connections stay open, as those of real servers do

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.server.requests.append((self.path, headers, body))
        answer = self.server.respond(body)
        try:
            if callable(answer):
                answer(self)
            else:
                self.send(*answer)
        except ConnectionError:  # the client has hung up
            self.close_connection = True

    def send(self, status, content_type, text, headers=None):
        self.send_response(status)
        for name, value in {"Content-Type": content_type, "Content-Length": len(text), **(headers or {})}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(text)

    def open_stream(self):
        """Headers of a reply whose length nobody knows: it ends with the connection."""
        self.close_connection = True
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()

    def write_event(self, data):
        self.wfile.write(f"data: {data if isinstance(data, str) else json.dumps(data)}\n\n".encode())
        self.wfile.flush()

    def log_message(self, *arguments):
        pass


def serve_until_released(server):
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield server
    server.release.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def endpoint(monkeypatch):
    for variable in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)
        monkeypatch.delenv(variable.lower(), raising=False)
    yield from serve_until_released(Endpoint())


@pytest.fixture
def completion():
    """A reply of 70 input and 11 output tokens."""

    def made(content, usage=None):
        usage = {"prompt_tokens": 70, "completion_tokens": 11, "total_tokens": 81} if usage is None else usage
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": content}}
        body = {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice], "usage": usage}
        return 200, "application/json", json.dumps(body).encode()

    return made
