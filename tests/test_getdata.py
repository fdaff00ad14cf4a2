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
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from data import Corpus
from tools import getdata
from tools.getdata import SPECS, Remote, Source, Spec, Text

ROOT = Path(__file__).resolve().parent.parent
CORPORA = ROOT.parent / "shared" / "data"

TEXTS = {
    "train": "".join(f"line {n} of the <unk> text\n" for n in range(400)).encode(),
    "valid": b"valid words\n \n",
    "test": b"test words , no newline at the end",
}
PAGE = b"<html><head><title>301 Moved Permanently</title></head></html>"


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@dataclass
class Server:
    """The server's files, its behaviour, and a log of its requests."""

    url: str = ""
    files: dict = field(default_factory=dict)
    ranges: bool = True
    break_after: list = field(default_factory=list)  # cut the next responses after so many bytes
    log: list = field(default_factory=list)  # (path, Range header, bytes served, User-Agent)

    def names(self):
        return [entry[0] for entry in self.log]

    def served(self):
        return [entry[2] for entry in self.log]


@pytest.fixture
def server():
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            name = self.path.lstrip("/")
            asked = self.headers.get("Range")
            start, status = 0, 200
            body = state.files.get(name)
            if body is None:
                body, status = b"nothing here", 404
            elif asked and state.ranges:
                start, status = int(asked.removeprefix("bytes=").removesuffix("-")), 206
                if start >= len(body):
                    body, start, status = b"", 0, 416
            sent = body[start:]
            length = len(sent)
            if status < 300 and state.break_after:
                sent = sent[: state.break_after.pop(0)]
            # before the answer: an answer without a body ends the client's wait at its headers
            state.log.append((name, asked, len(sent), self.headers.get("User-Agent")))
            self.send_response(status)
            self.send_header("Content-Length", str(length))
            if status == 206:
                self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
            self.end_headers()
            self.wfile.write(sent)

        def log_message(self, *_):
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        state.url = f"http://127.0.0.1:{httpd.server_port}"
        thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield state
        httpd.shutdown()
        thread.join()


def sha256(raw):
    return f"sha256:{hashlib.sha256(raw).hexdigest()}"


def tokens(raw):
    return sum(len(line.split()) + 1 for line in io.StringIO(raw.decode()))


def zipped(texts, compression=zipfile.ZIP_DEFLATED):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for split, raw in texts.items():
            # ZipInfo has a fixed date, so the bytes are the same in every process that runs tests
            archive.writestr(zipfile.ZipInfo(f"toy/wiki.{split}.tokens"), raw, compression)
    return buffer.getvalue()


ZIP = zipped(TEXTS)
ZIP_CHECKSUM = sha256(ZIP)
TOY_TEXTS = {split: Text(sha256(raw), tokens(raw)) for split, raw in TEXTS.items()}


def zip_source(url, checksum=ZIP_CHECKSUM):
    return Source((Remote(url, checksum),), getdata.unzip_wikitext)


def toy(*sources):
    return {"toy": Spec("toy", TOY_TEXTS, sources)}


def run(specs, folder, *names, **environ):
    return getdata.main(list(names or specs), {"DATA_DIR": str(folder), **environ}, specs)


def assert_in_place(folder):
    """The corpus is there, and no partial download or scratch folder."""
    assert [path.name for path in folder.iterdir()] == ["toy"]
    found = {path.name: path.read_bytes() for path in (folder / "toy").iterdir()}
    assert found == {f"{split}.txt": raw for split, raw in TEXTS.items()}


def assert_nothing_in_place(folder):
    assert [path for path in folder.rglob("*") if path.is_file()] == []
    assert not (folder / "toy").exists()


def half_a_part(folder, raw):
    part = folder / ".toy.download" / "toy.zip.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(raw)


# Downloads


def test_zip(server, tmp_path, capsys):
    server.files["toy.zip"] = ZIP
    specs = toy(zip_source(f"{server.url}/toy.zip"))
    assert run(specs, tmp_path) == 0
    assert_in_place(tmp_path)
    assert server.served() == [len(ZIP)]
    assert "urllib" not in server.log[0][3]
    capsys.readouterr()

    assert run(specs, tmp_path) == 0
    assert "already in" in capsys.readouterr().out
    assert len(server.log) == 1, "a corpus that is there and right is not asked for again"


