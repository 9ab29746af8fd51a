#!/usr/bin/env bash
# A GPU's first ten minutes with this code: is it right, how fast is it, and where does the time go.
#
#     OUT=/tmp/gpu bash repro/gpu_check.sh                        # pairs with HH's lengths, of random letters
#     HH=hh-rlhf OUT=/tmp/gpu bash repro/gpu_check.sh             # real pairs, and GPT-2's BPE
#     MODEL=models/smollm2 HH=hh-rlhf OUT=/tmp/gpu bash repro/gpu_check.sh        # also repro/smollm2.py's chat model
#
# At most 9 minutes on an H100, the most valuable first. Everything lands under $OUT: summary.jsonl (what ran, how
# long), log.txt, bench.jsonl, profile.txt, gpt2.md, xl.md. It needs torch, numpy, tqdm, safetensors, pytest,
# transformers, and TRL for its rows. Nothing is downloaded.
#
# DEADLINE=seconds; SKIP="tests pipeline ..." leaves sections out; DRY=1 takes tiny models and all the time it needs,
# to try the script itself.
set -u
ROOT=$(cd "$(dirname "$0")/.." && pwd)
OUT=${OUT:-/tmp/gpu_check}
W=${W:-/tmp/gpu_check_work}
PY=${PY:-python3}
DRY=${DRY:-}
DEADLINE=${DEADLINE:-540}
HH=${HH:+$(cd "$HH" && pwd)}
MODEL=${MODEL:+$(cd "$MODEL" && pwd)}
export ROOT OUT W DRY MODEL
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}
mkdir -p "$OUT" "$W"
OUT=$(cd "$OUT" && pwd)
cd "$W"
SECONDS=0
if [ -n "$DRY" ]; then
    SMALL=tiny BIG=tiny STEPS=2 SLOWER=6
    GPT2="--pairs=16 --batch_size=8 --epochs=1 --micro_batch=8"
    XL=$GPT2
else
    SMALL=gpt2 BIG=gpt2-xl STEPS=8 SLOWER=1
    GPT2="--pairs=512 --batch_size=64 --epochs=1 --micro_batch=32"
    XL="--pairs=128 --batch_size=64 --epochs=1 --micro_batch=8"
fi

section() {         # section NAME SECONDS COMMAND...: within what is left of the deadline
    local name=$1 limit=$(($2 * SLOWER)) began=$SECONDS left status
    shift 2
    case " ${SKIP:-} " in *" $name "*) return 0 ;; esac
    left=$((DEADLINE * SLOWER - SECONDS))
    if [ $left -lt 12 ]; then
        echo "{\"section\": \"$name\", \"skipped\": \"no time left\"}" | tee -a "$OUT/summary.jsonl"
        return 0
    fi
    [ $limit -gt $left ] && limit=$left
    timeout -k 5 $limit bash -c '"$@"' "$name" "$@" > "$name.log" 2>&1
    status=$?
    { echo; echo "######## $name: status $status"; tail -c 300000 "$name.log"; } >> "$OUT/log.txt"
    printf '{"section": "%s", "status": %d, "seconds": %d, "limit": %d, "at": %d}\n' \
        "$name" $status $((SECONDS - began)) $limit $SECONDS | tee -a "$OUT/summary.jsonl"
}

together() {        # several sections at once; one after another where the cores are few
    local running=()
    for command in "$@"; do
        $command &
        running+=($!)
        [ -n "$DRY" ] && wait $!
    done
    wait "${running[@]}"
}

run="$PY -m torch.distributed.run --standalone --nproc_per_node=1"
flags="--name=hh --batch_size=32 --eval_interval=0 --log_interval=1 --warmup_steps=2 --learning_rate=1e-5"
export PY run flags HH SMALL

data() {            # data/hh, and random weights of its vocabulary
    set -eu
    if [ -n "$HH" ]; then
        $PY "$ROOT/prepare_prefs.py" --name=hh --source="$HH" --data_dir=harmless-base --tokenizer=gpt2
    else
        $PY "$ROOT/repro/gpu_check.py" pairs letters
        $PY "$ROOT/prepare_prefs.py" --name=hh --source=letters --tokenizer=bytes
    fi
    $PY "$ROOT/repro/gpu_check.py" weights init $SMALL data/hh
}

