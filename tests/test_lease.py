"""bench/lease.sh with stubs in place of Python and the GPU: order, limits, and what is kept."""

import os
import re
import shutil
import subprocess
import tarfile

import pytest
from conftest import ROOT, linux_only

from bench import common
from tools import results_table

pytestmark = linux_only

STUBS = {
    "nvidia-smi": "echo 'A GPU, 1.2'",
    "python3": 'echo "python3 $*"; touch "$WORK/PTB.pt"; [[ "$*" != *$FAILS* ]]',
    # -k 20 -s SIGNAL LIMIT COMMAND...
    "timeout": 'echo "$4 $5 ${*:6}" >>"$LOG"; "${@:6}"',
    "git": "exit 1",
}


@pytest.fixture
def lease(tmp_path):
    """Run bench/lease.sh: (exit status, output, calls of timeout, files in the archive by name)."""
    bin_folder, log = tmp_path / "bin", tmp_path / "log"
    bin_folder.mkdir()
    for name, body in STUBS.items():
        (bin_folder / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (bin_folder / name).chmod(0o755)

    def run(*argv, **environment):
        env = {
            **os.environ,
            "PATH": f"{bin_folder}:{os.environ['PATH']}",
            "OUT": str(tmp_path / "out"),
            "WORK": str(tmp_path / "work"),
            "DATA": str(tmp_path),
            "LOG": str(log),
            "COMMIT": "abc",
            "FAILS": "nothing",
            **environment,
        }
        command = [shutil.which("bash"), ROOT / "bench" / "lease.sh", *argv]
        result = subprocess.run(command, env=env, capture_output=True, text=True)
        files = {}
        archive = tmp_path / "out" / "lease.tar.gz"
        if archive.exists():
            with tarfile.open(archive) as tar:
                for member in filter(tarfile.TarInfo.isfile, tar):
                    files[member.name[2:]] = tar.extractfile(member).read().decode()
        calls = log.read_text().splitlines() if log.exists() else []
        return result.returncode, result.stdout + result.stderr, calls, files

    return run


def test_the_parts_run_in_order_each_with_its_limit(lease, tmp_path, monkeypatch):
    status, out, calls, files = lease("first", FAILS="-m pytest")
    assert status == 0
    assert "commit abc, A GPU, 1.2, first call" in out
    names = ["compile", "tests", "step-qrnn", "step-lstm", "qrnn", "profile", "main"]
    # A part that fails does not stop the others.
    expected = [(name, str(int(name == "tests"))) for name in names]
    assert re.findall(r"^([\w-]+): status (\d)", out, re.MULTILINE) == expected
    assert files.keys() == {"parts.txt", *(f"{name}.txt" for name in names)}
    # Four processes write at once: their lines come in any order.
    words = files["compile.txt"].split()
    assert [words.count(t) for t in ("float32", "bfloat16", "float16", "float64")] == [1] * 4
    assert "pytest -q -m gpu" in files["tests.txt"]
    signals, limits = zip(
        *(call.split()[:2] for call in calls if call[:3] in "TERMINT"), strict=True
    )
    assert signals == ("TERM", "TERM", "INT", "INT", "INT", "TERM", "INT")
    assert sum(map(int, limits[:-1])) == 460
    assert 500 <= int(limits[-1]) <= 530

    status, out, calls, files = lease("second")
    assert status == 0
    assert "--resume" in files["main-2.txt"]
    assert {"main.txt", "main-2.txt", "pointer.txt", "dynamiceval.txt"} <= files.keys()
    assert "first call" in files["parts.txt"]

    monkeypatch.setattr(results_table, "ROOT", tmp_path)
    (tmp_path / "results").mkdir()
    assert results_table.main(["--lease", str(tmp_path / "out" / "lease.tar.gz")]) == 0
    page = (tmp_path / "results" / "gpu-a-gpu-abc.md").read_text()
    assert page.startswith("# A GPU, commit abc\n")
    assert "## pointer\n\n```\npython3 pointer.py --preset ptb-qrnn" in page


def test_a_benchmark_that_is_cut_short_keeps_the_rounds_that_ended(capsys):
    times = [9.0, 1.0, 2.0]

    def timer():
        if not times:
            raise KeyboardInterrupt
        return times.pop(0)

    assert common.in_turns({"way": timer}, runs=5) == {"way": [1.0, 2.0]}
    assert capsys.readouterr().out == "cut short after 2 of 5 rounds\n"


def test_no_part_starts_after_the_end(lease):
    status, out, calls, files = lease("first", SECONDS_IN_ALL="0")
    assert (status, calls, files) == (0, [], {})
    assert out.count("no time left") == 7


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"COMMIT": ""}, "the commit of this code"), ({"DATA": "none"}, "./getdata.sh penn gets it")],
)
def test_without_a_commit_or_a_corpus_nothing_runs(changes, words, lease):
    status, out, calls, _ = lease("first", **changes)
    assert status == 1
    assert words in out
    assert calls == []
