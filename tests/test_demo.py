"""tools/demo.py keeps its model, and the commands it ends with run."""

import shlex

import pytest

from tools import demo

SHORT = "--epochs 1 --max-batches 2 --emsize 8 --nhid 8 --no-cuda".split()
STAGES = {"main.py": SHORT, "finetune.py": SHORT, "pointer.py": ["--max-batches", "1"]}


def test_the_model_is_kept_and_the_last_commands_use_it(script, tmp_path, monkeypatch, capfd):
    def short(name, *flags):
        status, out, err = script(name.removesuffix(".py"), *flags, *STAGES.get(name, ()))
        assert (status, err) == (0, "")
        return out

    kept = tmp_path / "demo" / "model.pt"
    monkeypatch.setattr(demo, "MODEL", kept)
    monkeypatch.setattr(demo, "ROOT", tmp_path)
    (tmp_path / "data").symlink_to(demo.SAMPLE.parent)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "run", short)
    for _ in range(2):  # the second replaces the first's model
        with pytest.raises(SystemExit, match="no better than word frequencies"):
            demo.main([])
        table, _, printed = capfd.readouterr()[0].partition(". .venv/bin/activate\n")
        assert "word frequencies        237.32    239.79\n" in table
    assert [path.name for path in kept.parent.iterdir()] == ["model.pt"]
    commands = [shlex.split(line) for line in printed.splitlines()]
    assert len(commands) == 3
    for _, name, *flags in commands:
        status, out, err = script(name.removesuffix(".py"), *flags, "--no-cuda")
        assert (status, err) == (0, "")
        assert out
    assert (tmp_path / "demo.html").stat().st_size > 10_000
