#!/usr/bin/env bash
# Regenerates every table and figure on real MNIST.
#
#   bash run_all.sh                every stage: lazy evidence cures groups ablations biased lntl robust robgan
#   bash run_all.sh STAGE...       only these
#   bash run_all.sh report         refill tables and redraw figures from the results that are there
#   bash run_all.sh test           format, lint and the fast tests
#   bash run_all.sh --list STAGE   what remains, a command a line behind its level; a level needs those below
#   bash run_all.sh --step SCRIPT  one such command
#   QUICK=1 bash run_all.sh        everything on 6,000 images, into results/quick
#   FRESH=1 bash run_all.sh        start over, and replace results of other settings
#   JOBS=4 bash run_all.sh         steps side by side (default: one per core), one thread each
#   PYTHON=... bash run_all.sh     this python (default: one that has torch, else a new .venv)
#
# A finished step leaves a mark in DIR/.done, named after its command and the code it ran. A second call continues
# where the first one stopped, and repeats what a changed script makes, with all that reads its results.
set -euo pipefail
cd "$(dirname "$0")"

STAGES="lazy evidence cures groups ablations biased lntl robust robgan"
DIR=results
JOBS=${JOBS:-$(getconf _NPROCESSORS_ONLN)}
SEEDS="42 43 44 45 46" FEW="42 43 44"  # of the headline, and of side tables
VARIANCES="020 025 030 035 040 045 050"  # worlds of lntl, in thousandths
BIASED="999 997 995 99" CMNIST="995 99 98 95" WEAK="8 6 3"  # shares of aligned images, behind the point
SHARES="generated_0.3 generated_0.7"  # of generated pictures in a batch, beside a half
DATA= BUDGET= LONG= SHORT= RESNET=resnet50 SOME=30000 N=1000 QUERIES=5000
if [ "${QUICK:-0}" = 1 ]; then
  DIR=results/quick SEEDS="42 43" FEW=42 VARIANCES=020 BIASED=99 CMNIST=95 WEAK=6 SHARES=
  DATA="--limit 6000" LONG="--lr 0.01 --schedule onecycle" SHORT="--epochs 2" RESNET=resnet18 SOME=1500 N=50 QUERIES=100
  BUDGET="$LONG --epochs 4"  # LONG is for the headline table, where the cure should show
fi
DONE=$DIR/.done
export OMP_NUM_THREADS=1 MKL_NUM_THREADS=1  # threads of processes side by side on few cores stall each other

fail() { echo "run_all.sh: $*" >&2; exit 2; }
case $JOBS in *[!0-9]* | 0* | ????*) fail "JOBS is '$JOBS'; give a number from 1 to 999" ;; esac
case ${QUICK:-0}${FRESH:-0} in [01][01]) ;; *) fail "QUICK is '${QUICK:-}' and FRESH is '${FRESH:-}'; both are 0 or 1" ;; esac

# ---- setup: $PYTHON if you name one, else the first python with all we need, else a new .venv
setup() {
  local new="import sys; assert sys.version_info >= (3, 11)" all="import torch, torchvision, matplotlib, pytest, ruff"
  if [ -n "${PYTHON:-}" ]; then
    "$PYTHON" -c "$new" 2> /dev/null || fail "PYTHON is '$PYTHON', which is no Python 3.11 or newer; leave it out to find one"
    return
  fi
  for PYTHON in .venv/bin/python python3 python; do
    "$PYTHON" -c "$new; $all" 2> /dev/null && return
  done
  for PYTHON in python3 python3.14 python3.13 python3.12 python3.11 none; do
    "$PYTHON" -c "$new" 2> /dev/null && break
  done
  [ $PYTHON != none ] || fail "there is no Python 3.11 or newer here; install one"
  echo "run_all.sh: making .venv from requirements.txt (a few minutes, about 6 GB)"
  "$PYTHON" -m venv .venv || fail "python -m venv failed; install the venv module (Debian: apt install python3-venv)"
  PYTHON=.venv/bin/python
  "$PYTHON" -m pip install -q -r requirements.txt || fail "pip could not install requirements.txt; its message is above"
}

