"""The download, against a server on this machine: resuming, starting anew, what can go wrong."""
import gzip
import hashlib
import http.server
import re
import socket
import threading

import pytest

import data
from lib.cli import DataError
from sources import download
from sources.prepare import prepare

CONTENT = b"".join(b"Once upon a time there was a cat number %d.\n<|endoftext|>\n" % i for i in range(50_000))
FILE = "TinyStories-train.txt"


class Server(http.server.ThreadingHTTPServer):
    """Serves `content` under every path and keeps the Range header of each request."""
    daemon_threads = True

    def __init__(self, content=CONTENT, ranges=True, status=200, cut=None):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.ranges, self.status, self.cut, self.requests = content, ranges, status, cut, []
        self.mirror = f"http://127.0.0.1:{self.server_port}/"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server, wanted = self.server, self.headers.get("Range")
        server.requests.append(wanted)
        begin = int(re.match(r"bytes=(\d+)-", wanted)[1]) if wanted and server.ranges else 0
        if begin and begin >= len(server.content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(server.content)}")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        self.send_response(206 if begin else server.status)
        if begin:
            size = len(server.content)
            self.send_header("Content-Range", f"bytes {begin}-{size - 1}/{size}")
        self.send_header("Content-Length", str(len(server.content) - begin))
        self.end_headers()
        self.wfile.write(server.content[begin:server.cut])

    def log_message(self, *_):
        pass


@pytest.fixture(autouse=True)
def expect_our_content(monkeypatch):
    monkeypatch.setitem(download.SHA256, FILE, hashlib.sha256(CONTENT).hexdigest())
    monkeypatch.setenv("no_proxy", "*")


@pytest.fixture
def serve():
    """serve(...) starts a Server with these arguments; all are stopped at the end."""
    servers = []

    def start(**arguments):
        servers.append(Server(**arguments))
        threading.Thread(target=servers[-1].serve_forever, args=(0.01,), daemon=True).start()
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def closed_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}/"


def fetch(tmp_path, *mirrors):
    return download.fetch(FILE, list(mirrors), tmp_path).read_bytes()


def test_a_file_is_downloaded_once(tmp_path, serve):
    server = serve()
    assert fetch(tmp_path, server.mirror) == CONTENT and fetch(tmp_path, server.mirror) == CONTENT
    assert server.requests == [None] and [p.name for p in tmp_path.iterdir()] == [FILE]


def test_a_partial_download_goes_on_from_where_it_stopped(tmp_path, serve):
    server = serve()
    (tmp_path / f"{FILE}.part").write_bytes(CONTENT[:1000])
    assert fetch(tmp_path, server.mirror) == CONTENT and server.requests == ["bytes=1000-"]


def test_a_server_that_cannot_resume_makes_it_start_anew(tmp_path, serve):
    server = serve(ranges=False)
    (tmp_path / f"{FILE}.part").write_bytes(CONTENT[:1000])
    assert fetch(tmp_path, server.mirror) == CONTENT and server.requests == ["bytes=1000-"]


def test_a_complete_partial_file_is_not_downloaded_again(tmp_path, serve):
    server = serve()
    (tmp_path / f"{FILE}.part").write_bytes(CONTENT)
    assert fetch(tmp_path, server.mirror) == CONTENT and len(server.requests) == 1


def test_a_partial_file_longer_than_the_file_is_thrown_away(tmp_path, serve):
    server = serve()
    (tmp_path / f"{FILE}.part").write_bytes(CONTENT + b"x")
    assert fetch(tmp_path, server.mirror) == CONTENT
    assert server.requests == [f"bytes={len(CONTENT) + 1}-", None]


def test_a_broken_connection_is_an_error_and_the_next_mirror_goes_on_from_there(tmp_path, serve):
    broken, good = serve(cut=2000), serve()
    with pytest.raises(DataError):
        fetch(tmp_path, broken.mirror)
    assert [p.name for p in tmp_path.iterdir()] == [f"{FILE}.part"]
    assert fetch(tmp_path, good.mirror) == CONTENT and good.requests == ["bytes=2000-"]


def test_a_wrong_checksum_is_refused_and_the_wrong_bytes_are_not_kept(tmp_path, serve):
    wrong = serve(content=b"<html>please log in to the hotel's network</html>")
    with pytest.raises(DataError):
        fetch(tmp_path, wrong.mirror)
    assert not list(tmp_path.iterdir())
    assert fetch(tmp_path, wrong.mirror, serve().mirror) == CONTENT


def test_gzip_is_judged_by_its_content_and_what_is_not_gzip_thrown_away(tmp_path, serve, monkeypatch):
    file = "train-images-idx3-ubyte.gz"
    monkeypatch.setitem(download.SHA256, file, hashlib.sha256(CONTENT).hexdigest())
    wrong, good = serve(content=CONTENT), serve(content=gzip.compress(CONTENT, 1))
    assert download.fetch(file, [wrong.mirror, good.mirror], tmp_path).read_bytes() == good.content
    assert good.requests == [None]


def test_a_partial_file_of_something_else_is_found_out(tmp_path, serve):
    (tmp_path / f"{FILE}.part").write_bytes(b"?" * 1000)
    assert fetch(tmp_path, serve().mirror, serve().mirror) == CONTENT


def test_the_first_mirror_may_be_broken(tmp_path, serve):
    assert fetch(tmp_path, closed_port(), serve(status=404).mirror, serve().mirror) == CONTENT


def test_without_a_network_one_line_names_what_was_tried_and_the_way_out(tmp_path, monkeypatch):
    ports = [closed_port(), closed_port()]
    monkeypatch.setitem(download.MIRRORS, "tinystories", ports)
    with pytest.raises(DataError) as error:
        prepare("tinystories", tmp_path / "data")
    message = str(error.value)
    assert all(port.split("/")[2] in message for port in ports) and FILE in message
    assert "--source=FOLDER" in message and "\n" not in message
    assert not list((tmp_path / "data").rglob("*.bin")) and not (tmp_path / "data" / "tinystories").exists()


def test_a_data_set_is_made_from_the_download(tmp_path, serve, monkeypatch):
    server = serve()
    monkeypatch.setitem(download.SHA256, "TinyStories-valid.txt", hashlib.sha256(CONTENT).hexdigest())
    monkeypatch.setitem(download.MIRRORS, "tinystories", [server.mirror])
    prepare("tinystories", tmp_path)
    some = data.load("tinystories", tmp_path)
    assert len(some.train.starts) == 50_000 and len(some.meta["source"]) == 2
    assert {p.name for p in tmp_path.glob("[!.]*")} == {"downloads", "tinystories"}
