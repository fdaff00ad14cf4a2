"""getdata.sh and tools/getdata.py, with a loopback server in place of the mirrors."""

import fcntl
import hashlib
import io
import os
import random
import subprocess
import sys
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import CORPORA, ROOT

from data import Corpus
from tools import getdata
from tools.getdata import SPECS, SPLITS, Spec

TEXTS = {
    "train": b"train <unk> words\n" * 20,
    "valid": b"valid words\n \n",
    "test": b"no newline at the end",
}
NAMES = "penn pennchar wikitext-2 wikitext-103 enwik8 all".split()
PAGE = b"<html><head><title>301 Moved Permanently</title></head></html>"


def sha256(raw):
    return hashlib.sha256(raw).hexdigest()


def zipped(files):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, raw in files.items():
            # ZipInfo has a fixed date: the bytes are the same in every process that runs tests
            archive.writestr(zipfile.ZipInfo(name), raw)
    return buffer.getvalue()


ZIP = zipped({f"toy/wiki.{split}.tokens": raw for split, raw in TEXTS.items()})
TOY_TEXTS = {split: sha256(raw) for split, raw in TEXTS.items()}


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        server, name = self.server, self.path.lstrip("/")
        body, start = server.files.get(name, b""), 0
        if server.ranges and "Range" in self.headers:
            start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
        length = server.break_after.pop(0) if server.break_after else len(body)
        served = body[start:][:length]
        # before the answer: an answer without a body ends the client's wait at its headers
        server.log.append((name, len(served)))
        if name not in server.files or "urllib" in self.headers["User-Agent"]:
            self.send_error(404)
        elif start and start >= len(body):
            self.send_error(416)
        else:
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(body) - start))
            self.end_headers()
            self.wfile.write(served)

    def log_message(self, *_):
        """Say nothing."""


@pytest.fixture
def server(monkeypatch):
    """A server with its files, its faults, and the log of (name, number of bytes served)."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        httpd.url = f"http://127.0.0.1:{httpd.server_port}"
        httpd.files, httpd.ranges, httpd.log = {"toy.zip": ZIP}, True, []
        httpd.break_after = []  # the next answers end after so many bytes
        thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield httpd
        httpd.shutdown()
        thread.join()


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Get the corpus toy of these URLs, or the named corpora of `specs`, into tmp_path."""

    def run(*urls, names=("toy",), specs=None, base_url=""):
        monkeypatch.setattr(getdata, "SPECS", specs or {"toy": Spec("toy", TOY_TEXTS, urls)})
        monkeypatch.setitem(getdata.ARCHIVES, "toy.zip", sha256(ZIP))
        monkeypatch.setenv("DATA_DIR", str(tmp_path))
        monkeypatch.setenv("BASE_URL", base_url)
        return getdata.main(list(names))

    return run


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def assert_in_place(data_dir):
    """The corpus is there, and the folder of its downloads is not."""
    assert [path.name for path in data_dir.iterdir()] == ["toy"]
    assert contents(data_dir / "toy") == {f"{split}.txt": raw for split, raw in TEXTS.items()}


def test_archive(server, run, tmp_path, capsys):
    assert run(f"{server.url}/toy.zip") == 0
    (tmp_path / ".toy.download").mkdir()  # left by a run that was killed at its end
    assert run(f"{server.url}/toy.zip") == 0
    assert_in_place(tmp_path)
    assert "already in" in capsys.readouterr().out
    assert server.log == [("toy.zip", len(ZIP))]


def test_resumes_in_the_same_run_and_in_the_next(server, run, tmp_path, capsys):
    server.break_after = [10] * getdata.TRIES + [0]
    assert run(f"{server.url}/toy.zip") == 1, "after so many connections it gives up"
    assert f"the connection ended after 50 of {len(ZIP):,} bytes" in capsys.readouterr().err
    assert run(f"{server.url}/toy.zip") == 1, "after a connection without any bytes, at once"
    assert not (tmp_path / "toy").exists()
    assert run(f"{server.url}/toy.zip") == 0
    assert_in_place(tmp_path)
    assert [served for _, served in server.log] == [10] * getdata.TRIES + [0, len(ZIP) - 50]


