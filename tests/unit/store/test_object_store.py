"""The expert store over obstore's real S3 client, against a small S3 on loopback."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from see_ray.errors import ConflictError, StoreError
from see_ray.store.expert_store import ExpertStore
from see_ray.store.records import ExpertRef, ExpertSequence


class SmallS3(ThreadingHTTPServer):
    """One bucket: put, put-if-absent, get, and listing from an offset, two objects a page."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.lock = threading.Lock()
        self.lose_answers_to = ""  # a put of a key with this end is done, and then answered with 500, once
        self.forbid = False


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: SmallS3

    def do_PUT(self) -> None:
        key, body = self._key(), self.rfile.read(int(self.headers["Content-Length"]))
        with self.server.lock:
            if self.server.forbid:
                return self._answer(403, b"<Error><Code>AccessDenied</Code></Error>")
            if self.headers.get("If-None-Match") == "*" and key in self.server.objects:
                return self._answer(412)
            self.server.objects[key] = body
            if self.server.lose_answers_to and key.endswith(self.server.lose_answers_to):
                self.server.lose_answers_to = ""
                return self._answer(500)
        self._answer(200)

    def do_GET(self) -> None:
        query = {name: values[0] for name, values in parse_qs(urlsplit(self.path).query).items()}
        self.server.requests.append(unquote(self.path))
        if self.server.forbid:
            self._answer(403, b"<Error><Code>AccessDenied</Code></Error>")
        elif "list-type" in query:
            self._answer(200, self._listing(query))
        elif self._key() in self.server.objects:
            self._answer(200, self.server.objects[self._key()])
        else:
            self._answer(404, b"<Error><Code>NoSuchKey</Code></Error>")

    def _listing(self, query: dict[str, str]) -> bytes:
        after = query.get("continuation-token") or query.get("start-after", "")
        keys = sorted(key for key in self.server.objects if key.startswith(query["prefix"]) and key > after)
        page, rest = keys[:2], keys[2:]
        items = "".join(
            f"<Contents><Key>{key}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified><ETag>x</ETag>"
            f"<Size>{len(self.server.objects[key])}</Size></Contents>"
            for key in page
        )
        more = f"<NextContinuationToken>{page[-1]}</NextContinuationToken>" if rest else ""
        return f"<ListBucketResult>{items}{more}</ListBucketResult>".encode()

    def _key(self) -> str:
        return unquote(urlsplit(self.path).path).removeprefix("/bucket/")

    def _answer(self, status: int, body: bytes = b"") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", '"x"')
        self.send_header("Last-Modified", formatdate(usegmt=True))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[SmallS3]:
    server = SmallS3()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield server
    server.shutdown()
    server.server_close()


def save(store: ExpertStore, tmp_path: Path, name: str = "sa") -> ExpertRef:
    folder = tmp_path / "adapter"
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text("{}")
    manifest = store.save(
        folder, name=name, task="t", base_model="b", fingerprint="f", form="full", activation_tokens=None,
        generation_prompt=(1,), indicator_tokens=(2, 3), threshold=0.5, metrics={}, r=4,
    )  # fmt: skip
    return manifest.ref


def test_the_whole_life_of_an_expert_in_a_bucket(s3: SmallS3, tmp_path: Path) -> None:
    store = ExpertStore.open("s3://bucket/team")
    for name in ("qa", "sa", "pe"):
        store.publish(save(store, tmp_path, name))
    store.remove("qa")
    assert [ref.id for ref in ExpertStore.open("s3://bucket/team").head().experts] == ["sa@1", "pe@1"]
    assert [sequence.version for sequence in store.history()] == [1, 2, 3, 4]
    assert "team/sequence/00000004.json" in s3.objects
    fetched = store.fetch(store.resolve("sa"), tmp_path / "cache")
    assert (fetched / "adapter_config.json").read_text() == "{}"
    assert len(store.experts()) == 3


def test_a_lost_race_in_a_bucket_takes_the_next_version(s3: SmallS3, tmp_path: Path) -> None:
    store, rival = ExpertStore.open("s3://bucket/team"), ExpertStore.open("s3://bucket/team")
    ours, theirs = save(store, tmp_path, "sa"), save(store, tmp_path, "qa")

    def race(head: ExpertSequence) -> None:
        if not head.experts:
            rival.publish(theirs)

    sequence = store.publish(ours, check=race)
    assert [ref.id for ref in sequence.experts] == ["qa@1", "sa@1"]


def test_a_put_whose_answer_got_lost_is_known_as_our_own(s3: SmallS3, tmp_path: Path) -> None:
    store = ExpertStore.open("s3://bucket")
    s3.lose_answers_to = "claim"
    ref = save(store, tmp_path)
    assert (ref.id, s3.lose_answers_to) == ("sa@1", "")
    s3.lose_answers_to = "00000001.json"
    assert store.publish(ref).version == 1
    with pytest.raises(ConflictError):
        store.publish(ref)


def test_head_of_a_long_log_is_two_requests(s3: SmallS3, tmp_path: Path) -> None:
    store = ExpertStore.open("s3://bucket")
    for name in ("qa", "sa", "pe"):
        store.publish(save(store, tmp_path, name))
    store.head()
    s3.requests.clear()
    assert store.head().version == 3
    assert len(s3.requests) == 2


def test_refused_credentials_say_which_variables_hold_them(s3: SmallS3) -> None:
    s3.forbid = True
    with pytest.raises(StoreError, match=r"cannot list sequence/ in .*AWS_ACCESS_KEY_ID"):
        ExpertStore.open("s3://bucket").head()


def test_a_bucket_out_of_reach_is_a_store_error(monkeypatch: pytest.MonkeyPatch, s3: SmallS3) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    with pytest.raises(StoreError, match="check the address, the network"):
        ExpertStore.open("s3://bucket").head()
