"""The loopback server fails in the ways the tests of the download count on."""

import asyncio
import base64
import hashlib
import time
from http.client import IncompleteRead
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import aiohttp
import pytest
from servers import Fault, Host

CONTENT = bytes(range(256)) * 1000


@pytest.fixture
def host():
    with Host() as host:
        yield host


def get(url: str, timeout: float = 10, **headers: str):
    with urlopen(
        Request(url, headers={name.replace("_", "-"): value for name, value in headers.items()}), timeout=timeout
    ) as answer:
        return answer.status, answer.headers, answer.read()


def error_of(url: str, **headers: str) -> HTTPError:
    with pytest.raises(HTTPError) as caught:
        get(url, **headers)
    caught.value.body = caught.value.read()
    caught.value.close()
    return caught.value


def test_a_file_comes_whole_with_its_length_etag_type_and_the_hash_google_sends(host):
    host.put("/v7/x.csv", CONTENT, hash=True, content_type="text/csv")
    status, headers, body = get(f"{host.url}/v7/x.csv")
    assert (status, body) == (200, CONTENT)
    assert headers["Content-Length"] == "256000" and headers["Content-Type"] == "text/csv"
    assert headers["Accept-Ranges"] == "bytes" and headers["ETag"] == f'"{hashlib.md5(CONTENT).hexdigest()}"'
    md5 = base64.b64encode(hashlib.md5(CONTENT).digest()).decode()
    assert headers["x-goog-hash"].endswith(f",md5={md5}")
    host.put("/v7/x.csv", CONTENT, hash="two")
    assert get(f"{host.url}/v7/x.csv")[1].get_all("x-goog-hash")[1] == f"md5={md5}"
    host.put("/v7/x.csv", CONTENT, hash="wrong")
    assert "md5=" in (sent := get(f"{host.url}/v7/x.csv")[1]["x-goog-hash"]) and md5 not in sent


def test_a_file_is_served_from_disk_and_head_gives_its_length(host, tmp_path):
    (tmp_path / "x.csv").write_bytes(CONTENT)
    host.put("/x.csv", tmp_path / "x.csv")
    assert get(f"{host.url}/x.csv")[2] == CONTENT
    with urlopen(Request(f"{host.url}/x.csv", method="HEAD")) as answer:
        assert answer.headers["Content-Length"] == "256000"
    assert [request.method for request in host.requests] == ["GET", "HEAD"]
    assert host.count("/x.csv") == host.served("/x.csv") == 1


def test_an_empty_file_is_served_whole(host):
    host.put("/empty", b"")
    assert get(f"{host.url}/empty")[2] == b"" and host.served("/empty") == 1


def test_a_range_comes_as_206_and_one_beyond_the_end_as_416(host):
    host.put("/x", CONTENT)
    status, headers, body = get(f"{host.url}/x", Range="bytes=1000-1999")
    assert (status, body) == (206, CONTENT[1000:2000]) and headers["Content-Range"] == "bytes 1000-1999/256000"
    assert host.served("/x") == 0
    assert get(f"{host.url}/x", Range="bytes=255000-")[2] == CONTENT[255000:] and host.served("/x") == 1
    assert get(f"{host.url}/x", Range="bytes=255000-999999")[2] == CONTENT[255000:]
    beyond = error_of(f"{host.url}/x", Range="bytes=256000-")
    assert beyond.code == 416 and beyond.headers["Content-Range"] == "bytes */256000"
    assert [request.range for request in host.requests][-1] == "bytes=256000-"


def test_a_range_of_a_file_that_has_changed_since_is_answered_with_the_whole_new_file(host):
    host.put("/x", CONTENT)
    etag = get(f"{host.url}/x")[1]["ETag"]
    assert get(f"{host.url}/x", Range="bytes=10-", If_Range=etag)[0] == 206
    host.put("/x", CONTENT, faults=[Fault.changed(b"other bytes")])
    status, headers, body = get(f"{host.url}/x", Range="bytes=10-", If_Range=etag)
    assert (status, body) == (200, b"other bytes") and headers["ETag"] != etag
    assert get(f"{host.url}/x")[2] == b"other bytes"


