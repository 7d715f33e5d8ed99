"""What a server refuses, and what it keeps to itself."""

from __future__ import annotations

import contextlib
import http.client
import json
import logging
import re
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import lightrm.serving
from lightrm.cli import main
from lightrm.errors import InputError
from lightrm.serving.limits import Access, Limits
from tests.serving import Fake, ask, serving, until

KEY = "0123456789abcdef"
SMALL = Limits(body=2000, texts=4, longest=1500, waiting=6, seconds=0.6)
GOOD = {"prompt": "p", "responses": ["an answer"]}
PAGE = Path(lightrm.serving.__file__).parent / "page"


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with serving(Fake(), limits=SMALL) as found:
        yield found


def refused(port: int, path: str, body: Any, headers: dict[str, str] | None = None) -> tuple[int, str]:
    status, answer, _ = ask(port, path, body, headers)
    assert set(answer) == {"error"}
    assert set(answer["error"]) == {"type", "message"}
    assert ask(port, "/score", GOOD)[0] == 200, "the next request is answered"
    return status, answer["error"]["message"]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "the body is not JSON"),
        (b"{", "the body is not JSON"),
        (b"\xff\xfe", "the body is not JSON"),
        (b'{"prompt": "p", "responses": [NaN]}', "the body is not JSON"),
        (b'{"prompt": "\\ud800", "responses": ["x"]}', "the body is not JSON"),
        (b"[" * 900 + b"]" * 900, "the body is not JSON"),
        ([1], "expected a JSON object with 'prompt' and 'responses', or 'queries' and 'documents'; found list"),
        ({"prompts": "p"}, "found the fields 'prompts'"),
        ({}, "found the fields none"),
        ({"prompt": 3, "responses": ["x"]}, "prompt.str: Input should be a valid string"),
        ({"prompt": "p", "responses": "x"}, "responses: Input should be a valid list"),
        ({"prompt": "p", "responses": [None]}, "responses.0"),
        ({"responses": ["x"]}, "prompt: Field required"),
        ({"prompt": [{"role": "assistant", "content": "x"}], "responses": ["x"]}, "must end in a user turn"),
        ({"prompt": [{"role": "king", "content": "x"}], "responses": ["x"]}, "role 'king' is none of"),
        ({"prompt": "p", "responses": [{"role": "user", "content": "x"}]}, "expected an assistant's"),
        ({"prompt": "p", "responses": ["refused"]}, "a refused text"),
        ({"queries": ["a", "b"], "documents": ["x", "y", "z"]}, "one for each of 3 documents; found 2"),
    ],
)
def test_what_is_not_understood(port: int, body: Any, said: str) -> None:
    status, message = refused(port, "/score", body)
    assert (status, said in message) == (400, True), message


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        (
            "/rerank",
            {"query": "q", "documents": [{"txt": "x"}]},
            "documents.0.DocumentAsked.text: Field required",
        ),
        ("/rerank", {"query": "q", "documents": ["x"], "top_n": -1}, "top_n"),
        ("/classify", {"input": [1, 2]}, "input"),
        ("/v1/embeddings", {"input": ""}, "text 0 is empty"),
        ("/get_reward", {"query": [3]}, "query"),
        ("/get_reward", {"prompt": "p"}, "expected a JSON object with 'query', or 'prompt' and 'response'"),
        ("/get_reward?templated=1", {"prompt": [{"role": "user", "content": "x"}], "response": "y"}, "found turns"),
    ],
)
def test_what_other_forms_do_not_understand(port: int, path: str, body: Any, said: str) -> None:
    status, message = refused(port, path, body)
    assert (status, said in message) == (400, True), message


def test_no_such_address(port: int) -> None:
    status, message = refused(port, "/nothing", {})
    assert (status, "/get_reward" in message) == (404, True)
    assert refused(port, "/score/", GOOD)[0] == 404
    assert ask(port, "/score")[0] == 405
    assert ask(port, "/health", {})[0] == 405
    assert ask(port, "/health", b"x", {"Content-Type": "text/plain"})[0] == 405


def test_sizes(port: int) -> None:
    long = {"prompt": "p", "responses": ["x" * 3000]}
    assert refused(port, "/score", long) == (413, "a request has at most 2000 bytes: send fewer answers at once")
    huge = {"prompt": "p", "responses": ["x" * 40_000]}
    assert refused(port, "/score", huge)[0] == 413
    chunks = (json.dumps(long).encode()[k : k + 100] for k in range(0, 3000, 100))
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request("POST", "/score", chunks, {"Content-Type": "application/json"}, encode_chunked=True)
    assert connection.getresponse().status == 413
    connection.close()
    for path, body in (
        ("/score", {"prompt": "x" * 800, "responses": ["y" * 800]}),
        ("/classify", {"input": "x" * 1600}),
    ):
        status, message = refused(port, path, body)
        assert (status, message.startswith("a text with its prompt has at most 1500 characters, found 16")) == (
            413,
            True,
        )
    many = {"prompt": "p", "responses": ["x"] * 5}
    assert refused(port, "/score", many) == (413, "a request has at most 4 texts, found 5: send fewer at once")


