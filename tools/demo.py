"""The four stages on the sample corpus: train, finetune, cache, sample; then a table of results.

Ends with exit status 1 if a stage fails or is no better than word frequencies alone.
"""

import argparse
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools.make_sample import SAMPLE, SPLITS, token_counts, unigram_perplexity

ROOT = Path(__file__).resolve().parent.parent
# Small enough for five minutes on two cores.
TRAINING = """
    --batch_size 20 --bptt 35 --emsize 128 --nhid 256 --nlayers 2 --dropout 0.3 --dropouth 0.2
    --dropouti 0.3 --dropoute 0.05 --wdrop 0.3 --seed 1
""".split()
STAGES = {
    "main.py": [*TRAINING, "--epochs", "10", "--nonmono", "2"],
    "finetune.py": [*TRAINING, "--epochs", "4", "--nonmono", "2"],
    "pointer.py": ["--window", "500", "--theta", "0.5", "--lambdasm", "0.1"],
}


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


def main() -> None:
    """Run the stages and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="LSTM", choices=["LSTM", "QRNN", "GRU"])
    cell = parser.parse_args().model
    start = time.time()
    train, *others = (token_counts(SAMPLE, split) for split in SPLITS)
    rows = [("word frequencies", *(unigram_perplexity(train, counts) for counts in others))]
    with tempfile.TemporaryDirectory() as folder:
        model = str(Path(folder) / "model.pt")
        for script, flags in STAGES.items():
            where = ["--data", str(SAMPLE), "--model", cell, "--save", model]
            output = run(script, *where, *flags)
            valid = min(map(float, re.findall(r"(?:valid|val) ppl +([\d.]+)", output)))
            test = float(re.findall(r"test ppl +([\d.]+)", output)[-1])
            rows.append((script, valid, test))
        run("generate.py", "--checkpoint", model, "--outf", "-", "--words", "100")
    print(f"\nPerplexity on the sample corpus, {cell}, {time.time() - start:.0f} s in all:\n")
    print(f"{'after':<18}{'validation':>12}{'test':>10}")
    for name, valid, test in rows:
        print(f"{name:<18}{valid:12.2f}{test:10.2f}")
    worse = [name for name, *row in rows[1:] if row[0] >= rows[0][1] or row[1] >= rows[0][2]]
    if worse:
        sys.exit(f"no better than word frequencies: {', '.join(worse)}")


if __name__ == "__main__":
    main()
