"""docs/changing.md: its patches apply, and the changed code goes through every stage."""

import re
import shutil
import subprocess
import sys

from conftest import ROOT


def test_the_patches_apply_and_go_through_every_stage(corpus_dir, tmp_path):
    page = (ROOT / "docs" / "changing.md").read_text(encoding="utf-8")
    patches = re.findall(r"^```diff\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    assert len(patches) == 6
    tree = tmp_path / "tree"
    unneeded = shutil.ignore_patterns("data", ".*", "*.pt", "results", "docs", "reproduce")
    shutil.copytree(ROOT, tree, ignore=unneeded)
    for patch in patches:
        command = ["git", "apply", "--unsafe-paths", "-"]
        done = subprocess.run(command, cwd=tree, input=patch, text=True, capture_output=True)
        assert done.returncode == 0, f"docs/changing.md changes lines that differ: {done.stderr}"
    command = [sys.executable, "tests/changed.py", corpus_dir, tmp_path]
    result = subprocess.run(command, cwd=tree, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "the right word is among the 5 likeliest: " in result.stdout