def test_a_long_prompt_with_many_answers_is_no_small_request() -> None:
    """A short answer is read with its whole prompt: 8 MiB with 1024 answers would take the tokenizer a minute."""
    with serving(Fake(), limits=Limits(body=2000, texts=64)) as port:
        prompt = "p" * 1200
        assert ask(port, "/score", {"prompt": prompt, "responses": ["x"] * 20})[0] == 200
        for path, body in (
            ("/score", {"prompt": prompt, "responses": ["x"] * 40}),
            ("/score", {"queries": prompt, "documents": ["x"] * 40}),
            ("/rerank", {"query": prompt, "texts": ["x"] * 40}),
        ):
            status, message = refused(port, path, body)
            assert (status, "at most 32000 characters, a prompt's counted with each" in message) == (413, True)


def test_kinds_of_content(port: int) -> None:
    """A form that another web page sends needs no leave of the browser; JSON does."""
    body = json.dumps(GOOD).encode()
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        assert refused(port, "/score", body, {"Content-Type": kind})[0] == 415
    assert refused(port, "/score", body, {"Content-Encoding": "gzip"})[0] == 415
    assert ask(port, "/score", body, {"Content-Type": "application/json; charset=utf-8"})[0] == 200


def test_too_much_that_waits() -> None:
    rm = Fake()
    rm.gate.clear()
    with serving(rm, limits=SMALL) as port, ThreadPoolExecutor(4) as pool:
        first = pool.submit(ask, port, "/score", GOOD)
        rm.entered.wait(10)
        asked = [pool.submit(ask, port, "/score", {"prompt": "p", "responses": ["x"] * 3}) for _ in range(2)]
        until(lambda: "lightrm_texts_waiting 6.0" in ask(port, "/metrics")[1])
        status, answer, headers = ask(port, "/score", GOOD)
        assert (status, answer["error"]["type"]) == (429, "Busy")
        assert {name.lower(): value for name, value in headers.items()}["retry-after"] == "1"
        rm.gate.set()
        assert [one.result()[0] for one in (first, *asked)] == [200] * 3
        assert ask(port, "/score", GOOD)[0] == 200


def test_slow_clients_do_not_stay(port: int) -> None:
    head = b"POST /score HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 50\r\n\r\n"
    for sent, expected in ((head + b'{"prom', b"HTTP/1.1 408"), (b"POST /score HTT", b""), (b"", b"")):
        with socket.create_connection(("127.0.0.1", port), timeout=10) as slow:
            slow.sendall(sent)
            assert ask(port, "/score", GOOD)[0] == 200
            assert slow.recv(1000).startswith(expected)  # without one, the server closes the connection
    with socket.create_connection(("127.0.0.1", port), timeout=10) as slow:
        slow.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        slow.recv(1000)
        started = time.monotonic()
        for letter in b"GET /health HTTP/1.1\r\nX: ":  # a second request, letter by letter
            try:
                slow.sendall(bytes([letter]))
            except OSError:
                break
            time.sleep(0.1)
        assert time.monotonic() - started < 2


def test_an_answer_that_is_not_read_does_not_stay() -> None:
    """Nor does it keep the server from ending: `serving` would say that it has not."""
    document = "x" * 4_000_000
    body = json.dumps({"query": "q", "documents": [document]}).encode()
    head = f"POST /rerank HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    limits = Limits(longest=2**23, seconds=1)
    with serving(Fake(), limits=limits) as port, contextlib.ExitStack() as stack:
        gone, read = (stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=10)) for _ in range(2))
        for one in (gone, read):
            one.sendall(head.encode() + b"\r\n\r\n" + body)
        found = b""
        while document.encode() not in found:
            found += read.recv(1_000_000)
        assert found.startswith(b"HTTP/1.1 200")
        time.sleep(2 * limits.seconds)
        with contextlib.suppress(ConnectionResetError):
            left = sum(map(len, iter(lambda: gone.recv(1_000_000), b"")))
            assert left < len(document), "what lay in the system's buffers"
        leaving = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=10))
        leaving.sendall(head.encode() + b"\r\n\r\n" + body)
        leaving.recv(1)  # and no more, while the server ends


