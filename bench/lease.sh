#!/usr/bin/env bash
# Everything to measure on a GPU, in two calls of ten minutes on one machine:
#
#   OUT=FOLDER bash bench/lease.sh first     compiles, tests, times, and trains for the rest of the time
#   OUT=FOLDER bash bench/lease.sh second    goes on training, then scores
#
# OUT/lease.tar.gz holds the output of all parts that have ended, also after a call that was cut short. A
# part that fails or takes too long does not stop the others. Without .git, COMMIT names the commit.
set -uo pipefail
cd "$(dirname "$0")/.."
call=${1:?first or second} end=${SECONDS_IN_ALL:-560} work=${WORK:-lease} data=${DATA:-data/penn}
: "${OUT:?a folder for lease.tar.gz}" "${COMMIT:=$(git rev-parse HEAD)}" "${COMMIT:?the commit of this code}"
[ -d "$data" ] || { echo "there is no folder $data: ./getdata.sh penn gets it"; exit 1; }
mkdir -p "$work" "$OUT"
gpu=$(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader)
echo "commit $COMMIT, $gpu, $call call" | tee -a "$work/parts.txt"

part() { # NAME SIGNAL SECONDS COMMAND...
    local name=$1 signal=$2 limit=$3 left=$((end - SECONDS)) began=$SECONDS status=0
    shift 3
    [ "$limit" -le "$left" ] || limit=$left
    [ "$limit" -gt 0 ] || { echo "$name: no time left" | tee -a "$work/parts.txt"; return; }
    # In the foreground: a background job would ignore the SIGINT after which training scores its model, and
    # a benchmark prints the rounds that have ended.
    timeout -k 20 -s "$signal" "$limit" "$@" >"$work/$name.txt" 2>&1 || status=$?
    echo "$name: status $status, $((SECONDS - began)) of $limit s" | tee -a "$work/parts.txt"
    # The weights stay on the machine.
    tar -czf "$OUT/part.tar.gz" -C "$work" --exclude='*.pt*' . &&
        mv "$OUT/part.tar.gz" "$OUT/lease.tar.gz"
}
compile='import sys, torch; from qrnn import forget_mult
like = torch.zeros(1, device="cuda", dtype=getattr(torch, sys.argv[1]))
print(sys.argv[1], forget_mult.way_for(like).__name__)'
each='for dtype in float32 bfloat16 float16 float64; do python3 -c "$0" $dtype & done; wait'

if [ "$call" = first ]; then
    part compile TERM 60 bash -c "$each" "$compile"
    part tests TERM 130 python3 -m pytest -q -m gpu -n 14 --dist loadfile
    part step-qrnn INT 60 python3 bench/train_step.py --only "PTB QRNN"
    part step-lstm INT 60 python3 bench/train_step.py --only "PTB LSTM"
    part qrnn INT 90 python3 bench/qrnn_layer.py
    part profile TERM 60 python3 bench/train_step.py --only "PTB QRNN" --profile
    part main INT $((end - SECONDS - 30)) python3 main.py --preset ptb-qrnn --data "$data" \
        --save "$work/PTB.pt" --logdir "$work"
else
    part main-2 INT $((end - SECONDS - 150)) python3 main.py --resume "$work/PTB.pt"
    part pointer TERM 40 python3 pointer.py --preset ptb-qrnn --data "$data" --save "$work/PTB.pt"
    part dynamiceval TERM 100 python3 dynamiceval.py --preset ptb-qrnn --data "$data" \
        --save "$work/PTB.pt"
fi