# ---- one at a time: descriptor 9 holds the lock, and so do the steps that a killed run leaves behind
alone() {
  [ -z "${LOCKED:-}" ] || return 0
  mkdir -p "$DIR"
  exec 9>> "$DIR/.run_all.lock"
  "$PYTHON" -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)' 2> /dev/null ||
    fail "another run_all.sh (process $(cat "$DIR/.run_all.lock")) or a step that it left behind is at work in $DIR; wait for it"
  LOCKED=$$
  echo $$ > "$DIR/.run_all.lock"
  [ "${FRESH:-0}" != 1 ] || rm -rf "$DONE"
  mkdir -p "$DONE"
}

# ---- steps: queue them with `step`, run the queue side by side with `go`
QUEUE=()
step() { set -- $*; QUEUE+=("$*"); }  # one blank between words, as --step will see them
in_world() { local dir=$DIR/$1; echo "--dir ${dir%/.} ${*:2}"; }  # WORLD FLAGS
paint() { step "make_data.py $(in_world "$1" $DATA ${*:2})"; }  # WORLD FLAGS
attack() { step "attack.py $(in_world "$@")"; }  # WORLD FLAGS
train() {  # WORLD ROW "SEED..." FLAGS: a run for each seed, saved as ROW_sSEED
  local s
  for s in $3; do step "train.py $(in_world $1 --name ${2}_s$s --seed $s ${*:4})"; done
}
fit() { train . "$@" $BUDGET; }  # ROW "SEED..." FLAGS, in the main world

mark() {  # the file that says this command was run by this code: every script upstream of it counts
  local code=make_data.py
  case $1 in make_data.py*) ;; *) code="make_data.py train.py ${1%% *}" ;; esac
  echo "$DONE/$( { echo "$1"; cat common.py $code; } | cksum | tr ' ' -)"
}

one() {  # one step; what it printed is shown if it fails
  local began=$SECONDS again= log=$DONE/log.${HOSTNAME:-here}.$$.$K mark child=
  trap 'kill $child 2> /dev/null || :; rm -f "$log"; exit 143' TERM
  mark=$(mark "$1") || return 1
  [ "${FRESH:-0}" != 1 ] || again=--overwrite
  "$PYTHON" $1 $again > "$log" 2>&1 &
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

minutes() {  # what a stage took on two cores of a recent server; for the time left
  case $1 in
    lazy) echo 9 ;; evidence) echo 5 ;; cures) echo 5 ;; groups) echo 24 ;; ablations) echo 25 ;;
    biased) echo 9 ;; lntl) echo 12 ;; robust) echo 60 ;; robgan) echo 29 ;;
  esac
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
    LEVEL=$((LEVEL + 1))  # also where nothing is left: a level keeps its number while others finish
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
  [ ! -e "$DONE/failed" ] || { echo "run_all.sh: stopped at the failed step above; run the same command again to continue" >&2; exit 1; }
}

# ---- stages: a line a row, behind it what it feeds; --list prints the commands one by one
lazy() {
  local method BUDGET=$LONG
  paint .  # samples.png
  paint unbiased --corr 0.1  # the oracle's world
  go "paint the worlds"
  for method in combined jitter grl baseline; do fit $method "$SEEDS" --method $method; done  # headline table
  train unbiased oracle "$SEEDS" $BUDGET  # the ceiling at the same budget
  go "train"
  attack . --src 7 --tgt 3 --eps 0.05  # a first look at seed 42
  step "gradcam.py --dir $DIR"
  step "gradcam.py --dir $DIR --cam hirescam"
  go "look and attack"
}

cures() {  # the other rows of the headline table
  local method
  fit lntl 42 --method lntl  # slow: its heads look at every pixel
  for method in lff groupdro jtt biasbal; do fit $method "$FEW" --method $method; done
  go "train"
}

evidence() {  # what a sceptic asks for: nulls, ceilings, all seeds, other attacks, other weights
  local few="$(over_seeds "$FEW" baseline jitter)" others="grl_s42 combined_s42 unbiased/oracle_s42"
  local all="$(over_seeds "$SEEDS" baseline jitter grl combined unbiased/oracle) baseline_shufflelabels_s42"
  attack . --n $((N / 2)) --models $few $others  # min-eps, paired
  fit baseline_shufflelabels 42 --shuffle-labels  # a null model for the heat maps
  fit grl_gamma1 42 --method grl --gamma 1
  attack . --untargeted --n $((2 * N)) --queries $QUERIES --models $few $others
  attack . --pairs --n $((N / 20))
  go "train the null row and another weight, attack"
  step "gradcam.py --dir $DIR --name all --models $all"  # lift and flips, null rows
  step "gradcam.py --dir $DIR --name all --cam hirescam --models $few"
  attack . --check --n $((N / 5))  # fails if an attack cannot be trusted
  go "look, and check the attacks"
}