pipeline() {        # the four stages of a real config, resume and export
    set -eu
    $run "$ROOT/sft.py" $flags --init_from=init --max_steps=4
    TORCH_LOGS=recompiles $run "$ROOT/dpo.py" $flags --max_steps=12 --save_interval=6 --kl_prompts=4
    cp out/hh/dpo/log.jsonl whole.jsonl
    rm out/hh/dpo/step-000012.*
    $run "$ROOT/dpo.py" $flags --max_steps=12 --save_interval=6 --kl_prompts=0 --resume
    $PY "$ROOT/repro/gpu_check.py" resumed whole.jsonl out/hh/dpo/log.jsonl
    $PY "$ROOT/sample.py" --name=hh --num_prompts=4 --max_new_tokens=40 --show=2 || echo 'FAILED: sample.py'
    rm -rf exported
    PYTHONPATH=$ROOT $PY -m nanodpo.export out/hh/dpo exported
    [ -n "$DRY" ] || $PY -c "from transformers import AutoModelForCausalLM
print(AutoModelForCausalLM.from_pretrained('exported').cuda().generate(max_new_tokens=8))"
}

real() {            # a chat model on real pairs, before and after
    set -eu
    $PY "$ROOT/prepare_prefs.py" "$ROOT/config/smollm2.py" --source="$HH" --tokenizer="$MODEL"
    $PY "$ROOT/dpo.py" "$ROOT/config/smollm2.py" --init_from="$MODEL" --max_steps=44 --eval_interval=11 --kl_prompts=32
    $PY "$ROOT/sample.py" "$ROOT/config/smollm2.py" --before="$MODEL" --num_prompts=32 --show=6
}

two_ranks() {       # on one GPU, so over gloo
    set -eu
    mkdir -p two
    cp -r data init two/
    cd two
    $PY "$ROOT/repro/gpu_check.py" two_ranks $flags --init_from=init --batch_size=16 --max_steps=3 --kl_prompts=0 \
        --row_tokens=2048
}
export -f data pipeline real two_ranks

# -----------------------------------------------------------------------------
# the plan. What stands together is not timed: it runs at once, while XL compiles and waits for the file `wait`

rm -f wait
section machine 45 $PY "$ROOT/repro/gpu_check.py" machine
section data 60 data
section pipeline 200 pipeline
[ -z "$MODEL" ] || section real 150 real
tests() { section tests 170 $PY -m pytest -q -p no:cacheprovider "$ROOT/tests/test_gpu.py"; }
numerics() { section numerics 100 $PY "$ROOT/repro/gpu_check.py" numerics; }
losses() {
    mkdir -p losses
    cp -r data init losses/
    cd losses
    section losses 150 $PY "$ROOT/repro/gpu_check.py" losses $flags --init_from=init --max_steps=3 --kl_prompts=0
}
ranks() { section two_ranks 160 two_ranks; }
bench_xl() { section bench_xl 330 $PY "$ROOT/repro/gpu_check.py" bench $BIG block 16384 $STEPS profile "$@"; }
if [ -n "$DRY" ]; then
    bench_xl
    together tests numerics losses ranks
else
    bench_xl wait &
    waiting=$!
    together tests numerics losses ranks
    touch wait
    wait $waiting
fi
section bench_gpt2 75 $PY "$ROOT/repro/gpu_check.py" bench $SMALL block 16384 $STEPS profile
section generate 60 $PY "$ROOT/repro/gpu_check.py" generate $SMALL
throughput="$PY $ROOT/repro/throughput.py --device=cuda --dtype=bfloat16 --sections=train
            --contenders=ours,padded,padded-nocudnn,trl,trl-best"
section throughput_gpt2 130 $throughput --model=$SMALL $GPT2 --out="$OUT/gpt2"
section throughput_xl 150 $throughput --model=$BIG $XL --out="$OUT/xl"
# what might be better
section bench_whole 90 $PY "$ROOT/repro/gpu_check.py" bench $SMALL whole 16384 $STEPS
section flex 100 $PY "$ROOT/repro/gpu_check.py" flex $BIG 95
section bench_eager 40 $PY "$ROOT/repro/gpu_check.py" bench $SMALL eager 16384 $STEPS
echo "== $SECONDS s"
cut -c1-400 "$OUT/bench.jsonl"
