#!/usr/bin/env bash
# Regenerates every table and figure of results/report.md on real MNIST.
#
#   bash run_all.sh                 every stage, in order
#   bash run_all.sh STAGE...        only these stages: lazy evidence cures ablations biased lntl robust robgan
#   bash run_all.sh report          write report.md again from the results that are there
#   bash run_all.sh test            set up, then run the tests
#   bash run_all.sh --list STAGE... what remains to be done, a command a line behind its level; a level needs those below it
#   bash run_all.sh --step SCRIPT   one such command: python SCRIPT, its mark in DIR/.done
#   QUICK=1 bash run_all.sh         everything in a few minutes on a small subset, into results/quick
#   FRESH=1 bash run_all.sh         start over instead of continuing
#   JOBS=4 bash run_all.sh          steps side by side (default: one per core), one thread each
#   PYTHON=... bash run_all.sh      use this python (default: one that has torch, else a new .venv)
#
# A finished step leaves a mark in DIR/.done, named after its command and the code it ran: a second call continues where the
# first one stopped, and after a script was changed it runs again, with all that read its results.
set -euo pipefail
cd "$(dirname "$0")"

STAGES="lazy evidence cures ablations biased lntl robust robgan"
DIR=results
JOBS=${JOBS:-$(getconf _NPROCESSORS_ONLN)}
SEEDS="42 43 44 45 46" FEW="42 43 44"  # of the headline, and of side tables
VARIANCES="020 030 040 050"  # thousandths, of lntl
BIASED="999 995 99"  # the worlds of biased, by the digits behind the point
DATA= BUDGET= RESNET=resnet50 N=1000
if [ "${QUICK:-0}" = 1 ]; then
  DIR=results/quick SEEDS="42 43" FEW="42" DATA="--limit 6000" BUDGET="--epochs 2" RESNET=resnet18 N=50 VARIANCES="020 050" BIASED="999 99"
fi
DONE=$DIR/.done
export OMP_NUM_THREADS=1 MKL_NUM_THREADS=1  # busy threads of side-by-side processes on few cores stall each other

fail() { echo "run_all.sh: $*" >&2; exit 2; }
case $JOBS in *[!0-9]* | 0* | ????*) fail "JOBS is '$JOBS'; give a number from 1 to 999" ;; esac
case ${QUICK:-0}${FRESH:-0} in [01][01]) ;; *) fail "QUICK is '${QUICK:-}' and FRESH is '${FRESH:-}'; both are 0 or 1" ;; esac
[ -z "${PYTHON:-}" ] || command -v "$PYTHON" > /dev/null || fail "PYTHON is '$PYTHON', which cannot be run; leave it out to find one"

# ---- setup: $PYTHON if you name one, else the first python here that can import what we need, else a fresh .venv
setup() {
  [ -z "${PYTHON:-}" ] || return 0
  local probe="import sys, torch, torchvision, numpy, matplotlib, pytest, ruff; assert sys.version_info >= (3, 11)"
  for PYTHON in .venv/bin/python python3 python; do
    command -v "$PYTHON" > /dev/null && "$PYTHON" -c "$probe" 2> /dev/null && return
  done
  PYTHON=$(command -v python3 || command -v python) || fail "there is no python3 here; install Python 3.11 or newer"
  echo "run_all.sh: making .venv from requirements.txt (a few minutes, about 6 GB)"
  "$PYTHON" -m venv .venv || fail "python -m venv failed; install the venv module (Debian: apt install python3-venv)"
  PYTHON=.venv/bin/python
  "$PYTHON" -m pip install --quiet --disable-pip-version-check -r requirements.txt || fail "pip could not install requirements.txt; its message is above"
}