def test_a_path_that_is_not_there_is_404_in_the_xml_of_s3(host):
    missing = error_of(f"{host.url}/train/none.jpg")
    assert missing.code == 404 and b"<Code>NoSuchKey</Code>" in missing.body
    assert host.requests[0].status == 404 and host.served("/train/none.jpg") == 0


def test_faults_happen_one_a_request_in_their_order_and_then_the_file_comes(host):
    host.put("/x", CONTENT, faults=[Fault.status(503, retry_after=0.1), Fault.reset(), Fault.cut(after=1000)])
    assert error_of(f"{host.url}/x").headers["Retry-After"] == "0.1"
    with pytest.raises((ConnectionResetError, URLError)) as reset:
        get(f"{host.url}/x")
    assert isinstance(getattr(reset.value, "reason", reset.value), ConnectionResetError)
    with pytest.raises(IncompleteRead) as cut:
        get(f"{host.url}/x")
    assert cut.value.partial == CONTENT[:1000]
    assert host.served("/x") == 0
    assert get(f"{host.url}/x")[2] == CONTENT
    assert host.count("/x") == 4 and host.served("/x") == 1
    assert [request.status for request in host.requests] == [503, 0, 200, 200]


def test_a_permanent_fault_is_never_used_up(host):
    host.put("/x", CONTENT, faults=[Fault.status(403).always()])
    assert [error_of(f"{host.url}/x").code for _ in range(3)] == [403] * 3


def test_a_stall_stops_after_its_bytes_and_ends_with_the_rest(host):
    host.put("/x", CONTENT, faults=[Fault.stall(after=500, seconds=30), Fault.stall(after=500, seconds=0.01)])
    with urlopen(f"{host.url}/x", timeout=0.3) as answer:
        assert answer.read(500) == CONTENT[:500]
        with pytest.raises(TimeoutError):
            answer.read()
    assert get(f"{host.url}/x")[2] == CONTENT


def test_a_slow_answer_takes_its_time(host):
    host.put("/x", CONTENT[:2000], faults=[Fault.slow(bytes_per_second=10_000)])
    began = time.monotonic()
    assert get(f"{host.url}/x")[2] == CONTENT[:2000]
    # Only ever later than asked for, however busy the machine.
    assert time.monotonic() - began >= 0.2


def test_a_login_page_a_redirect_and_a_server_without_ranges(host):
    host.put("/x", CONTENT, faults=[Fault.html(), Fault.redirect("/y"), Fault.no_ranges(), Fault.other_range()])
    host.put("/y", b"elsewhere")
    status, headers, body = get(f"{host.url}/x")
    assert status == 200 and headers["Content-Type"].startswith("text/html") and b"Sign in" in body
    assert get(f"{host.url}/x")[2] == b"elsewhere"
    status, headers, body = get(f"{host.url}/x", Range="bytes=1000-1999")
    assert (status, body) == (200, CONTENT) and "Accept-Ranges" not in headers
    status, headers, body = get(f"{host.url}/x", Range="bytes=1000-1999")
    assert (status, body) == (206, CONTENT[:1000]) and headers["Content-Range"] == "bytes 0-999/256000"


def test_a_host_that_is_down_drops_its_connections_and_comes_back_on_the_same_port(host):
    host.put("/x", CONTENT, faults=[Fault.stall(after=500, seconds=30)])
    url = f"{host.url}/x"
    with urlopen(url, timeout=10) as answer:
        assert answer.read(500) == CONTENT[:500]
        host.down()
        with pytest.raises((IncompleteRead, ConnectionResetError)):
            answer.read()
    with pytest.raises(URLError):
        get(url)
    host.up()
    assert get(url)[2] == CONTENT


def test_the_greatest_number_of_requests_at_once_is_the_clients_own_limit(host):
    host.latency = 0.01
    host.put("/x", CONTENT)

    async def download(connections: int, photos: int) -> None:
        limit = aiohttp.TCPConnector(limit=connections)
        async with aiohttp.ClientSession(connector=limit) as session:

            async def one() -> None:
                async with session.get(f"{host.url}/x") as answer:
                    assert await answer.read() == CONTENT

            await asyncio.gather(*(one() for _ in range(photos)))

    asyncio.run(download(connections=4, photos=100))
    assert host.max_open == 4
    assert host.count("/x") == host.served("/x") == 100
