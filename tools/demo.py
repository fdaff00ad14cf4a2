"""The four stages on the sample corpus: train, finetune, cache, sample; then a table of results.

The model is kept as demo/model.pt, in place of the last demonstration's. Ends with exit status 1 if
a stage fails or is no better than word frequencies alone.
"""

import argparse
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SAMPLE = ROOT / "data" / "sample"
STAGES = ("main.py", "finetune.py", "pointer.py")
MODEL = ROOT / "demo" / "model.pt"


def run(script: str, *flags: str) -> str:
    """Run a script, passing its output on line by line; return the output."""
    print(f"\n$ python {script} {' '.join(flags)}", flush=True)
    command = [sys.executable, str(ROOT / script), *flags]
    lines = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, encoding="utf-8") as process:
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    if process.returncode:
        sys.exit(f"{script} ended with exit status {process.returncode}")
    return "".join(lines)


def token_counts(split: str) -> Counter[str]:
    """How often each token occurs in a file of the sample, `<eos>` once a line."""
    text = (SAMPLE / f"{split}.txt").read_text(encoding="utf-8")
    return Counter(text.replace("\n", " <eos> ").split())


def unigram_perplexity(train: Counter[str], tokens: Counter[str]) -> float:
    """Return exp of the mean of -log p(token), p being the share of the token in train.

    Both are counts of tokens, `<eos>` included; every token has to occur in train.
    """
    total = train.total()
    log_probs = sum(count * math.log(train[token] / total) for token, count in tokens.items())
    return math.exp(-log_probs / tokens.total())


def main(argv: list[str] | None = None) -> None:
    """Run the stages, print the table, and keep the model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="LSTM", choices=["LSTM", "QRNN", "GRU"])
    cell = parser.parse_args(argv).model
    start = time.time()
    train, *others = map(token_counts, ("train", "valid", "test"))
    rows = [("word frequencies", *(unigram_perplexity(train, counts) for counts in others))]
    MODEL.parent.mkdir(exist_ok=True)
    # A demonstration that fails or is stopped leaves the last one's model as it is.
    with tempfile.TemporaryDirectory(dir=MODEL.parent) as folder:
        model = str(Path(folder) / "model.pt")
        for script in STAGES:
            flags = ["--preset", "small", "--data", str(SAMPLE), "--model", cell, "--save", model]
            output = run(script, *flags)
            valid = min(map(float, re.findall(r"(?:valid|val) ppl +([\d.]+)", output)))
            test = float(re.findall(r"test ppl +([\d.]+)", output)[-1])
            rows.append((script, valid, test))
        run("generate.py", "--checkpoint", model, "--outf", "-", "--words", "100")
        os.replace(model, MODEL)
    print(f"\nPerplexity on the sample corpus, {cell}, {time.time() - start:.0f} s in all:\n")
    print(f"{'after':<18}{'validation':>12}{'test':>10}")
    for name, valid, test in rows:
        print(f"{name:<18}{valid:12.2f}{test:10.2f}")
    shown = os.path.relpath(MODEL, ROOT)
    print(f"\nThe model is {shown}, until the next demonstration replaces it. Try it:\n")
    print(". .venv/bin/activate")
    print(f"python generate.py --checkpoint {shown} --outf - --words 60 --prompt 'and the king'")
    print(f"python score.py --checkpoint {shown} --text 'and the king said unto them' --tokens")
    print(f"python score.py --checkpoint {shown} --html demo.html data/sample/test.txt")
    worse = [name for name, *row in rows[1:] if row[0] >= rows[0][1] or row[1] >= rows[0][2]]
    if worse:
        sys.exit(f"no better than word frequencies: {', '.join(worse)}")


if __name__ == "__main__":
    main()