# ---- one at a time: descriptor 9 holds the lock, and so do the steps, which a killed run_all.sh leaves behind; the system frees it with the last
alone() {
  [ -z "${LOCKED:-}" ] || return 0
  mkdir -p "$DIR"
  exec 9>> "$DIR/.run_all.lock"
  "$PYTHON" -c '
import fcntl, sys
try:
    fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    sys.exit(1)
except OSError:
    pass  # a file system without locks' ||
    fail "another run_all.sh (process $(cat "$DIR/.run_all.lock")) or a step that it left behind is at work in $DIR; wait for it"
  LOCKED=$$
  echo $$ > "$DIR/.run_all.lock"
  [ "${FRESH:-0}" != 1 ] || rm -rf "$DONE"
  mkdir -p "$DONE"
  find "$DONE" -name 'log.*' -mtime +1 -delete  # of killed steps; a younger one may be of a --step elsewhere
}

# ---- steps: queue them with `step`, run the queue side by side with `go`
QUEUE=()
step() { set -- $*; QUEUE+=("$*"); }  # one blank between words, as --step will see them

mark() {  # the file that says this command was run by this code: every script upstream of it counts
  local code
  case $1 in
    make_data.py*) code="make_data.py" ;;
    train.py*) code="make_data.py train.py" ;;
    *) code="make_data.py train.py ${1%% *}" ;;
  esac
  echo "$DONE/$( { echo "$1"; cat common.py $code; } | cksum | tr ' ' -)"
}

one() {  # one step; what it printed is shown if it fails
  local began=$SECONDS log=$DONE/log.${HOSTNAME:-here}.$$.$K mark child=
  trap 'kill $child 2> /dev/null || :; rm -f "$log"; exit 143' TERM  # before there is anything to leave behind
  mark=$(mark "$1") || return 1
  "$PYTHON" $1 > "$log" 2>&1 &
  child=$!
  if wait $child; then
    mv "$log" "$mark"
    echo "  $2$(printf '%5ds' $((SECONDS - began)))  $([ $STEPS = 0 ] || left)  python $1"
  else
    echo "run_all.sh: FAILED after $((SECONDS - began))s: python $1" >&2
    tail -n 20 "$log" >&2
    rm -f "$log"
    return 1
  fi
}

minutes() {  # what a stage takes on two cores; the time left is told from these and the pace so far
  case $1 in lazy) echo 12 ;; evidence) echo 6 ;; cures) echo 5 ;; robust) echo 29 ;; robgan) echo 17 ;; *) echo 9 ;; esac
}

left() {  # after the K-th of the STEPS steps of this stage
  local done=$((PAST * 60 + $(minutes "$STAGE") * 60 * K / STEPS)) spent=$((SECONDS - BEGAN))
  [ $done -lt 60 ] || echo "about $((spent * (TOTAL * 60 - done) / done / 60 + 1)) min left"
}