@pytest.mark.parametrize(
    ("left", "ranges", "served"),
    [
        (ZIP, True, []),
        (ZIP[:200], False, [len(ZIP)]),
        (PAGE, True, [len(ZIP) - len(PAGE), len(ZIP)]),
        (ZIP + PAGE, True, [0, len(ZIP)]),
        (None, True, [len(ZIP)]),
    ],
    ids=["complete", "a server that ignores ranges", "wrong", "too long", "a pipe"],
)
def test_what_an_earlier_run_left(server, run, tmp_path, left, ranges, served):
    server.ranges = ranges
    (tmp_path / ".toy.download").mkdir()
    if left is None:
        os.mkfifo(tmp_path / ".toy.download" / "toy.zip")
    else:
        (tmp_path / ".toy.download" / "toy.zip").write_bytes(left)
    assert run(f"{server.url}/toy.zip") == 0
    assert_in_place(tmp_path)
    assert [length for _, length in server.log] == served


def test_error_page_as_archive_and_the_next_mirror(server, run, tmp_path, capsys):
    server.files = {f"new/toy.{split}.txt": raw for split, raw in TEXTS.items()}
    server.files["old/toy.zip"] = PAGE
    assert run(f"{server.url}/old/toy.zip", f"{server.url}/new/toy.*.txt") == 0
    assert_in_place(tmp_path)
    fault = f"{server.url}/old/toy.zip: {len(PAGE)} bytes came without the checksum {sha256(ZIP)}"
    assert fault in capsys.readouterr().err


def test_no_source_works(server, run, tmp_path, capsys):
    gone, nowhere = f"{server.url}/gone/toy.zip", "http://127.0.0.1:9"
    assert run(gone, f"{nowhere}/*.txt", "nonsense/toy.zip") == 1
    assert not (tmp_path / "toy").exists()
    error = capsys.readouterr().err
    assert f"{gone}: HTTP Error 404" in error
    assert f"{nowhere}/train.txt: <urlopen error" in error
    assert "nonsense/toy.zip: unknown url type" in error
    # The files, their checksums, and where to put them
    assert f"  {gone}  {sha256(ZIP)}\n  {nowhere}/*.txt" in error
    assert "BASE_URL=file:///DIR ./getdata.sh toy" in error
    for split, checksum in TOY_TEXTS.items():
        assert f"{tmp_path / 'toy' / split}.txt  {checksum}" in error


def test_a_corpus_that_fails_does_not_stop_the_others(server, run, tmp_path, capsys):
    url = (f"{server.url}/toy.zip",)
    bad = Spec("bad", {**TOY_TEXTS, "test": "0"}, url)
    assert run(specs={"bad": bad, "toy": Spec("toy", TOY_TEXTS, url)}, names=["all"]) == 1
    assert "test.txt is missing or does not have the checksum 0" in capsys.readouterr().err
    assert not (tmp_path / "bad").exists()
    assert contents(tmp_path / "toy").keys() == {f"{split}.txt" for split in SPLITS}


def test_base_url_is_the_only_place_asked(server, run, tmp_path, tmp_path_factory):
    urls = ("http://a.invalid/toy.zip", "http://b.invalid/toy.zip")
    assert run(*urls, base_url=f"{server.url}/mirror/") == 1
    assert server.log == [("mirror/toy.zip", 0)], "once for what several mirrors have"
    mirror = tmp_path_factory.mktemp("mirror")
    (mirror / "toy.zip").write_bytes(ZIP)
    assert run(*urls, base_url=f"file://{mirror}") == 0
    assert_in_place(tmp_path)


@pytest.mark.parametrize("renames", range(6))
def test_files_of_the_user_are_kept(server, run, tmp_path, monkeypatch, capsys, renames):
    """Also by a run that is stopped before its next rename, as by a kill, and by the run after."""
    mine = {"notes": b"0", "train.txt.old": b"1", "train.txt": b"2", "valid.txt": b"3"}
    (tmp_path / "toy").mkdir()
    for name, raw in mine.items():
        (tmp_path / "toy" / name).write_bytes(raw)
    rename, done = Path.rename, []

    def rename_or_stop(path, target):
        if len(done) == renames:
            raise KeyboardInterrupt
        done.append(rename(path, target))

    monkeypatch.setattr(Path, "rename", rename_or_stop)
    stopped = run(f"{server.url}/toy.zip") == 130
    assert stopped == (renames < 5)
    assert stopped == ("getdata.sh: stopped; the next run" in capsys.readouterr().err)
    monkeypatch.setattr(Path, "rename", rename)
    assert run(f"{server.url}/toy.zip") == 0
    assert len(server.log) == 1
    found = contents(tmp_path / "toy")
    assert {split: found.pop(f"{split}.txt") for split in SPLITS} == TEXTS
    kept = {"notes": b"0", "train.txt.old": b"1", "train.txt.old.old": b"2", "valid.txt.old": b"3"}
    assert found == kept