groups() {  # told nothing: a first net's answers stand for colours
  local c of infer="--method balance --infer-groups" both="--method jitter --balance --infer-groups"
  local net="--model mlp --batch 256 --schedule onecycle ${SHORT:---epochs 20}"
  for c in $CMNIST; do paint cmnist_$c --recipe cmnist --corr 0.$c; done
  for c in $WEAK; do paint corr_$c --corr 0.$c; done  # where the shortcut is weaker
  go "paint the worlds"
  fit balance_infergroups "$SEEDS" $infer
  fit balance_infergroups_crop1 "$SEEDS" $infer --crop 1
  fit balance_infergroups_ce "$FEW" $infer --first-loss ce
  fit jitter_balance_infergroups "$SEEDS" $both
  fit jitter_balance_infergroups_lr0.01_onecycle 42 $both --lr 0.01 --schedule onecycle
  fit balance "$FEW" --method balance  # told the colours
  fit baseline_crop1 "$FEW" --crop 1  # what shifts alone do
  train unbiased oracle_crop1 "$FEW" --crop 1 $BUDGET
  for of in biasbal groupdro; do fit ${of}_infergroups "$FEW" --method $of --infer-groups; done
  for c in $CMNIST; do  # Coloured MNIST, beside its published table
    train cmnist_$c baseline "$FEW" $net
    train cmnist_$c biasbal_infergroups "$FEW" --method biasbal --infer-groups $net
    train cmnist_$c balance_infergroups "$FEW" $infer $net
    train cmnist_$c balance 42 --method balance $net  # told more
    train cmnist_$c jitter 42 --method jitter --alpha 1 --grain 0 $net
  done
  for c in $WEAK; do
    train corr_$c baseline 42 $BUDGET
    train corr_$c balance_infergroups 42 $infer $BUDGET
  done
  go "train"
}

ablations() {  # which part of the cure does the work, and how much is budget or size
  local m v cycle="--lr 0.01 --schedule onecycle"
  for m in jitter baseline; do fit ${m}_width16 "$FEW" --method $m --width 16; done
  train unbiased oracle_width16 "$FEW" --width 16 $BUDGET
  fit baseline_epochs30 "$FEW" --epochs 30
  for v in "alpha 0" "alpha 1" "grain 0"; do fit jitter_${v/ /} "$FEW" --method jitter --$v; done  # alpha 0: plain augmentation
  fit jitter_nofade "$FEW" --method jitter --no-fade
  fit jitter_image "$FEW" --method jitter --classify image
  fit jitter_hsv "$FEW" --method jitter --jitter hsv
  fit combined_gamma0 "$FEW" --method combined --gamma 0  # jitter with colour labels, nothing reversed
  fit jitter_hsv_image_nofade "$FEW" --method jitter --jitter hsv --classify image --no-fade  # as published
  fit grl_noconditional "$FEW" --method grl --no-conditional
  if [ -z "$BUDGET" ]; then  # QUICK's is this one already
    for m in combined jitter biasbal baseline; do fit ${m}_lr0.01_onecycle "$FEW" --method $m $cycle; done
    train unbiased oracle_lr0.01_onecycle "$FEW" $cycle
  fi
  go "train"
}

