#!/bin/sh
# Fetch corpora: ./getdata.sh NAME...   (penn pennchar wikitext-2 wikitext-103 enwik8 all)
# PYTHON=... picks the interpreter; ./getdata.sh --help explains DATA_DIR and BASE_URL
set -eu

here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)

if [ -z "${PYTHON:-}" ]; then
    if command -v python3 >/dev/null 2>&1; then
        PYTHON=python3
    else
        PYTHON=python
    fi
fi
if ! command -v "$PYTHON" >/dev/null 2>&1; then
    echo "getdata.sh: there is no $PYTHON: install Python 3.10 or newer, or name it in PYTHON" >&2
    exit 1
fi

exec "$PYTHON" "$here/tools/getdata.py" "$@"
