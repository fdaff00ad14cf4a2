"""Files under attack: two runs at once, kills, links, other texts, crafted model files."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import zipfile

import pytest
import torch
from conftest import ROOT, TINY, put

import checkpoint
from run.rehearsal import differing_files

# A script that stops, until a line comes, each time it has read the model file.
STOPPING = """
import sys, checkpoint, main
read = checkpoint.load
def load(path):
    loaded = read(path)
    print("read", flush=True)
    sys.stdin.readline()
    return loaded
checkpoint.load = load
main.main(sys.argv[1:])
"""


def start(*command, **options):
    command = [sys.executable, *map(str, command)]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    return subprocess.Popen(command, cwd=ROOT, text=True, **pipes, **options)


def finish(process, text=None):
    out, err = process.communicate(text, timeout=120)
    return process.returncode, out, err


@pytest.fixture
def flags(corpus_dir, tmp_path):
    flags = [*TINY, "--data", corpus_dir, "--lr", 5, "--max-batches", 3, "--save-every", 0]
    return [*flags, "--save", tmp_path / "m.pt"]


@pytest.fixture
def at_first_save(monkeypatch):
    """A function whose argument is called once, before a run first writes a model file."""

    def hook(call):
        save, calls = checkpoint.save, [call]

        def call_first(*args, **options):
            if calls:
                calls.pop()()
            save(*args, **options)

        monkeypatch.setattr(checkpoint, "save", call_first)

    return hook


def test_a_run_reads_its_file_under_the_lock(flags, script, tmp_path, corpus_dir):
    path = tmp_path / "m.pt"
    assert script("main", *flags, "--epochs", 1)[0] == 0
    first = start("-c", STOPPING, "--resume", path, "--epochs", 2, "--max-batches", 3)
    assert first.stdout.readline() == "read\n"
    # What it has read is the newest: no other run can write a newer state meanwhile.
    second = script("main", "--resume", path, "--epochs", 3, "--max-batches", 3)
    before = path.read_bytes()
    torch.save(torch.load(path, weights_only=True)["model"], tmp_path / "exported")
    imported = [ROOT / "tools" / "import_original.py", tmp_path / "exported", "--data", corpus_dir]
    third = finish(start(*imported, "--save", path))
    for status, _, err in (second, third):
        assert status == 1
        assert f"another run writes {path} now (process {first.pid} of " in err
    assert path.read_bytes() == before
    assert finish(first, "\n")[0] == 0
    assert checkpoint.load(path).training["epoch"] == 2
    # The importer keeps what it replaces.
    status, out, err = finish(start(*imported, "--save", path))
    assert (status, err) == (0, "")
    assert out.startswith(f"Keeping the old model file {path} as {path}.previous\n")
    assert checkpoint.load(f"{path}.previous").training["epoch"] == 2


def test_a_resumed_run_keeps_the_file_of_another(flags, script, trained, tmp_path):
    path, other = tmp_path / "m.pt", tmp_path / "b.pt"
    assert script("main", *flags, "--epochs", 1)[0] == 0
    shutil.copy(trained["GRU"], other)
    status, out, _ = script("main", "--resume", path, "--save", other, "--epochs", 2)
    assert (status, out.count(f"Keeping the old model file {other} as ")) == (0, 1)
    assert (tmp_path / "b.pt.previous").read_bytes() == trained["GRU"].read_bytes()


def test_a_run_leaves_the_temporary_file_of_another(flags, script, trained, tmp_path, monkeypatch):
    other, loaded = tmp_path / "other.pt", checkpoint.load(trained["LSTM"])
    (ready, begun), (resume, goes_on) = os.pipe(), os.pipe()
    save = torch.save
    pid = os.fork()
    if not pid:
        status = 1
        try:
            torch.save = lambda *args: (os.write(begun, b"."), os.read(resume, 1), save(*args))
            checkpoint.save(other, loaded)
            status = 0
        finally:
            os._exit(status)
    os.read(ready, 1)

    def kill(pid, signum):
        raise ProcessLookupError  # as in another container, where the number means nothing

    monkeypatch.setattr(os, "kill", kill)
    assert script("main", *flags, "--epochs", 1)[0] == 0
    os.write(goes_on, b".")
    assert os.waitpid(pid, 0)[1] == 0
    assert differing_files(checkpoint.load(other), loaded) == []


def save_killed(path, content, calls):
    """Save in a child that kills itself at a rename or the like, after `calls` others."""
    pid = os.fork()
    if not pid:
        left = list(range(calls))

        def killing(call):
            def called(*args, **options):
                if not left:
                    os.kill(os.getpid(), signal.SIGKILL)
                left.pop()
                return call(*args, **options)

            return called

        try:
            for name in ("link", "rename", "replace", "unlink"):
                setattr(os, name, killing(getattr(os, name)))
            checkpoint.save(path, content, keep=True)
        finally:
            os._exit(0)
    return os.waitpid(pid, 0)[1]


def test_at_every_moment_there_is_a_file_of_its_name(trained, tmp_path):
    path, new = tmp_path / "m.pt", checkpoint.load(trained["GRU"])
    for calls in range(9):
        shutil.copy(trained["LSTM"], path)
        status = save_killed(path, new, calls)
        assert checkpoint.load(path).config["rnn_type"] == ("GRU" if status == 0 else "LSTM")
        if status == 0:
            break
    assert (calls > 1, status) == (True, 0)
    path.unlink()
    with pytest.raises(checkpoint.CheckpointError, match=r"m\.pt, but .*m\.pt\.previous is there"):
        checkpoint.load(path)


@pytest.mark.parametrize("name", ["m.pt.previous", "m.pt.e2"])
def test_what_cannot_be_written_is_found_at_the_start(name, flags, script, tmp_path):
    assert script("main", *flags, "--epochs", 1)[0] == 0
    (tmp_path / name).mkdir()
    status, out, err = script("main", *flags, "--epochs", 3, "--when", 2)
    assert (status, out) == (1, "")
    assert re.search(rf"cannot write .*{re.escape(name)} \(it is a folder\): ", err)


def test_a_copy_that_cannot_be_written_does_not_end_the_run(flags, script, tmp_path, at_first_save):
    at_first_save((tmp_path / "m.pt.e1").mkdir)
    status, out, err = script("main", *flags, "--epochs", 2, "--when", 1)
    assert (status, err) == (0, "")
    assert re.search(r"Going on without a copy: cannot write .*m\.pt\.e1 \(it is a folder\)", out)
    assert checkpoint.load(tmp_path / "m.pt").training["epoch"] == 2


@pytest.mark.parametrize("case", ["lock removed", "lock of another", "folder renamed"])
def test_files_that_were_removed_by_hand(case, flags, script, tmp_path, at_first_save):
    folder, lock = tmp_path / "run", tmp_path / "run" / ".m.pt.lock"
    folder.mkdir()

    def change():
        if case == "folder renamed":
            folder.rename(tmp_path / "renamed")
        else:
            lock.unlink()
        if case == "lock of another":
            lock.write_text("another run's")

    at_first_save(change)
    status, _, err = script("main", *flags, "--epochs", 1, "--save", folder / "m.pt")
    if case == "folder renamed":
        assert status == 1
        assert re.search(r"cannot write .*m\.pt \(there is no folder .*run\)", err)
    else:
        assert (status, err) == (0, "")
        assert lock.exists() == (case == "lock of another")


def test_links_in_the_place_of_own_files_are_replaced(flags, script, corpus_dir, tmp_path):
    victims = []
    for name in (".m.pt.lock", ".m.pt.tmp", "m.pt.rms", "m.pt.before-finetune"):
        victims.append(tmp_path / f"thesis{name}")
        victims[-1].write_text("years of work")
        (tmp_path / name).symlink_to(victims[-1])
    assert script("main", *flags, "--epochs", 1)[0] == 0
    assert script("finetune", *flags, "--epochs", 1, "--keep")[0] == 0
    assert script("dynamiceval", "--data", corpus_dir, *flags[-2:], "--max-batches", 3)[0] == 0
    assert [victim.read_text() for victim in victims] == ["years of work"] * 4
    names = {path.name for path in tmp_path.iterdir() if not path.name.startswith("thesis")}
    assert names == {"m.pt", "m.pt.rms", "m.pt.before-finetune"}
    assert not any((tmp_path / name).is_symlink() for name in names)


@pytest.mark.parametrize(
    "command",
    [
        "score text --checkpoint m.pt --html m.pt",
        "score text --checkpoint m.pt --html ./text",
        "generate --checkpoint m.pt --outf link",
    ],
)
def test_an_output_that_is_an_input_is_refused(command, script, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(trained["LSTM"], "m.pt")
    (tmp_path / "text").write_text("w1 w2\n")
    (tmp_path / "link").symlink_to("m.pt")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    name, *argv = command.split()
    status, _, err = script(name, *argv)
    assert (status, "(it is an input)" in err) == (1, True)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.fixture
def other_texts(corpus_dir, tmp_path):
    """A folder with the corpus, but another valid.txt."""
    shutil.copytree(corpus_dir, tmp_path / "other")
    valid = tmp_path / "other" / "valid.txt"
    valid.write_text(valid.read_text() + "w1 w2\n")
    return valid.parent


def test_a_run_has_one_text_in_all_its_processes(flags, other_texts):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    processes = []
    for rank, more in (("0", []), ("1", ["--data", other_texts])):
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
        environment = {**os.environ, **where, "RANK": rank, "LOCAL_RANK": rank}
        processes.append(start("main.py", *flags, "--epochs", 1, *more, env=environment))
    for process in processes:
        status, _, err = finish(process)
        assert (status, "the ranks have different texts in " in err) == (1, True)


def test_a_resumed_run_has_the_validation_text_it_had(flags, script, tmp_path, other_texts):
    path = tmp_path / "m.pt"
    assert script("main", *flags, "--epochs", 1)[0] == 0
    status, _, err = script("main", "--resume", path, "--data", other_texts, "--epochs", 2)
    assert (status, "m.pt goes on with another text than that in" in err) == (1, True)


def test_a_run_does_not_follow_changes_of_the_cache(
    flags, script, corpus_dir, tmp_path, at_first_save
):
    folder, path, whole = tmp_path / "c", tmp_path / "m.pt", tmp_path / "whole.pt"
    shutil.copytree(corpus_dir, folder)
    flags += ["--data", folder, "--partial-shuffle", "--epochs", 3]
    assert script("main", *flags, "--save", whole)[0] == 0

    def overwrite():
        for cache in folder.rglob("*"):
            if cache.suffix != ".txt" and cache.is_file():
                with open(cache, "r+b") as file:
                    file.seek(cache.stat().st_size // 2)
                    file.write(bytes(cache.stat().st_size // 2))

    at_first_save(overwrite)
    assert script("main", *flags)[0] == 0
    assert differing_files(checkpoint.load(whole), checkpoint.load(path)) == []


def large(content):
    for tensor in content["model"].values():
        tensor.fill_(3e38)


def within(depth):
    """A list of lists, each there twice in the one around it."""
    value = [1]
    for _ in range(depth):
        value = [value, value]
    return value


# How a model file is changed, the command, and a pattern of its message.
CRAFTED = {
    "large weights, pointer": (large, "pointer --save", "below 1e15"),
    "large weights, score": (large, "score --text w1 --checkpoint", "below 1e15"),
    "large weights, generate": (large, "generate --prompt w1 --next 2 --checkpoint", "below 1e15"),
    "lists within lists": (put("args", "x", to=within(40)), "main --resume", "or is damaged"),
    "large sizes": (put("config", "nhid", to=5000), "generate --checkpoint", "larger network"),
    "many layers": (put("config", "nlayers", to=10**5), "generate --checkpoint", "larger network"),
    "no bits": (
        put("training", "rng", 1, to=[1] + [0] * 623),
        "main --epochs 3 --resume",
        "no bits",
    ),
    "a flag": (
        put("training", "args", "when", to=["--help"]),
        "main --resume",
        r"records \['--help'\] for --when \(.*\): give that flag",
    ),
    "no dictionary": (put("training", to=[1]), "main --resume", "lacks a part"),
    "no position": (lambda c: c["training"].pop("position"), "main --resume", "cannot be resumed"),
}


@pytest.mark.parametrize("case", CRAFTED)
def test_a_crafted_model_file_is_refused(case, script, trained, corpus_dir, tmp_path):
    change, command, message = CRAFTED[case]
    content = torch.load(trained["LSTM"], weights_only=True)
    change(content)
    torch.save(content, tmp_path / "m.pt")
    name, *argv = command.split()
    more = ["--data", corpus_dir] if name in ("main", "pointer") else []
    status, _, err = script(name, *argv, tmp_path / "m.pt", *more)
    assert (status, len(err.splitlines())) == (1, 1)
    assert re.search(message, err)


def test_records_that_overlap_are_not_read(trained, tmp_path, monkeypatch):
    # That would take as long as for a file of gigabytes.
    monkeypatch.setattr(zipfile.ZipFile, "testzip", lambda self: pytest.fail("they were read"))
    path = tmp_path / "m.pt"
    shutil.copy(trained["LSTM"], path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.filelist += [max(archive.filelist, key=lambda entry: entry.file_size)] * 99
        archive._didModify = True
    with pytest.raises(checkpoint.CheckpointError, match="or is damaged"):
        checkpoint.load(path)


def test_a_recorded_log_folder_is_not_obeyed(flags, script, tmp_path):
    logs = tmp_path / "logs"
    assert script("main", *flags, "--epochs", 1, "--logdir", logs)[0] == 0
    shutil.rmtree(logs)
    assert script("main", "--resume", tmp_path / "m.pt", "--epochs", 2)[0] == 0
    assert not logs.exists()