biased() {  # Biased-MNIST, beside its published table; every method at the learning rate that val prefers
  local c seeds net="--width 16 --schedule onecycle --epochs"
  for c in $BIASED; do paint flat_$c --recipe flat --corr 0.$c; done
  go "paint the worlds"
  train flat_99 biasbal_long 42 --method biasbal --lr 0.003 $net 10
  for c in $BIASED; do
    case $c in ${BIASED%% *} | ${BIASED##* }) seeds=$FEW ;; *) seeds=42 ;; esac  # more seeds at both ends only
    train flat_$c jitter "$seeds" --method jitter --alpha 1 --grain 0 --lr 0.01 $net 4
    train flat_$c baseline "$seeds" --lr 0.01 $net 4
    train flat_$c biasbal 42 --method biasbal --lr 0.003 $net 4
    train flat_$c balance_infergroups 42 --method balance --infer-groups --first-loss ce --lr 0.01 $net 4  # gce learns nothing at this rate
    train flat_$c lff 42 --method lff --width 16 --epochs 4
  done
  go "train"
}

lntl() {  # Learning Not to Learn, beside its published table
  local v seeds net="--width 16 --lr 0.01 --schedule onecycle --epochs 5" hiding="--method lntl --entropy 20 --model saturatedcnn"
  for v in $VARIANCES; do paint lntl_$v --recipe digit --sigma2 0.$v; done
  go "paint the worlds"
  for v in $VARIANCES; do
    seeds=42
    [ $v != 020 ] || seeds=$FEW  # how much a seed matters
    train lntl_$v lntl "$seeds" $hiding $net
    train lntl_$v baseline "$seeds" $net
    train lntl_$v jitter 42 --method jitter --alpha 1 --grain 0 $net
    case $v in 020 | 050) train lntl_$v grayscale 42 --grayscale $net ;; esac
  done
  train lntl_020 lntl_paper 42 $hiding --entropy 0.01 $net  # the paper's weight
  train lntl_020 lntl_simplecnn 42 $hiding --model simplecnn $net  # what the net is worth
  train lntl_020 baseline_saturatedcnn 42 --model saturatedcnn $net
  go "train"
}

robust() {  # adversarial training: the published problem, a ResNet from end to end, and what it does to a shortcut
  local at="--method at --clean-epochs 1 --schedule onecycle" net="--eps-ramp 0.3 --width 24 --eps 0.3 --lr 0.005"
  local student="--crop 2 --flip --rotation 10 --recolour hsv --cutout 8 --mixup 0.2 --label-smoothing 0.1 --clip-grad 1"
  local resnet="--model $RESNET --steps 2 --step-size 0.06 --eps 0.1 --lr 0.0015 --batch 64 ${SHORT:---epochs 4}"
  local wide="--width 16 --lr 0.01 --schedule onecycle ${SHORT:---epochs 5}" at_wide="--method at --steps 3 --eps-ramp 0.5"
  paint mnist --recipe gray
  paint mnist_27000 --recipe gray --limit $SOME  # 27,000 to train on, for a ResNet-50 takes its time
  go "paint the worlds"
  train mnist_27000 $RESNET 42 $at --eps-ramp 0.3 $resnet
  train mnist_27000 ${RESNET}_student 42 --method at --clean-epochs 1 --schedule cosine $resnet $student
  train mnist at 42 $at $net ${SHORT:---epochs 8}
  train mnist trades 42 $at $net --beta 6 ${SHORT:---epochs 6}
  train mnist fgsm 42 $at $net --attack fgsm ${SHORT:---epochs 4}
  train . at_balanced 42 $at --eps-ramp 0.5 --width 16 --steps 3 --lr 0.01 --balance --crop 2 $SHORT  # unbiased and robust
  train unbiased oracle_at 42 --method at $BUDGET  # where there is no shortcut
  # does adversarial training deepen the shortcut? {plain, adversarial} x {biased, unbiased}
  train . baseline_wide "$FEW" $wide
  train . at_wide "$FEW" $at_wide $wide
  train unbiased oracle_wide "$FEW" $wide
  train unbiased oracle_at_wide "$FEW" $at_wide $wide
  fit at 42 --method at  # in the headline table
  go "train"
  attack mnist --untargeted --name at --eps 0.3 --n $N --queries $QUERIES --sweep 0.3 --models at_s42 at_clean_s42 trades_s42 fgsm_s42
  attack mnist --untargeted --name resnet --eps 0.1 --n $((N / 5)) --steps 20 --queries $((QUERIES / 25)) --sweep 0.1 --models ../mnist_27000/{${RESNET},${RESNET}_clean,${RESNET}_student}_s42
  local how="--untargeted --eps 0.05 --restarts 2 --n $((N / 2)) --queries $QUERIES --sweep 0.05"
  attack . $how --name wide --models $(over_seeds "$FEW" baseline_wide at_wide unbiased/oracle_wide unbiased/oracle_at_wide)
  attack . $how --name at --models baseline_s42 jitter_s42 balance_s42 at_balanced_s42 unbiased/oracle_s42
  step "gradcam.py --dir $DIR --maximise --name all --models $(over_seeds "$FEW" baseline balance_infergroups jitter combined unbiased/oracle) at_balanced_s42 baseline_shufflelabels_s42"  # what each answer wants to see
  if [ -z "$SHORT" ]; then  # two epochs say nothing about the attacks
    attack mnist --check --eps 0.3 --n $((N / 10)) --models at_s42
    attack . --check --name at_check --n $((N / 10)) --models at_balanced_s42
  fi
  go "attack"
}