def test_many_requests_on_one_connection(port: int) -> None:
    """A client may send the next before it reads the first: each gets its answer, and none is taken for a goodbye."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
        get = b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n"
        client.sendall(get * 400)
        time.sleep(0.3)  # longer than it takes to fill the buffers
        client.sendall(get.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
        found = b"".join(iter(lambda: client.recv(1_000_000), b""))
    assert found.count(b"HTTP/1.1 200 OK") == 401


def test_what_is_no_http_is_refused_in_json(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
        client.sendall(b"\x16\x03\x01 secret\r\n\r\n")
        head, _, body = b"".join(iter(lambda: client.recv(1000), b"")).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 Bad Request\r\n")
    assert b"content-type: application/json" in head
    assert json.loads(body)["error"] == {"type": "InvalidRequest", "message": "this is not an HTTP request"}


def test_who_may_ask() -> None:
    with pytest.raises(InputError, match=r"others could reach 0\.0\.0\.0 without a key: pass --api-key"):
        Access("0.0.0.0")
    for host in ("192.168.0.3", "example.org", "::", ""):
        with pytest.raises(InputError, match="without a key"):
            Access(host)
    for key in ("short", "a key with spaces in it", "ключ от всех дверей"):
        with pytest.raises(InputError, match="16 ASCII characters or more"):
            Access("127.0.0.1", key)
    for host in ("127.0.0.1", "localhost", "::1", "127.3.2.1"):
        assert Access(host).local
    assert not Access("0.0.0.0", KEY).local
    found = CliRunner().invoke(main, ["serve", "demo", "--host", "0.0.0.0"], env={"LIGHTRM_API_KEY": ""})
    assert (found.exit_code, "without a key" in found.output) == (1, True)


def test_a_port_that_is_taken_is_found_before_a_model_is_loaded(port: int) -> None:
    found = CliRunner().invoke(main, ["serve", "no/such/model", "--port", str(port)], env={"LIGHTRM_API_KEY": ""})
    assert found.exit_code == 1
    assert f"no server can listen on 127.0.0.1, port {port}: Address already in use" in found.output


def test_a_key() -> None:
    with serving(Fake(), Access("127.0.0.1", KEY)) as port:
        for path in ("/", "/health", "/page.js", "/page.css"):
            assert ask(port, path)[0] == 200
        for shown in ({}, {"Authorization": "Bearer x"}, {"Authorization": KEY}, {"Authorization": f"Bearer {KEY}x"}):
            for path in ("/v1/models", "/metrics", "/openapi.json", "/nothing"):
                assert ask(port, path, None, shown)[0] == 401
            status, answer, headers = ask(port, "/score", GOOD, shown)
            assert (status, answer["error"]["type"]) == (401, "Unauthorized")
            assert {name.lower(): value for name, value in headers.items()}["www-authenticate"] == "Bearer"
        shown = {"Authorization": f"Bearer {KEY}", "Host": "models.example.org"}
        assert ask(port, "/score", GOOD, shown)[0] == 200
        described = ask(port, "/openapi.json", None, shown)[1]
        assert described["security"] == [{"key": []}]


def test_a_foreign_name_for_this_machine(port: int) -> None:
    """Without a key, a web page could reach the server by a name of its own that points here."""
    for host in ("evil.example", f"evil.example:{port}", "127.0.0.1.evil.example", ""):
        assert ask(port, "/score", GOOD, {"Host": host})[0] in (400, 403)
    for host in ("localhost", f"localhost:{port}", "127.0.0.1", "[::1]", f"[::1]:{port}"):
        assert ask(port, "/score", GOOD, {"Host": host})[0] == 200


@pytest.mark.parametrize("shown", [False, True])
def test_the_log_holds_no_text(shown: bool, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with serving(Fake(), log_texts=shown) as port:
        assert ask(port, "/score", {"prompt": "secret 1", "responses": ["secret 2"]})[0] == 200
        assert ask(port, "/classify", {"input": "secret 3"})[0] == 200
        if not shown:
            assert ask(port, "/score", {"prompt": "secret", "responses": ["secret crash"]})[0] == 500
            assert ask(port, "/score", {"prompt": 3, "responses": ["secret"], "secret": 1})[0] == 400
            assert ask(port, "/score", b'{"secret": ')[0] == 400
            assert ask(port, "/secret?secret=secret")[0] == 404
            assert ask(port, "/health?secret=secret")[0] == 200
    assert "POST /score 200" in caplog.text
    assert ("secret 1" in caplog.text, "secret 2" in caplog.text, "secret 3" in caplog.text) == (shown,) * 3
    assert shown or "secret" not in caplog.text


def test_the_page_takes_nothing_from_elsewhere(port: int) -> None:
    _, page, headers = ask(port, "/")
    policy = {name.lower(): value for name, value in headers.items()}["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    for name in ("page.html", "page.js", "page.css"):
        text = (PAGE / name).read_text()
        assert not re.search(
            r"https?:|innerHTML|insertAdjacentHTML|document\\.write|eval\(| style=| on[a-z]+=", text
        ), name
        assert text == (page if name == "page.html" else ask(port, f"/{name}")[1])
