"""tools/make_corpus.py: the tokens of each kind, the parts, and bad input."""

import sys

import pytest

from tools import make_corpus

# The tokens of lines.
LINES = {
    '"Don\'t go," she said -- at 3.14.': '" Don\'t go , " she said -- at 3.14 .',
    "Un café, na\u0308i\u0308ve_text": "Un café , na\u0308i\u0308ve_text",
    "हिन्दी <unk>...": "हिन्दी <unk> ...",
    "日本語です。": "日本語です 。",
}


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "book.txt"
    lines = [f"Line {n} ends.\r\n\n" for n in range(16)]
    path.write_bytes(b"\xef\xbb\xbf" + "".join([*lines, *(f"{x}\n" for x in LINES)]).encode())
    return path


def folder_of(script, text, out, *argv):
    status, printed, err = script("tools.make_corpus", text, "--out", out, *argv)
    assert (status, err) == (0, "")
    assert printed.splitlines()[-1].startswith(f"python main.py --preset small --data {out} ")
    parts = {path.name: path.read_bytes() for path in out.iterdir()}
    return parts, printed


@pytest.mark.parametrize(("line", "tokens"), LINES.items())
def test_words_and_punctuation_are_apart(line, tokens):
    assert make_corpus.words(line) == tokens.split()


def test_the_last_lines_become_valid_and_test(script, text, tmp_path):
    text.write_text("\n \n".join(f"Line {n} ends." for n in range(40)))
    argv = ["--lower"]
    parts, printed = folder_of(script, text, tmp_path / "new" / "a", *argv)
    assert parts["train.txt"].decode() == "".join(f"line {n} ends .\n" for n in range(36))
    assert parts["valid.txt"] == b"line 36 ends .\nline 37 ends .\n"
    assert parts["test.txt"] == b"line 38 ends .\nline 39 ends .\n"
    # Few words: main.py must leave some out to know an <unk>.
    assert "--min-count 2 --save" in printed
    assert "--tokens-are words" in printed
    again, printed = folder_of(script, text, tmp_path / "b", *argv, "--vocab-size", 9)
    assert again == parts
    assert "--vocab-size 9 --save" in printed


def test_characters_have_a_mark_for_the_space(script, text, tmp_path):
    parts, printed = folder_of(script, text, tmp_path / "c", "--as", "characters")
    assert parts["train.txt"].startswith(b"L i n e _ 0 _ e n d s .\n")
    assert parts["test.txt"].decode() == "日 本 語 で す 。\n"
    assert "The text has 1 underscores of its own" in printed
    joined = b"".join(parts[f"{name}.txt"] for name in ("train", "valid", "test")).decode()
    lines = [f"Line {n} ends." for n in range(16)] + [*LINES]
    assert joined.replace(" ", "") == "".join(f"{x}\n" for x in lines).replace(" ", "_")


def test_pieces_put_together_are_the_text(script, text, tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    argv = ["--as", "pieces", "--vocab-size", 60]
    parts, _ = folder_of(script, text, tmp_path / "p", *argv)
    assert parts["train.txt"].decode().split("\n")[3].replace(" ", "") == "▁Line▁3▁ends."
    assert folder_of(script, text, tmp_path / "q", *argv)[0] == parts
    kept = sentencepiece.SentencePieceProcessor(model_proto=parts["pieces.model"])
    assert " ".join(kept.encode("Line 3 ends.", out_type=str)) in parts["train.txt"].decode()
    argv = [text, "--out", tmp_path / "r", "--as", "pieces", "--vocab-size", 5]
    status, _, err = script("tools.make_corpus", *argv)
    assert (status, "choose another --vocab-size" in err) == (1, True)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["book.txt", "--out", "."], ". exists already"),
        (["none.txt", "--out", "new"], "cannot use none.txt (No such file"),
        (["bad.txt", "--out", "new"], "line 2 of bad.txt is not UTF-8"),
        (["short.txt", "--out", "new"], "the text needs three lines"),
        (["book.txt", "--out", "book.txt/new"], "cannot use book.txt (File exists)"),
        (["book.txt", "--out", "new", "--as", "pieces"], "needs the package sentencepiece"),
    ],
)
def test_bad_input_leaves_no_folder(argv, message, script, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    (tmp_path / "bad.txt").write_bytes(b"good\n\xff\n")
    (tmp_path / "short.txt").write_text("one\ntwo\n")
    before = sorted(tmp_path.rglob("*"))
    status, out, err = script("tools.make_corpus", *argv)
    assert (status, out, len(err.splitlines())) == (1, "", 1)
    assert message in err
    assert sorted(tmp_path.rglob("*")) == before
