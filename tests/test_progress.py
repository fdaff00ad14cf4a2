"""run/progress.py: bars are drawn on a terminal with tqdm, and nowhere else."""

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


@pytest.mark.parametrize("drawn", [False, True])
def test_drawn_on_a_terminal_with_tqdm(drawn, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    if not drawn:
        monkeypatch.setitem(sys.modules, "tqdm", None)  # importing it now fails
    assert use(Bar(100, "scoring")).shown == drawn
    bar = sys.stderr.getvalue()
    assert ("scoring" in bar, "30%" in bar, bar != "") == (drawn,) * 3
    assert capsys.readouterr().out == "| a line\n"


def test_silent_in_a_file_or_pipe(capsys):
    assert not use(Bar(100, "scoring")).shown
    assert capsys.readouterr() == ("| a line\n", "")


def test_goes_on_to_a_place_and_is_silent_where_it_is_not_wanted(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with Bar(1000, "epoch 3") as bar:
        bar.to(400)
        bar.to(700)
        bar._bar.refresh()
        assert " 70%|" in sys.stderr.getvalue()
    monkeypatch.setattr(sys, "stderr", Terminal())
    with Bar(1000, "epoch 3", wanted=False) as bar:
        assert not bar.shown
        bar.to(500)
    assert sys.stderr.getvalue() == ""


def test_the_longest_bar_fits_eighty_columns(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with Bar(10**6, "epoch 499 of 500, best 9999.9") as bar:
        bar._bar.dynamic_ncols, bar._bar.ncols = None, 80
        bar.update(10**5, ppl="9999.9")
        bar._bar.refresh()
        last = sys.stderr.getvalue().split("\r")[-1]
    assert len(last) == 80
    assert last.endswith(", ppl=9999.9")