def test_two_runs_at_once(server, run, tmp_path, capsys):
    handle = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    assert run(f"{server.url}/toy.zip") == 1
    assert "another getdata is at work" in capsys.readouterr().err
    assert server.log == []
    os.close(handle)
    assert run(f"{server.url}/toy.zip") == 0


def test_characters_of_words(server, run, tmp_path, capsys):
    made = {
        "train.txt": b"t r a i n _ < u n k > _ w o r d s \n " * 20,
        "valid.txt": b"v a l i d _ w o r d s \n \n ",
        "test.txt": b"n o _ n e w l i n e _ a t _ t h e _ e n d \n ",
    }
    texts = {name.removesuffix(".txt"): sha256(raw) for name, raw in made.items()}
    toy = Spec("toy", TOY_TEXTS, (f"{server.url}/toy.zip",))
    specs = {"toy": toy, "chars": Spec("chars", texts, words="toy")}
    server.files.clear()
    assert run(specs=specs, names=["chars"]) == 1
    assert "toy: no source worked" in capsys.readouterr().err
    assert not (tmp_path / "chars").exists()
    server.files["toy.zip"] = ZIP
    assert run(specs=specs, names=["chars"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["chars", "toy"]
    assert contents(tmp_path / "chars") == made


@pytest.mark.parametrize("chunk", [1, 7, 1 << 18])
def test_bytes_as_numbers(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(getdata, "CHUNK", chunk)
    raw = bytes(range(256)) + random.Random(1).randbytes(500) + b"\n\nend\n"
    getdata.bytes_to_texts(raw, 100, tmp_path)
    parts = {"train": raw[:-200], "valid": raw[-200:-100], "test": raw[-100:]}
    for split, part in parts.items():
        numbers = " ".join("\n" if byte == 10 else str(byte) for byte in part)
        assert (tmp_path / f"{split}.txt").read_text() == numbers
    assert len(Corpus(tmp_path, cache=False).test) == 100, "a newline is an <eos>: a token a byte"


def test_enwik8_archive(tmp_path, monkeypatch):
    (tmp_path / "enwik8.zip").write_bytes(zipped({"enwik8": b"raw"}))
    seen = []
    monkeypatch.setattr(getdata, "bytes_to_texts", lambda *given: seen.append(given))
    getdata.unzip(tmp_path / "enwik8.zip", tmp_path)
    assert seen == [(b"raw", 5_000_000, tmp_path)]


def command(*names, cwd, **environ):
    environ = {**os.environ, "PYTHON": sys.executable, **environ}
    argv = [ROOT / "getdata.sh", *names]
    return subprocess.run(argv, cwd=cwd, env=environ, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("names", "environ", "status", "words"),
    [
        (["penn", "nonesuch"], {}, 2, [f"'{name}'" for name in NAMES]),
        ([], {}, 2, ["required: NAME"]),
        (["penn"], {"PYTHON": "no-such-python"}, 1, ["there is no no-such-python"]),
        (["penn"], {"DATA_DIR": str(ROOT / "getdata.sh")}, 1, ["name another folder in DATA_DIR"]),
    ],
)
def test_what_cannot_be_done(tmp_path, names, environ, status, words):
    done = command(*names, cwd=tmp_path, **{"DATA_DIR": str(tmp_path / "data"), **environ})
    assert done.returncode == status
    assert [word for word in words if word not in done.stderr] == []
    assert list(tmp_path.iterdir()) == [], "nothing was begun"


@pytest.mark.corpora
def test_the_real_corpora(server, tmp_path):
    if not CORPORA.is_dir():
        pytest.skip(f"the full corpora are not in {CORPORA}")
    for name in ("penn", "pennchar", "wikitext-2"):
        assert getdata.wrong_files(SPECS[name], CORPORA / name) == []
    server.files = {f"ptb.{path.name}": path.read_bytes() for path in CORPORA.glob("penn/*.txt")}
    done = command("pennchar", cwd=tmp_path, DATA_DIR="here", BASE_URL=server.url)
    assert (done.returncode, done.stderr) == (0, "")
    for name in ("penn", "pennchar"):
        assert getdata.wrong_files(SPECS[name], tmp_path / "here" / name) == []