def test_plain_files(server, tmp_path):
    server.files = {f"toy.{split}.txt": raw for split, raw in TEXTS.items()}
    assert run(toy(getdata.plain(server.url, "toy.{}.txt", TOY_TEXTS)), tmp_path) == 0
    assert_in_place(tmp_path)


def test_resumes_with_the_rest_only(server, tmp_path):
    server.files["toy.zip"] = ZIP
    half_a_part(tmp_path, ZIP[:200])
    assert run(toy(zip_source(f"{server.url}/toy.zip")), tmp_path) == 0
    assert_in_place(tmp_path)
    assert [entry[:3] for entry in server.log] == [("toy.zip", "bytes=200-", len(ZIP) - 200)]


def test_resumes_in_the_same_run_when_the_connection_breaks(server, tmp_path):
    server.files["toy.zip"] = ZIP
    server.break_after = [100, 50]
    assert run(toy(zip_source(f"{server.url}/toy.zip")), tmp_path) == 0
    assert_in_place(tmp_path)
    assert server.served() == [100, 50, len(ZIP) - 150]


def test_the_next_run_takes_up_what_this_one_left(server, tmp_path, capsys):
    server.files["toy.zip"] = ZIP
    server.break_after = [100, 0]
    specs = toy(zip_source(f"{server.url}/toy.zip"))
    assert run(specs, tmp_path) == 1
    assert f"the connection ended after 100 of {len(ZIP):,} bytes" in capsys.readouterr().err
    assert not (tmp_path / "toy").exists()
    assert run(specs, tmp_path) == 0
    assert_in_place(tmp_path)
    assert server.served() == [100, 0, len(ZIP) - 100]


def test_server_that_ignores_ranges(server, tmp_path):
    server.files["toy.zip"] = ZIP
    server.ranges = False
    half_a_part(tmp_path, ZIP[:200])
    assert run(toy(zip_source(f"{server.url}/toy.zip")), tmp_path) == 0
    assert_in_place(tmp_path)
    assert server.served() == [len(ZIP)]


@pytest.mark.parametrize("checksum", [ZIP_CHECKSUM, None])
def test_afresh_when_what_was_there_does_not_fit(server, tmp_path, checksum):
    server.files["toy.zip"] = ZIP
    half_a_part(tmp_path, PAGE)
    assert run(toy(zip_source(f"{server.url}/toy.zip", checksum)), tmp_path) == 0
    assert_in_place(tmp_path)
    assert server.served() == [len(ZIP) - len(PAGE), len(ZIP)]


def test_afresh_when_what_was_there_is_too_long(server, tmp_path):
    server.files["toy.zip"] = ZIP
    half_a_part(tmp_path, ZIP + PAGE)
    assert run(toy(zip_source(f"{server.url}/toy.zip")), tmp_path) == 0
    assert_in_place(tmp_path)
    assert server.served() == [0, len(ZIP)]


def test_finished_part_is_not_asked_for(server, tmp_path):
    half_a_part(tmp_path, ZIP)
    assert run(toy(zip_source(f"{server.url}/toy.zip")), tmp_path) == 0
    assert_in_place(tmp_path)
    assert server.log == []


# Bad downloads


def test_error_page_as_archive_and_the_next_mirror(server, tmp_path, capsys):
    server.files = {"old/toy.zip": PAGE, "new/toy.zip": ZIP}
    old, new = (zip_source(f"{server.url}/{where}/toy.zip") for where in ("old", "new"))
    assert run(toy(old, new), tmp_path) == 0
    assert_in_place(tmp_path)
    assert server.names() == ["old/toy.zip", "new/toy.zip"]
    assert server.served()[1] == len(ZIP), "no resuming on top of the page"

    assert run(toy(old), tmp_path / "other") == 1
    error = capsys.readouterr().err
    assert f"toy.zip came as {len(PAGE)} bytes, an error page by its looks" in error
    assert_nothing_in_place(tmp_path / "other")


def test_wrong_checksum_tells_what_to_do(server, tmp_path, capsys):
    server.files["toy.zip"] = zipped({**TEXTS, "test": b"other words"})
    gone = zip_source(f"{server.url}/gone/toy.zip")
    assert run(toy(zip_source(f"{server.url}/toy.zip"), gone), tmp_path) == 1
    assert_nothing_in_place(tmp_path)
    error = capsys.readouterr().err
    assert f"  {server.url}: toy.zip came as" in error
    assert f"without the checksum {ZIP_CHECKSUM}" in error
    assert f"  {server.url}/gone: toy.zip: HTTP status 404" in error
    assert f"    toy.zip  {ZIP_CHECKSUM}" in error
    assert "BASE_URL=file://DIR ./getdata.sh toy" in error
    for split, text in TOY_TEXTS.items():
        assert f"{tmp_path / 'toy' / split}.txt  {text.checksum}" in error


