"""What a foreign web page may ask of `touchline serve`: nothing. Each test speaks real HTTP to a real server.

test_app.py has the same for `touchline app`.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.responses import PlainTextResponse
from test_serve import Model, Served, jpeg

from touchline.commands import app
from touchline.commands.serve import Limits
from touchline.core import guard
from touchline.core.errors import ParamsError
from touchline.core.paths import Paths

EVIL = "http://evil.example"


@pytest.fixture(scope="module")
def start(params_with: Callable[..., Any]) -> Iterator[Callable[..., Served]]:
    started = []

    def start(**options: Any) -> Served:
        started.append(Served(params_with(), Model(), Limits(), **options))
        return started[-1]

    yield start
    for served in started:
        served.end()


@pytest.fixture(scope="module")
def on_loopback(start: Callable[..., Served]) -> Served:
    return start()


@pytest.fixture(scope="module")
def on_every_address(start: Callable[..., Served]) -> Served:
    """As with --host 0.0.0.0 --allowed-host touchline.example.com; it listens on loopback all the same."""
    return start(host="0.0.0.0", allowed_hosts=["touchline.example.com"])


@pytest.mark.parametrize("path", ["/predict", "/docs", "/openapi.json", "/ping", "/"])
@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:{port}", "10.evil.example", "127.0.0.1.evil.example", "localhost.evil.example",
     "10.0.0.1:{port}", "127.0.0.1@evil.example", "evil.example, localhost", "localhost:1:{port}", "", ":1", "[::1"],
)  # fmt: skip
def test_a_page_whose_name_was_made_to_point_here_learns_nothing(on_loopback: Served, host: str, path: str) -> None:
    method, body = ("POST", jpeg()) if path == "/predict" else ("GET", None)
    host = host.format(port=on_loopback.port)
    before = len(on_loopback.model.batches)
    status, said, _ = on_loopback.ask(method, path, body, Host=host)
    assert status == 403 and "--allowed-host" in said["detail"] and "planted" not in str(said)
    # As from such a page: the origin is the same as the host.
    assert on_loopback.ask(method, path, body, Host=host, Origin=f"http://{host}")[0] == 403
    assert len(on_loopback.model.batches) == before


@pytest.mark.parametrize(
    "origin",
    [EVIL, "null", "http://localhost:3000", "http://127.0.0.1", "https://127.0.0.1.evil.example", "", "file://",
     "http://127.0.0.1:{port}.evil.example", "http://evil.example@127.0.0.1:{port}", "http://localhost:{port}"],
)  # fmt: skip
def test_a_page_of_another_origin_may_not_ask(on_loopback: Served, origin: str) -> None:
    origin = origin.format(port=on_loopback.port)
    before = len(on_loopback.model.batches)
    for kind in ("image/jpeg", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
        status, _, headers = on_loopback.predict(jpeg(), Origin=origin, Content_Type=kind)
        assert status == 403 and "access-control-allow-origin" not in headers
    asked = {"Access_Control_Request_Method": "POST", "Access_Control_Request_Private_Network": "true"}
    status, _, headers = on_loopback.ask("OPTIONS", "/predict", Origin=origin, **asked)
    assert status == 403 and not [name for name in headers if name.lower().startswith("access-control")]
    assert on_loopback.ask("GET", "/ping", Origin=origin)[0] == 403
    assert len(on_loopback.model.batches) == before


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_a_page_may_link_to_the_server_and_neither_embed_nor_fetch_it(on_loopback: Served, site: str) -> None:
    def as_browser(method: str, mode: str, dest: str) -> int:
        headers = {"Sec_Fetch_Site": site, "Sec_Fetch_Mode": mode, "Sec_Fetch_Dest": dest}
        return on_loopback.ask(method, "/ping" if method == "GET" else "/predict", jpeg(), **headers)[0]

    assert as_browser("GET", "navigate", "document") == 200
    for method, mode, dest in (
        ("GET", "no-cors", "image"), ("GET", "no-cors", "script"), ("GET", "navigate", "iframe"),
        ("GET", "cors", "empty"), ("POST", "navigate", "document"), ("POST", "no-cors", "empty"),
    ):  # fmt: skip
        assert as_browser(method, mode, dest) == 403


def test_the_user_is_answered_under_each_name_of_the_server(on_loopback: Served) -> None:
    for name in ("localhost", "127.0.0.1", "[::1]", "LocalHost"):
        # A forwarded port is another one than the server's own.
        for host in (name, f"{name}:{on_loopback.port}", f"{name}:9999"):
            # A program sends no Origin, the server's own page does; behind a proxy with TLS it begins with https.
            for headers in ({}, {"Origin": f"http://{host}"}, {"Origin": f"https://{host}"}):
                same = {"Sec_Fetch_Site": "same-origin", "Sec_Fetch_Mode": "cors", "Sec_Fetch_Dest": "empty"}
                assert on_loopback.predict(jpeg(), Host=host, **headers, **same)[0] == 200, (host, headers)


def test_on_every_address_it_answers_to_addresses_and_to_the_names_that_were_allowed(on_every_address: Served) -> None:
    # No page can have these names: a rebound page has one that its owner chose.
    for host in ("192.168.1.5:8000", "[fe80::1]:8000", "localhost:8000", "touchline.example.com", "10.0.0.1"):
        assert on_every_address.ask("GET", "/ping", Host=host)[0] == 200
        assert on_every_address.predict(jpeg(), Host=host, Origin=f"http://{host}")[0] == 200
        assert on_every_address.predict(jpeg(), Host=host, Origin=EVIL)[0] == 403
    for host in ("evil.example", "a.touchline.example.com", "10.evil.example", "example.com"):
        assert on_every_address.ask("GET", "/ping", Host=host)[0] == 403


@pytest.mark.parametrize("name", ["http://touchline.example.com", "touchline.example.com:8000", "", "a b"])
def test_an_allowed_host_that_no_request_would_match_is_one_line(name: str) -> None:
    with pytest.raises(ParamsError, match="--allowed-host") as raised:
        guard.Guard(PlainTextResponse("hello"), "127.0.0.1", ["::1", "box", name])
    assert name in str(raised.value)


def test_the_page_refuses_such_a_name_before_it_looks_for_a_model(tmp_path: Path, params_with: Callable) -> None:
    with pytest.raises(ParamsError, match="--allowed-host"):
        app.run(Paths(tmp_path, tmp_path), params_with(), "", "127.0.0.1", 0, ["http://touchline.example.com"])


def test_no_answer_may_be_framed_or_taken_for_another_type(on_loopback: Served) -> None:
    answers = [
        on_loopback.ask("GET", "/ping"), on_loopback.predict(jpeg()), on_loopback.predict(b"<html>"),
        on_loopback.ask("GET", "/nothing"), on_loopback.ask("GET", "/ping", Host="evil.example"),
    ]  # fmt: skip
    assert [status for status, *_ in answers] == [200, 200, 422, 404, 403]
    for _, _, headers in answers:
        assert headers["x-content-type-options"] == "nosniff"
        assert "frame-ancestors 'none'" in headers.get_all("content-security-policy")
        assert headers["cross-origin-resource-policy"] == "same-origin"
