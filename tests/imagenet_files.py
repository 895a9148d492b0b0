"""Files of ImageNet in their real formats, and servers that answer as Kaggle and Hugging Face do."""

import hashlib
import io
import json
import re
import tarfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np

from touchline.sources import sample

RUGBY, RUGBY_BALL = "n00470966", "n04118538"
SOCCER, SOCCER_BALL, SOCCER_PLAYER = "n00478262", "n04254680", "n10618342"


def photo(number: int) -> bytes:
    """A small JPEG; another number, another photo."""
    pixels = np.random.default_rng(number).integers(0, 256, (12, 16, 3), np.uint8)
    return sample.encode(pixels, "jpg")


def synset(wnid: str, numbers: Iterable[int]) -> dict[str, bytes]:
    """Photos of a synset by the names that they have in its tar."""
    return {f"{wnid}_{number}.JPEG": photo(number + int(wnid[1:])) for number in numbers}


def member(name: str, size: int = 0, **facts: object) -> tarfile.TarInfo:
    """Header of a member: `member("a.JPEG", type=tarfile.SYMTYPE, linkname="/etc/passwd")`."""
    info = tarfile.TarInfo(name)
    info.size = size
    for fact, value in facts.items():
        setattr(info, fact, value)
    return info


def tar_of(
    files: Mapping[str, bytes], others: Iterable[tarfile.TarInfo] = (), tar_format: int = tarfile.GNU_FORMAT
) -> bytes:
    """A tar with `files`, then members that have no content."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tar_format) as tar:
        for name, content in files.items():
            tar.addfile(member(name, len(content)), io.BytesIO(content))
        for other in others:
            tar.addfile(other)
    return buffer.getvalue()


def training_list(photos: Iterable[str]) -> bytes:
    """Kaggle's LOC_train_solution.csv for photos named `n04118538_10.JPEG`."""
    rows = [f"{name.removesuffix('.JPEG')},{name.partition('_')[0]} 1 2 30 40 \n" for name in photos]
    return ("ImageId,PredictionString\n" + "".join(rows)).encode()


def shard(rows: Iterable[tuple[str, bytes, int]]) -> bytes:
    """A Parquet file of `ILSVRC/imagenet-1k` of rows (path, content, label)."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = list(rows)
    image = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    table = pa.table(
        {
            "image": pa.array([{"bytes": content, "path": path} for path, content, _ in rows], image),
            "label": pa.array([label for _, _, label in rows], pa.int64()),
        }
    )
    label = {"_type": "ClassLabel", "names": [f"name {number}" for number in range(1000)]}
    features = {"info": {"features": {"image": {"_type": "Image"}, "label": label}}}
    buffer = io.BytesIO()
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(features)}), buffer, row_group_size=10)
    return buffer.getvalue()


# What a site answers to (method, path without query, Range, body): status, headers, content.
Answer = tuple[int, dict[str, str], bytes]
Site = Callable[[str, str, str, bytes], Answer]


@contextmanager
def serving(site: Site) -> Iterator[str]:
    """The URL of a server on loopback that answers as `site` says."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path = self.path.partition("?")[0]
            status, headers, content = site(self.command, path, self.headers.get("Range", ""), body)
            self.send_response(status)
            for name, value in (headers | {"Content-Length": str(len(content))}).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_GET = do_HEAD = do_POST = answer  # noqa: N815 - the names that the library calls

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def as_json(value: object) -> Answer:
    return 200, {"Content-Type": "application/json"}, json.dumps(value).encode()


def kaggle_site(files: Mapping[str, bytes], refusal: int = 0) -> Site:
    """Kaggle with one competition; `refusal` is the status in place of its files."""

    def site(method: str, path: str, _range: str, body: bytes) -> Answer:
        if path.endswith("/IntrospectToken"):
            return as_json({"active": json.loads(body)["token"] == "right", "username": "someone"})
        if path.endswith("/DownloadDataFile") and refusal:
            return refusal, {"Content-Type": "application/json"}, b'{"code": %d, "message": "no"}' % refusal
        if path.endswith("/DownloadDataFile"):
            return 302, {"Location": f"/storage/{json.loads(body)['fileName']}"}, b""
        return 200, {"Content-Type": "application/octet-stream"}, files[path.removeprefix("/storage/")]

    return site


def hub_site(files: Mapping[str, bytes], read: list[str], refusal: int = 0) -> Site:
    """Hugging Face with the data set `ILSVRC/imagenet-1k`; the files that were read are appended to `read`."""
    commit = "a" * 40

    def site(method: str, path: str, wanted: str, _body: bytes) -> Answer:
        name = "ILSVRC/imagenet-1k"
        missing = 404, {"X-Error-Code": "EntryNotFound"}, b"{}"
        if about := re.fullmatch(rf"/api/datasets/{name}(.*)", path):
            if refusal:
                return refusal, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"}, b"{}"
            if tree := re.fullmatch(r"/tree/[^/]+/?(.*)", about[1]):
                entries = [{"type": "file", "path": path, "size": len(files[path]), "oid": "0"} for path in files]
                top = [{"type": "directory", "path": "data", "size": 0, "oid": "0"}]
                return as_json(entries if tree[1] else top)
            facts = {"private": False, "gated": "auto", "disabled": False, "tags": [], "downloads": 0, "likes": 0}
            return as_json({"id": name, "sha": commit, "siblings": [{"rfilename": path} for path in files]} | facts)
        found = re.fullmatch(rf"/datasets/{name}/resolve/[^/]+/(.*)", path)
        if not found or found[1] not in files:
            return missing
        content = files[found[1]]
        headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if method == "GET":
            read.append(found[1])
        if part := re.fullmatch(r"bytes=(\d+)-(\d*)", wanted):
            first, last = int(part[1]), min(int(part[2] or len(content)), len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            return 206, headers, content[first : last + 1]
        return 200, headers, content

    return site