LIST=0 LEVEL=0 K=0 STEPS=0 PAST=0 TOTAL=0
go() {  # runs the queue, JOBS steps at a time; after a failure nothing new is started and finished steps are kept
  local todo=() command
  for command in "${QUEUE[@]}"; do [ -e "$(mark "$command")" ] || todo+=("$command"); done
  if [ $LIST = 1 ]; then
    [ ${#todo[@]} = 0 ] || LEVEL=$((LEVEL + 1))
    for command in ${todo[@]+"${todo[@]}"}; do echo "$LEVEL ${QUICK:+QUICK=$QUICK }bash run_all.sh --step $command"; done
    QUEUE=()
    return
  fi
  echo "$STAGE: $1: ${#todo[@]} steps to do, $((${#QUEUE[@]} - ${#todo[@]})) done before, $((SECONDS / 60)) min $((SECONDS % 60)) s so far"
  QUEUE=()
  rm -f "$DONE/failed"
  for command in ${todo[@]+"${todo[@]}"}; do
    while [ "$(jobs -rp | wc -l)" -ge "$JOBS" ]; do sleep 0.2; done
    [ ! -e "$DONE/failed" ] || break
    K=$((K + 1))
    { one "$command" "$STAGE $K/$STEPS" || : > "$DONE/failed"; } &
  done
  wait
  [ ! -e "$DONE/failed" ] || { echo "run_all.sh: stopped at the failed step above; mend it and run the same command again to continue" >&2; exit 1; }
}

# ---- stages: one line a step, fit to paste behind `python`; behind it what it feeds
lazy() {
  step "make_data.py --dir $DIR $DATA"                                       # samples.png
  step "make_data.py --dir $DIR/unbiased --corr 0.1 $DATA"                   # the oracle's world
  go "paint the worlds"
  for s in $SEEDS; do
    for method in combined jitter grl baseline; do
      step "train.py --dir $DIR --method $method --seed $s $BUDGET"          # headline table, learning curves, confusion
    done
    step "train.py --dir $DIR/unbiased --name oracle_s$s --seed $s $BUDGET"  # the last row of the table: its ceiling
  done
  step "train.py --dir $DIR --method jitter --alpha 2 --jitter hsv --classify image --no-fade --name jitter_published_s42 $BUDGET"  # the published cures
  step "train.py --dir $DIR --method grl --no-conditional --name grl_unconditional_s42 $BUDGET"
  go "train"
  step "attack.py --dir $DIR --src 7 --tgt 3 --eps 0.05"                     # a first look at seed 42; `evidence` takes all seeds
  step "gradcam.py --dir $DIR --models $(SEEDS=$FEW over_seeds baseline jitter combined unbiased/oracle)"  # heat maps, flip rates, null rows
  go "look and attack"
  report
}

cures() {  # the other rows of the headline table
  step "train.py --dir $DIR --method lntl $BUDGET"                           # slow: its heads look at every pixel of the background
  for s in $FEW; do
    for method in lff groupdro jtt biasbal; do step "train.py --dir $DIR --method $method --seed $s $BUDGET"; done
  done
  go "train"
  report
}

evidence() {  # what a sceptic asks for: nulls, ceilings, all seeds, other attacks, other weights
  local few="$(SEEDS=$FEW over_seeds baseline jitter)"
  step "attack.py --dir $DIR --n $((N / 2)) --models $few grl_s42 combined_s42 unbiased/oracle_s42"  # min-eps, sweep, the verdict
  step "train.py --dir $DIR --shuffle-labels --name shuffled_s42 $BUDGET"  # a null model for the heat maps
  step "train.py --dir $DIR --method jitter --alpha 2 --name jitter_alpha2_s42 $BUDGET"
  step "train.py --dir $DIR --method grl --gamma 1 --name grl_gamma1_s42 $BUDGET"
  step "attack.py --dir $DIR --untargeted --n $((2 * N)) --models $few grl_s42 combined_s42 unbiased/oracle_s42"
  step "gradcam.py --dir $DIR --cam hirescam --models $few"
  step "attack.py --dir $DIR --pairs"
  go "train the null row and other weights, attack"
  step "gradcam.py --dir $DIR --models $(over_seeds baseline jitter grl combined unbiased/oracle) shuffled_s42"
  step "attack.py --dir $DIR --check"                                        # fails the stage if an attack cannot be trusted
  go "look, and check the attacks"
  report
}

ablations() {  # which part of the cure does the work, and how much is budget or size (budget.png)
  local e m cycle="--schedule onecycle --lr 1e-2"
  variant() { step "train.py --dir $DIR --method $1 --name $2_s42 $BUDGET"; }
  step "train.py --dir $DIR --name baseline_epochs30_s42 ${BUDGET:---epochs 30}"
  for m in jitter baseline; do variant "$m --width 16" ${m}_width16; done
  step "train.py --dir $DIR/unbiased --width 16 --name oracle_width16_s42 $BUDGET"
  for m in combined jitter biasbal baseline; do variant "$m $cycle" ${m}_onecycle; done
  step "train.py --dir $DIR/unbiased --name oracle_onecycle_s42 $cycle $BUDGET"
  variant "combined --gamma 0" combined_gamma0  # jitter with colour labels, nothing reversed
  variant "jitter --alpha 0" jitter_alpha0      # plain augmentation: the control for the KL term
  variant "jitter --no-fade" jitter_nofade
  variant "jitter --classify image" jitter_image
  variant "jitter --jitter hsv" jitter_hsv
  variant "jitter --grain 0" jitter_grain0
  variant "jitter --divergence reverse" jitter_reverse
  for e in 3 1; do
    for m in jitter baseline; do step "train.py --dir $DIR --method $m --name ${m}_epochs${e}_s42 ${BUDGET:---epochs $e}"; done
    step "train.py --dir $DIR/unbiased --name oracle_epochs${e}_s42 ${BUDGET:---epochs $e}"
  done
  go "train"
  report
}

biased() {  # Biased-MNIST, beside its published table; every method at the learning rate that val prefers
  local c m s cycle="--schedule onecycle --lr 1e-2"
  four() {  # the four methods on world flat_$1 with seed $2
    for m in "jitter --grain 0 $cycle" "baseline $cycle" "biasbal --schedule onecycle --lr 3e-3" lff; do
      step "train.py --dir $DIR/flat_$1 --seed $2 --width 16 --method $m ${BUDGET:---epochs 4}"
    done
  }
  for c in $BIASED; do step "make_data.py --dir $DIR/flat_$c --recipe flat --corr 0.$c $DATA"; done
  go "paint the worlds"
  step "train.py --dir $DIR/flat_99 --method biasbal --name biasbal_long_s42 --width 16 --schedule onecycle --lr 3e-3 ${BUDGET:---epochs 10}"
  for c in $BIASED; do four $c 42; done
  for s in ${FEW#42}; do  # how much a seed matters, where the shortcut is strongest and weakest
    for c in ${BIASED%% *} ${BIASED##* }; do
      for m in "jitter --grain 0" baseline; do step "train.py --dir $DIR/flat_$c --seed $s --width 16 --method $m $cycle ${BUDGET:---epochs 4}"; done
    done
  done
  go "train"
  report
}

lntl() {  # Learning Not to Learn, beside its published table
  local v epochs="${BUDGET:---epochs 5}" cycle="--width 16 --schedule onecycle --lr 1e-2" hiding="--method lntl --entropy 20 --model saturatedcnn"
  for v in $VARIANCES; do step "make_data.py --dir $DIR/lntl_$v --recipe digit --sigma2 0.$v $DATA"; done
  go "paint the worlds"
  for v in $VARIANCES; do
    step "train.py --dir $DIR/lntl_$v $hiding $cycle $epochs"
    step "train.py --dir $DIR/lntl_$v --method baseline $cycle $epochs"
    case $v in 020 | 050)
      step "train.py --dir $DIR/lntl_$v --method baseline --grayscale --name grayscale_s42 $cycle $epochs"
      step "train.py --dir $DIR/lntl_$v --method jitter --grain 0 $cycle $epochs" ;;
    esac
  done
  for s in ${FEW#42}; do  # how much a seed matters
    step "train.py --dir $DIR/lntl_020 --seed $s $hiding $cycle $epochs"
    step "train.py --dir $DIR/lntl_020 --method baseline --seed $s $cycle $epochs"
  done
  step "train.py --dir $DIR/lntl_020 --name lntl_paper_s42 $hiding --entropy 0.01 $cycle $epochs"       # the paper's weights
  step "train.py --dir $DIR/lntl_020 --name lntl_simplecnn_s42 $hiding --model simplecnn $cycle $epochs"  # what the net is worth
  step "train.py --dir $DIR/lntl_020 --name baseline_saturatedcnn_s42 --model saturatedcnn $cycle $epochs"
  go "train"
  report
}

tests() {  # the format, then the fast ones, one process a file, JOBS side by side
  "$PYTHON" -m ruff format --check . || fail "some files are not formatted; run: $PYTHON -m ruff format ."
  printf '%s\n' tests/test_*.py | xargs -P "$JOBS" -n 1 bash -c 'said=$("$0" -m pytest -q -m "not slow" "$1" 2>&1); code=$?; printf "%s: %s\n" "$1" "$said"; exit $code' "$PYTHON"
}

robust() {  # adversarial training: the published problem, a ResNet-50 from end to end, and what it does to a shortcut
  local m="--dir $DIR/mnist --method at --clean-epochs 1 --eps-ramp 0.3 --schedule onecycle"
  step "make_data.py --dir $DIR/mnist --recipe gray $DATA"
  go "paint the world"
  step "train.py $m --model $RESNET --name ${RESNET}_s42 --amp --steps 2 --step-size 0.06 --eps 0.1 --lr 2e-3 ${BUDGET:---epochs 3}"
  step "train.py $m --width 24 --eps 0.3 --lr 5e-3 ${BUDGET:---epochs 8}"
  step "train.py --dir $DIR --method at --width 16 --clean-epochs 1 --eps-ramp 0.5 --steps 3 --schedule onecycle --lr 1e-2 --balance-groups --crop 2 --name at_balanced_s42 $BUDGET"  # unbiased and robust
  step "train.py --dir $DIR/unbiased --method at --name oracle_at_s42 $BUDGET"  # where there is no shortcut
  step "train.py --dir $DIR --method at $BUDGET"  # in the headline table: the same net and budget as every row
  step "train.py --dir $DIR --balance-groups --name balanced_s42 $BUDGET"
  go "train"
  step "attack.py --dir $DIR/mnist --untargeted --eps 0.3 --restarts 10 --queries $((3 * N)) --n $((N / 2)) --models at_s42 at_clean_s42"
  step "attack.py --dir $DIR/mnist --untargeted --name resnet --eps 0.1 --n $((N / 10)) --sweep 0.1 0.2 --models ${RESNET}_s42 ${RESNET}_clean_s42"
  step "attack.py --dir $DIR --untargeted --name at --eps 0.05 --restarts 10 --n $((N / 2)) --models baseline_s42 jitter_s42 balanced_s42 at_s42 at_balanced_s42 unbiased/oracle_s42 unbiased/oracle_at_s42"
  [ "${QUICK:-0}" = 1 ] ||  # nets of two epochs say nothing about the attacks
    step "attack.py --dir $DIR/mnist --check --eps 0.3 --n $((N / 5)) --models at_s42"  # fails the stage if an attack cannot be trusted
  go "attack"
  report
}

robgan() {  # a generator beside adversarial training: did it collapse, and does it help? The same net and number of steps in all three
  local s m="--dir $DIR/mnist --width 16 --eps 0.3 --eps-ramp 0.3 --batch 64 --schedule cosine --lr 2e-3 ${BUDGET:---epochs 3}"
  step "make_data.py --dir $DIR/mnist --recipe gray $DATA"
  go "paint the world"
  step "train.py --dir $DIR/mnist --name judge_s42 --width 16 --schedule onecycle --lr 1e-2 ${BUDGET:---epochs 5}"  # sees no generated image
  go "train the judge"
  for s in ${FEW% *}; do step "train.py $m --method robgan --judge judge_s42 --seed $s"; done
  step "train.py $m --method robgan --judge judge_s42 --name robgan_finetuned_s42 --finetune-epochs 1"
  for s in ${FEW% *}; do step "train.py $m --method at --name robgan_without_s$s --seed $s"; done
  go "train"
  step "attack.py --dir $DIR/mnist --untargeted --name robgan --eps 0.3 --restarts 10 --n $((N / 5)) --models $(SEEDS=${FEW% *} over_seeds robgan_without robgan) robgan_finetuned_s42"
  go "attack"
  report
}

over_seeds() {  # NAME... to the names of all their seeds
  local name s
  for name in "$@"; do for s in $SEEDS; do printf '%s_s%s ' "$name" "$s"; done; done
}

CHAPTERS=("The question" "The world" "Does it cheat?" "Where does it look?" "What cures it?" "What does the cure cost?" "Is the cured model safer?"
  "Learning not to learn" "Robust training" "Rob-GAN" "Surprises and negative results" "What we could not do")

report() {  # results/report.md: what each script says of its own results, side by side, then chapter by chapter
  [ $LIST = 0 ] || return 0
  local command said chapter k=0 jobs=() part=$DIR/report.md.$$.part
  said=$(mktemp -d "$DIR/report.XXXXXX")
  for command in make_data.py train.py gradcam.py "gradcam.py --cam hirescam" attack.py; do
    case $command in  # a stage that was run alone has not all of them
      *hirescam) [ -e "$DIR/gradcam_hirescam.json" ] || continue ;;
      gradcam.py) [ -e "$DIR/gradcam.json" ] || continue ;;
      attack.py) ls "$DIR"/attack_*.json "$DIR"/mnist/attack_*.json > /dev/null 2>&1 || continue ;;
    esac
    k=$((k + 1))
    "$PYTHON" $command --dir "$DIR" --report > "$said/$k" &
    jobs+=($!)
  done
  for k in "${jobs[@]}"; do wait "$k" || { rm -rf "$said"; fail "no report; the reason is above"; }; done
  {
    echo "# The lazy artist: what was measured"
    for chapter in "${CHAPTERS[@]}"; do
      awk -v want="## $chapter" '/^## / { on = $0 == want; if (on && !told++) print "\n" want; next } on' "$said"/*
    done
  } > "$part"
  rm -rf "$said"
  mv "$part" "$DIR/report.md"
  echo "$STAGE: wrote $DIR/report.md, $((SECONDS / 60)) min $((SECONDS % 60)) s so far"
}

if [ "${1:-}" = --step ]; then
  case ${2:-} in make_data.py | train.py | gradcam.py | attack.py) ;; *) fail "--step '${2:-}' is no script of ours; give what --list printed" ;; esac
  setup
  mkdir -p "$DONE"
  shift
  [ -e "$(mark "$*")" ] || one "$*" "" || exit 1
  exit 0
fi
if [ "${1:-}" = --list ]; then LIST=1; shift; fi
[ $# -gt 0 ] || set -- $STAGES
for STAGE in "$@"; do
  case " $STAGES report test " in *" ${STAGE// /_} "*) ;; *) fail "there is no stage '$STAGE'; choose from: $STAGES report test" ;; esac
done
if [ $LIST = 1 ]; then
  for STAGE in "$@"; do case $STAGE in test | report) fail "--list takes stages, and $STAGE is none" ;; esac; done
  for STAGE in "$@"; do "$STAGE"; done
  exit 0
fi
trap 'kill $(jobs -p) 2> /dev/null; wait; echo "run_all.sh: interrupted; run the same command again to continue" >&2; exit 130' INT TERM
setup
TODO=()  # how many steps each stage has to do
for STAGE in "$@"; do
  case $STAGE in test | report) TODO+=(0) ;; *) TODO+=($(LIST=1 && "$STAGE" | wc -l)) ;; esac
  [ "${TODO[${#TODO[@]} - 1]}" = 0 ] || TOTAL=$((TOTAL + $(minutes "$STAGE")))
done
BEGAN=$SECONDS
for STAGE in "$@"; do
  STEPS=${TODO[0]} K=0
  TODO=("${TODO[@]:1}")
  case $STAGE in test) tests ;; report) report ;; *) alone; "$STAGE" ;; esac
  [ "$STEPS" = 0 ] || PAST=$((PAST + $(minutes "$STAGE")))
done