@pytest.mark.parametrize(
    ("archive", "said"),
    [
        (zipped({**TEXTS, "test": b"other words"}), "test.txt does not have the checksum"),
        (zipped({"train": TEXTS["train"]}), "0 files wiki.valid.tokens"),
        (PAGE, "cannot be unpacked"),
        (ZIP[:-30], "cannot be unpacked"),
        (ZIP.replace(b"toy/wiki.valid", b"toy/wiki.train", 1), "cannot be unpacked"),
    ],
)
def test_archive_without_a_known_checksum_is_judged_by_its_texts(
    server, tmp_path, capsys, archive, said
):
    server.files["toy.zip"] = archive
    assert run(toy(zip_source(f"{server.url}/toy.zip", checksum=None)), tmp_path) == 1
    assert said in capsys.readouterr().err
    assert_nothing_in_place(tmp_path)


def test_wrong_token_count(server, tmp_path, capsys):
    server.files["toy.zip"] = ZIP
    specs = toy(zip_source(f"{server.url}/toy.zip"))
    valid = replace(TOY_TEXTS["valid"], tokens=5)
    specs["toy"] = replace(specs["toy"], texts={**TOY_TEXTS, "valid": valid})
    assert run(specs, tmp_path) == 1
    assert "valid.txt has 4 tokens, not 5" in capsys.readouterr().err
    assert not (tmp_path / "toy").exists()


def test_no_server_at_all(tmp_path, capsys):
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as httpd:
        port = httpd.server_port
    assert run(toy(zip_source(f"http://127.0.0.1:{port}/toy.zip")), tmp_path) == 1
    assert "no connection" in capsys.readouterr().err


def test_base_url_that_is_none(tmp_path, capsys):
    assert run(toy(zip_source("http://unused/toy.zip")), tmp_path, BASE_URL="nonsense") == 1
    assert "toy.zip: no answer (unknown url type" in capsys.readouterr().err


def test_wrong_files_in_place_are_kept_aside(server, tmp_path, capsys):
    server.files["toy.zip"] = ZIP
    folder = tmp_path / "toy"
    folder.mkdir()
    (folder / "train.txt").write_text("mine")
    (folder / "notes").write_text("mine too")
    assert run(toy(zip_source(f"{server.url}/toy.zip")), tmp_path) == 0
    assert "train.txt does not have the checksum" in capsys.readouterr().out
    assert (folder / "train.txt").read_bytes() == TEXTS["train"]
    assert (folder / "train.txt.old").read_text() == "mine"
    assert (folder / "notes").read_text() == "mine too"


def test_two_runs_at_once(server, tmp_path, capsys):
    server.files["toy.zip"] = ZIP
    specs = toy(zip_source(f"{server.url}/toy.zip"))
    handle = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        assert run(specs, tmp_path) == 1
        assert "another getdata is at work" in capsys.readouterr().err
    finally:
        os.close(handle)
    assert run(specs, tmp_path) == 0


