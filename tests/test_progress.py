"""progress.py: bars are drawn on a terminal with tqdm, and nowhere else."""

import io
import sys

import pytest

from run.progress import Bar


class Terminal(io.StringIO):
    """A stream that claims to be a terminal and keeps what is written."""

    def isatty(self):
        return True


def use(bar):
    with bar:
        bar.update(30, loss="4.61")
        bar.line("| a line")
        bar.update(70)
    return bar


def test_silent_in_a_file_or_pipe(capsys):
    assert not use(Bar(100, "scoring")).shown
    assert capsys.readouterr() == ("| a line\n", "")


def test_silent_without_tqdm(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setitem(sys.modules, "tqdm", None)  # importing it now fails
    assert not use(Bar(100, "scoring")).shown
    assert sys.stderr.getvalue() == ""
    assert capsys.readouterr().out == "| a line\n"


def test_drawn_on_a_terminal(capsys, monkeypatch):
    pytest.importorskip("tqdm")
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert use(Bar(100, "scoring")).shown
    assert "scoring" in sys.stderr.getvalue()
    assert "100" in sys.stderr.getvalue()
    assert capsys.readouterr().out == "| a line\n"


def test_goes_on_to_a_place_and_is_silent_where_it_is_not_wanted(monkeypatch):
    pytest.importorskip("tqdm")
    monkeypatch.setattr(sys, "stderr", Terminal())
    with Bar(1000, "epoch 3") as bar:
        bar.to(400)
        bar.to(700)
        bar._bar.refresh()
        assert "700/1.00k" in sys.stderr.getvalue()
    monkeypatch.setattr(sys, "stderr", Terminal())
    with Bar(1000, "epoch 3", wanted=False) as bar:
        assert not bar.shown
        bar.to(500)
    assert sys.stderr.getvalue() == ""