robgan() {  # a generator beside adversarial training: the same net and number of steps in all rows of a world
  local row seeds mix rows=../mnist_2000/robgan_without net="--width 16 --eps 0.3 --eps-ramp 0.3 --batch 64 --schedule cosine --lr 0.002"
  local small="$net ${SHORT:---epochs 40}" judge="--width 16 --lr 0.01 --schedule onecycle"
  net="$net ${SHORT:---epochs 3}"
  paint mnist --recipe gray
  paint mnist_2000 --recipe gray --limit 2222  # 2,000 to train on: here additional data should matter most
  go "paint the worlds"
  train mnist judge 42 $judge ${SHORT:---epochs 5}  # sees no generated image
  train mnist_2000 judge 42 $judge ${SHORT:---epochs 40}
  go "train the judges"
  train mnist robgan "$FEW" --method robgan --judge judge_s42 $net
  train mnist_2000 robgan 42 --method robgan --judge judge_s42 $small
  train mnist robgan_without "$FEW" --method at $net
  train mnist_2000 robgan_without "$FEW" --method at $small
  go "train the generators"
  for row in generated_0.5 $SHARES; do  # the generated pictures as additional data, the same number of updates
    mix="--method at --generator robgan_s42 --generated ${row#*_}" seeds=42
    [ $row != generated_0.5 ] || seeds=$FEW
    train mnist $row "$seeds" $mix $net
    train mnist_2000 $row "$FEW" $mix $small
    rows="$rows ../mnist_2000/$row"
  done
  go "train"
  local how="--untargeted --eps 0.3 --n $((N / 2)) --steps 50 --queries $((QUERIES / 5)) --sweep 0.3"
  attack mnist $how --name robgan --models $(over_seeds "$FEW" robgan robgan_without generated_0.5) $(over_seeds 42 $SHARES)
  attack mnist $how --name robgan_2000 --models $(over_seeds "$FEW" $rows)
  go "attack"
}

over_seeds() {  # "SEED..." NAME... to NAME_sSEED...
  local name s
  for name in "${@:2}"; do for s in $1; do printf '%s_s%s ' $name $s; done; done
}

report() {  # tables and figures from the results that are there; one script at a time, for they fill the same files
  local script
  for script in make_data.py train.py gradcam.py attack.py; do
    "$PYTHON" $script --dir "$DIR" --report > /dev/null || fail "$script --report failed; the reason is above"
  done
  echo "tables and figures of $DIR are up to date, $((SECONDS / 60)) min $((SECONDS % 60)) s in all"
}

tests() {  # format and lint, then the fast tests, one process a file, JOBS side by side
  "$PYTHON" -m ruff format --check . || fail "some files are not formatted; run: $PYTHON -m ruff format ."
  "$PYTHON" -m ruff check . || fail "ruff has found what is above"
  printf '%s\n' tests/test_*.py | xargs -P "$JOBS" -n 1 bash -c 'said=$("$0" -m pytest -q -m "not slow" "$1" 2>&1); code=$?; printf "%s: %s\n" "$1" "$said"; exit $code' "$PYTHON"
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
  [ "$STAGE" = test ] || alone
  case $STAGE in test | report) TODO+=(0) ;; *) TODO+=($(LIST=1 && "$STAGE" | wc -l)) ;; esac
  [ "${TODO[${#TODO[@]} - 1]}" = 0 ] || TOTAL=$((TOTAL + $(minutes "$STAGE")))
done
BEGAN=$SECONDS NEW=0
for STAGE in "$@"; do
  STEPS=${TODO[0]} K=0
  TODO=("${TODO[@]:1}")
  case $STAGE in test) tests ;; report) NEW=1 ;; *) NEW=1; "$STAGE" ;; esac
  [ "$STEPS" = 0 ] || PAST=$((PAST + $(minutes "$STAGE")))
done
[ $NEW = 0 ] || report