def test_data_dir_that_is_a_file(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert run(toy(), tmp_path / "file") == 1
    assert "File exists" in capsys.readouterr().err


# BASE_URL


@pytest.mark.parametrize("scheme", ["http", "file"])
def test_base_url_is_the_only_place_asked(server, tmp_path, scheme):
    server.files["mine/toy.zip"] = ZIP
    (tmp_path / "toy.zip").write_bytes(ZIP)
    base_url = f"{server.url}/mine/" if scheme == "http" else f"file://{tmp_path}"
    specs = toy(
        zip_source("http://127.0.0.1:9/a/toy.zip"), zip_source("http://127.0.0.1:9/b/toy.zip")
    )
    assert run(specs, tmp_path / "data", BASE_URL=base_url) == 0
    assert_in_place(tmp_path / "data")


def test_base_url_asks_once_for_what_several_mirrors_have(server, tmp_path):
    specs = toy(zip_source("http://a.invalid/toy.zip"), zip_source("http://b.invalid/toy.zip"))
    assert run(specs, tmp_path, BASE_URL=server.url) == 1
    assert server.names() == ["toy.zip"]


# Deriving, Parquet, enwik8


def test_derived_corpus_brings_its_base(server, tmp_path):
    server.files["toy.zip"] = ZIP
    made = {
        "train": "".join(
            f"l i n e _ {' '.join(str(n))} _ o f _ t h e _ < u n k > _ t e x t \n "
            for n in range(400)
        ),
        "valid": "v a l i d _ w o r d s \n \n ",
        "test": "t e s t _ w o r d s _ , _ n o _ n e w l i n e _ a t _ t h e _ e n d \n ",
    }
    texts = {
        split: Text(sha256(text.encode()), tokens(text.encode())) for split, text in made.items()
    }
    specs = toy(zip_source(f"{server.url}/toy.zip"))
    specs["chars"] = Spec("chars", texts, base="toy", derive=getdata.words_to_characters)
    assert run(specs, tmp_path, "chars") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["chars", "toy"]
    assert (tmp_path / "chars" / "valid.txt").read_text() == made["valid"]


def test_derived_corpus_without_its_base(server, tmp_path, capsys):
    specs = toy(zip_source(f"{server.url}/toy.zip"))
    specs["chars"] = Spec("chars", TOY_TEXTS, base="toy", derive=getdata.words_to_characters)
    assert run(specs, tmp_path, "chars") == 1
    error = capsys.readouterr().err
    assert error.startswith("chars: cannot be made from toy\ntoy: no source worked\n")
    assert_nothing_in_place(tmp_path)


def test_parquet_needs_pyarrow(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)  # as if it were not installed
    assert run(toy(getdata.parquet("wikitext-2-v1", 1)), tmp_path) == 1
    assert "not tried, it needs the Python package pyarrow" in capsys.readouterr().err


def test_text_from_parquet(server, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    texts = {**TEXTS, "test": b"test words\n"}
    rows = {split: raw.decode().splitlines(keepends=True) for split, raw in texts.items()}
    rows["first"], rows["second"] = rows["train"][:150], rows["train"][150:]
    names = {
        "first": "train-00000-of-00002.parquet",
        "second": "train-00001-of-00002.parquet",
        "valid": "validation-00000-of-00001.parquet",
        "test": "test-00000-of-00001.parquet",
    }
    for part, name in names.items():
        buffer = io.BytesIO()
        column = ["" if row == " \n" else row for row in rows[part]]
        parquet.write_table(pyarrow.table({"text": column}), buffer)
        server.files[name] = buffer.getvalue()
    source = getdata.parquet("toy-v1", 2).mirrored(server.url)
    checked = {split: Text(sha256(raw), tokens(raw)) for split, raw in texts.items()}
    assert run({"toy": Spec("toy", checked, (source,))}, tmp_path) == 0
    assert (tmp_path / "toy" / "valid.txt").read_bytes() == TEXTS["valid"]


def written_plainly(raw):
    return " ".join("\n" if byte == 10 else str(byte) for byte in raw)


@pytest.mark.parametrize("chunk", [1, 7, 1 << 18])
def test_bytes_as_numbers(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(getdata, "CHUNK", chunk)
    raw = bytes(range(256)) + random.Random(1).randbytes(500) + b"\n\nend\n"
    getdata.bytes_to_texts(raw, 100, tmp_path)
    parts = {"train": raw[:-200], "valid": raw[-200:-100], "test": raw[-100:]}
    for split, part in parts.items():
        assert (tmp_path / f"{split}.txt").read_bytes() == written_plainly(part).encode()
    # One token per byte: a newline byte is an <eos>. A last line without newline adds an <eos>.
    corpus = Corpus(tmp_path, cache=False)
    assert len(corpus.test) == 100
    assert len(corpus.train) == len(parts["train"]) + (parts["train"][-1] != 10)


def test_enwik8_archive(tmp_path, monkeypatch):
    raw = random.Random(2).randbytes(300)
    with zipfile.ZipFile(tmp_path / "enwik8.zip", "w") as archive:
        archive.writestr("enwik8", raw)
    seen = []
    monkeypatch.setattr(getdata, "bytes_to_texts", lambda *given: seen.append(given))
    getdata.unzip_enwik8([tmp_path / "enwik8.zip"], tmp_path)
    assert seen == [(raw, 5_000_000, tmp_path)]


@pytest.mark.corpora
def test_enwik8_head(tmp_path):
    head = CORPORA / "enwik8-head" / "first-1MiB.bin"
    if not head.is_file():
        pytest.skip(f"{head} is not there")
    raw = head.read_bytes()
    getdata.bytes_to_texts(raw, 50_000, tmp_path)
    assert (tmp_path / "train.txt").read_bytes() == written_plainly(raw[:-100_000]).encode()


# The command


def command(*names, cwd, **environ):
    return subprocess.run(
        [ROOT / "getdata.sh", *names],
        cwd=cwd,
        env={**os.environ, "PYTHON": sys.executable, **environ},
        capture_output=True,
        text=True,
    )


def test_unknown_name_lists_the_known_ones(tmp_path):
    done = command("penn", "nonesuch", cwd=tmp_path, DATA_DIR=str(tmp_path / "data"))
    assert done.returncode == 2
    for name in ("penn", "pennchar", "wikitext-2", "wikitext-103", "enwik8", "sample", "all"):
        assert f"'{name}'" in done.stderr
    assert not (tmp_path / "data").exists(), "nothing was begun"


def test_no_name(tmp_path):
    assert command(cwd=tmp_path).returncode == 2


def test_sample_is_there(tmp_path):
    done = command("sample", cwd=tmp_path, DATA_DIR=str(tmp_path))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"sample: already in {ROOT / 'data' / 'sample'}, checksums right\n"


def test_damaged_sample(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(getdata, "ROOT", tmp_path)
    assert run(SPECS, tmp_path / "data", "sample") == 1
    assert "git checkout -- data/sample" in capsys.readouterr().err


def test_python_that_is_not_there(tmp_path):
    done = command("sample", cwd=tmp_path, PYTHON="no-such-python")
    assert done.returncode == 1
    assert "no-such-python" in done.stderr


def test_all_means_all(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(getdata, "get", lambda name, *_: asked.append(name))
    assert run(SPECS, tmp_path, "penn", "all") == 0
    assert asked == ["penn", "pennchar", "wikitext-2", "wikitext-103", "enwik8", "sample"]


def test_one_failure_does_not_stop_the_others(server, tmp_path):
    server.files["toy.zip"] = ZIP
    specs = {"bad": Spec("bad", TOY_TEXTS, (zip_source(f"{server.url}/none.zip"),))}
    specs.update(toy(zip_source(f"{server.url}/toy.zip")))
    assert run(specs, tmp_path, "bad", "toy") == 1
    assert_in_place(tmp_path)


def real(name):
    folder = CORPORA / name
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    return {split: (folder / f"{split}.txt").read_bytes() for split in getdata.SPLITS}


@pytest.mark.corpora
def test_real_penn_and_pennchar(server, tmp_path):
    penn, pennchar = real("penn"), real("pennchar")
    server.files = {f"ptb.{split}.txt": raw for split, raw in penn.items()}
    done = command("pennchar", cwd=tmp_path, DATA_DIR="here", BASE_URL=server.url)
    assert (done.returncode, done.stderr) == (0, "")
    for split in getdata.SPLITS:
        assert (tmp_path / "here" / "penn" / f"{split}.txt").read_bytes() == penn[split]
        assert (tmp_path / "here" / "pennchar" / f"{split}.txt").read_bytes() == pennchar[split]


@pytest.mark.corpora
def test_real_wikitext_2_from_an_archive(server, tmp_path):
    wikitext = real("wikitext-2")
    server.files["wikitext-2-v1.zip"] = zipped(wikitext, zipfile.ZIP_STORED)
    # This archive's checksum differs from the published archive's.
    source = zip_source(f"{server.url}/wikitext-2-v1.zip", checksum=None)
    specs = {"wikitext-2": replace(SPECS["wikitext-2"], sources=(source,))}
    assert run(specs, tmp_path) == 0
    for split, raw in wikitext.items():
        assert (tmp_path / "wikitext-2" / f"{split}.txt").read_bytes() == raw


@pytest.mark.corpora
def test_real_wikitext_2_from_its_second_source(server, tmp_path):
    wikitext = real("wikitext-2")
    server.files = {f"{split}.txt": raw for split, raw in wikitext.items()}
    server.files["wikitext-2-v1.zip"] = PAGE
    assert run(SPECS, tmp_path, "wikitext-2", BASE_URL=server.url) == 0
    assert server.names() == ["wikitext-2-v1.zip", "train.txt", "valid.txt", "test.txt"]
