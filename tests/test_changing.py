"""docs/changing.md: its patches apply, and the changed code goes through every stage."""

import re
import shutil
import subprocess
import sys

import patches
import pytest
from conftest import ROOT


def test_the_patches_apply_and_go_through_every_stage(corpus_dir, tmp_path):
    page = (ROOT / "docs" / "changing.md").read_text(encoding="utf-8")
    found = re.findall(r"^```diff\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    assert len(found) == 6
    tree = tmp_path / "tree"
    unneeded = shutil.ignore_patterns("data", ".*", "*.pt", "results", "docs", "reproduce")
    shutil.copytree(ROOT, tree, ignore=unneeded)
    for patch in found:
        patches.apply(patch, tree)
    command = [sys.executable, "tests/changed.py", corpus_dir, tmp_path]
    result = subprocess.run(command, cwd=tree, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "the right word is among the 5 likeliest: " in result.stdout


PATCH = """--- a/file
+++ b/file
@@ -2,3 +2,3 @@
 b
-c
+C
 d
@@ -5,2 +5,3 @@
 e
+new
 f
--- /dev/null
+++ b/other
@@ -0,0 +1 @@
+text
"""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a b c d e f", "a b C d e new f"),
        ("0 a b c d 1 e 2 f", "0 a b C d 1 e new 2 f"),
        ("a b 1 c d e 2 f", "a b 1 C d e new 2 f"),
        ("c a b c d c e f", "c a b C d c e new f"),
    ],
)
def test_a_patch_applies_beside_added_lines(text, expected, tmp_path):
    (tmp_path / "file").write_text(text.replace(" ", "\n"), encoding="utf-8")
    patches.apply(PATCH, tmp_path)
    assert (tmp_path / "file").read_text("utf-8").split() == expected.split()
    assert (tmp_path / "other").read_text("utf-8") == "text\n"


@pytest.mark.parametrize("text", ["a b d e f", "a b C d e f"])
def test_a_patch_for_other_code_is_refused(text, tmp_path):
    (tmp_path / "file").write_text(text.replace(" ", "\n"), encoding="utf-8")
    with pytest.raises(ValueError, match="file: no place for"):
        patches.apply(PATCH, tmp_path)
