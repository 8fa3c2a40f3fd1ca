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
DATA= BUDGET= LONG= SHORT= RESNET=resnet50 SOME=30000 N=1000 QUERIES=5000
if [ "${QUICK:-0}" = 1 ]; then
  DIR=results/quick SEEDS="42 43" FEW=42 VARIANCES=020 BIASED=99 CMNIST=95 WEAK=6
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
at() { local dir=$DIR/$1; echo "--dir ${dir%/.} ${*:2}"; }  # WORLD FLAGS
paint() { step "make_data.py $(at "$@") $DATA"; }  # WORLD FLAGS
attack() { step "attack.py $(at "$@")"; }  # WORLD FLAGS
short() { step "train.py $(at ${1%/*} --name ${1#*/} ${*:2})"; }  # WORLD/NAME FLAGS: not the name train.py would give
fit() { step "train.py --dir $DIR ${*:2} ${BUDGET:+$BUDGET --name $1}"; }  # NAME FLAGS: the name it gives, but for BUDGET

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

minutes() {  # what a stage takes on two cores; the time left follows from these and the pace so far
  case $1 in lazy) echo 12 ;; evidence) echo 6 ;; cures) echo 5 ;; groups | ablations) echo 30 ;; robust) echo 70 ;; robgan) echo 40 ;; *) echo 14 ;; esac
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

# ---- stages: one line a step, fit to paste behind `python`; behind it what it feeds
lazy() {
  local s method BUDGET=$LONG
  paint .  # samples.png
  paint unbiased --corr 0.1  # the oracle's world
  go "paint the worlds"
  for s in $SEEDS; do
    for method in combined jitter grl baseline; do fit ${method}_s$s --method $method --seed $s; done  # headline table
    short unbiased/oracle_s$s --seed $s $BUDGET  # the ceiling at the same budget
  done
  go "train"
  attack . --src 7 --tgt 3 --eps 0.05  # a first look at seed 42
  step "gradcam.py --dir $DIR"
  step "gradcam.py --dir $DIR --cam hirescam"
  go "look and attack"
  report
}

cures() {  # the other rows of the headline table
  local s method
  fit lntl_s42 --method lntl  # slow: its heads look at every pixel
  for s in $FEW; do
    for method in lff groupdro jtt biasbal; do fit ${method}_s$s --method $method --seed $s; done
  done
  go "train"
  report
}

evidence() {  # what a sceptic asks for: nulls, ceilings, all seeds, other attacks, other weights
  local few="$(over_seeds "$FEW" baseline jitter)" others="grl_s42 combined_s42 unbiased/oracle_s42"
  local all="$(over_seeds "$SEEDS" baseline jitter grl combined unbiased/oracle) baseline_shufflelabels_s42"
  attack . --n $((N / 2)) --models $few $others  # min-eps, paired
  fit baseline_shufflelabels_s42 --shuffle-labels  # a null model for the heat maps
  fit grl_gamma1_s42 --method grl --gamma 1
  attack . --untargeted --n $((2 * N)) --models $few $others
  attack . --pairs --n $((N / 20))
  go "train the null row and another weight, attack"
  step "gradcam.py --dir $DIR --name all --models $all"  # lift and flips, null rows
  step "gradcam.py --dir $DIR --name all --cam hirescam --models $few"
  attack . --check --n $((N / 5))  # fails if an attack cannot be trusted
  go "look, and check the attacks"
  report
}

groups() {  # told nothing: a first net's answers stand for colours
  local c s of net="--model mlp --batch 256 --schedule onecycle ${SHORT:---epochs 20}"
  for c in $CMNIST; do paint cmnist_$c --recipe cmnist --corr 0.$c; done
  for c in $WEAK; do paint corr_$c --corr 0.$c; done  # where the shortcut is weaker
  go "paint the worlds"
  for s in $SEEDS; do
    fit balance_infergroups_s$s --method balance --infer-groups --seed $s
    fit balance_infergroups_crop1_s$s --method balance --infer-groups --crop 1 --seed $s
    fit jitter_balance_infergroups_s$s --method jitter --balance --infer-groups --seed $s
  done
  for s in $FEW; do
    fit balance_s$s --method balance --seed $s  # told the colours
    fit baseline_crop1_s$s --crop 1 --seed $s  # what shifts alone do
    short unbiased/oracle_crop1_s$s --crop 1 --seed $s $BUDGET
    for of in biasbal groupdro; do fit ${of}_infergroups_s$s --method $of --infer-groups --seed $s; done
    for c in $CMNIST; do  # Coloured MNIST, beside its published table
      short cmnist_$c/baseline_s$s --seed $s $net
      short cmnist_$c/biasbal_infergroups_s$s --method biasbal --infer-groups --seed $s $net
      short cmnist_$c/balance_infergroups_s$s --method balance --infer-groups --seed $s $net
    done
  done
  for c in $CMNIST; do  # told more
    short cmnist_$c/balance_s42 --method balance $net
    short cmnist_$c/jitter_s42 --method jitter --alpha 1 --grain 0 $net
  done
  for c in $WEAK; do
    short corr_$c/baseline_s42 $BUDGET
    short corr_$c/balance_infergroups_s42 --method balance --infer-groups $BUDGET
  done
  for s in $FEW; do fit balance_infergroups_ce_s$s --method balance --infer-groups --first-loss ce --seed $s; done
  fit jitter_balance_infergroups_lr0.01_onecycle_s42 --method jitter --balance --infer-groups --lr 0.01 --schedule onecycle
  go "train"
  report
}

ablations() {  # which part of the cure does the work, and how much is budget or size
  local m s v cycle="--lr 0.01 --schedule onecycle"
  for s in $FEW; do
    for m in jitter baseline; do fit ${m}_width16_s$s --method $m --width 16 --seed $s; done
    for m in combined jitter biasbal baseline; do fit ${m}_lr0.01_onecycle_s$s --method $m $cycle --seed $s; done
    short unbiased/oracle_width16_s$s --width 16 --seed $s $BUDGET
    short unbiased/oracle_lr0.01_onecycle_s$s $cycle --seed $s
    fit baseline_epochs30_s$s --epochs 30 --seed $s
    for v in "alpha 0" "alpha 1" "grain 0"; do fit jitter_${v/ /}_s$s --method jitter --$v --seed $s; done  # alpha 0: plain augmentation
    fit jitter_nofade_s$s --method jitter --no-fade --seed $s
    fit jitter_image_s$s --method jitter --classify image --seed $s
    fit jitter_hsv_s$s --method jitter --jitter hsv --seed $s
    fit combined_gamma0_s$s --method combined --gamma 0 --seed $s  # jitter with colour labels, nothing reversed
    fit jitter_hsv_image_nofade_s$s --method jitter --jitter hsv --classify image --no-fade --seed $s  # as published
    fit grl_noconditional_s$s --method grl --no-conditional --seed $s
  done
  go "train"
  report
}

biased() {  # Biased-MNIST, beside its published table; every method at the learning rate that val prefers
  local c s net="--width 16 --schedule onecycle --epochs"
  for c in $BIASED; do paint flat_$c --recipe flat --corr 0.$c; done
  go "paint the worlds"
  short flat_99/biasbal_long_s42 --method biasbal --lr 0.003 $net 10
  for c in $BIASED; do
    for s in $FEW; do
      case $s$c in 42* | *${BIASED%% *} | *${BIASED##* }) ;; *) continue ;; esac  # more seeds at both ends only
      short flat_$c/jitter_s$s --method jitter --alpha 1 --grain 0 --lr 0.01 --seed $s $net 4
      short flat_$c/baseline_s$s --lr 0.01 --seed $s $net 4
    done
    short flat_$c/biasbal_s42 --method biasbal --lr 0.003 $net 4
    short flat_$c/balance_infergroups_s42 --method balance --infer-groups --first-loss ce --lr 0.01 $net 4  # gce learns nothing at this rate
    short flat_$c/lff_s42 --method lff --width 16 --epochs 4
  done
  go "train"
  report
}

lntl() {  # Learning Not to Learn, beside its published table
  local v s net="--width 16 --lr 0.01 --schedule onecycle --epochs 5" hiding="--method lntl --entropy 20 --model saturatedcnn"
  for v in $VARIANCES; do paint lntl_$v --recipe digit --sigma2 0.$v; done
  go "paint the worlds"
  for v in $VARIANCES; do
    short lntl_$v/lntl_s42 $hiding $net
    short lntl_$v/baseline_s42 $net
    short lntl_$v/jitter_s42 --method jitter --alpha 1 --grain 0 $net
    case $v in 020 | 050) short lntl_$v/grayscale_s42 --grayscale $net ;; esac
  done
  for s in ${FEW#42}; do  # how much a seed matters
    short lntl_020/lntl_s$s $hiding --seed $s $net
    short lntl_020/baseline_s$s --seed $s $net
  done
  short lntl_020/lntl_paper_s42 $hiding --entropy 0.01 $net  # the paper's weight
  short lntl_020/lntl_simplecnn_s42 $hiding --model simplecnn $net  # what the net is worth
  short lntl_020/baseline_saturatedcnn_s42 --model saturatedcnn $net
  go "train"
  report
}

robust() {  # adversarial training: the published problem, a ResNet from end to end, and what it does to a shortcut
  local at="--method at --clean-epochs 1 --schedule onecycle" net="--eps-ramp 0.3 --width 24 --eps 0.3 --lr 0.005" s
  local student="--crop 2 --flip --rotation 10 --recolour hsv --cutout 8 --mixup 0.2 --label-smoothing 0.1 --clip-grad 1"
  local resnet="--model $RESNET --steps 2 --step-size 0.06 --eps 0.1 --lr 0.002 ${SHORT:---epochs 4}"
  local wide="--width 16 --lr 0.01 --schedule onecycle ${SHORT:---epochs 5}"
  paint mnist --recipe gray
  step "make_data.py $(at mnist_27000 --recipe gray) --limit $SOME"  # 27,000 to train on: 53 minutes of a slow core for a ResNet-50
  go "paint the worlds"
  short mnist_27000/${RESNET}_s42 $at --eps-ramp 0.3 $resnet
  short mnist_27000/${RESNET}_student_s42 --method at --clean-epochs 1 --schedule cosine $resnet $student
  short mnist/at_s42 $at $net ${SHORT:---epochs 8}
  short mnist/trades_s42 $at $net --beta 6 ${SHORT:---epochs 6}
  short mnist/fgsm_s42 $at $net --attack fgsm ${SHORT:---epochs 4}
  short ./at_balanced_s42 $at --eps-ramp 0.5 --width 16 --steps 3 --lr 0.01 --balance --crop 2 $SHORT  # unbiased and robust
  short unbiased/oracle_at_s42 --method at $BUDGET  # where there is no shortcut
  for s in $FEW; do  # does adversarial training deepen the shortcut? {plain, adversarial} x {biased, unbiased}
    short ./baseline_wide_s$s --seed $s $wide
    short ./at_wide_s$s --method at --steps 3 --eps-ramp 0.5 --seed $s $wide
    short unbiased/oracle_wide_s$s --seed $s $wide
    short unbiased/oracle_at_wide_s$s --method at --steps 3 --eps-ramp 0.5 --seed $s $wide
  done
  fit at_s42 --method at  # in the headline table
  go "train"
  attack mnist --untargeted --name at --eps 0.3 --n $N --queries $QUERIES --sweep 0.1 0.2 0.3 --models at_s42 at_clean_s42 trades_s42 fgsm_s42
  attack mnist --untargeted --name resnet --eps 0.1 --n $((N / 5)) --steps 20 --queries $((QUERIES / 25)) --sweep 0.1 --models ../mnist_27000/{${RESNET},${RESNET}_clean,${RESNET}_student}_s42
  attack . --untargeted --name wide --eps 0.05 --restarts 2 --n $((N / 2)) --queries $QUERIES --sweep 0.02 0.05 --models $(over_seeds "$FEW" baseline_wide at_wide unbiased/oracle_wide unbiased/oracle_at_wide)
  attack . --untargeted --name at --eps 0.05 --restarts 2 --n $((N / 2)) --queries $QUERIES --sweep 0.02 0.05 --models baseline_s42 jitter_s42 balance_s42 at_balanced_s42 unbiased/oracle_s42
  step "gradcam.py --dir $DIR --maximise --name all --models $(over_seeds "$FEW" baseline balance_infergroups jitter combined unbiased/oracle) at_balanced_s42 baseline_shufflelabels_s42"  # what each answer wants to see
  if [ -z "$SHORT" ]; then  # two epochs say nothing about the attacks
    attack mnist --check --eps 0.3 --n $((N / 10)) --models at_s42
    attack . --check --name at_check --n $((N / 10)) --models at_balanced_s42
  fi
  go "attack"
  report
}

robgan() {  # a generator beside adversarial training: the same net and number of steps in all rows of a world
  local s share net="--width 16 --eps 0.3 --eps-ramp 0.3 --batch 64 --schedule cosine --lr 0.002"
  local small="$net ${SHORT:---epochs 40}" robgan="$(over_seeds "$FEW" robgan)"
  net="$net ${SHORT:---epochs 3}"
  paint mnist --recipe gray
  paint mnist_2000 --recipe gray --limit 2222  # 2,000 to train on: here additional data should matter most
  go "paint the worlds"
  short mnist/judge_s42 --width 16 --lr 0.01 --schedule onecycle ${SHORT:---epochs 5}  # sees no generated image
  short mnist_2000/judge_s42 --width 16 --lr 0.01 --schedule onecycle ${SHORT:---epochs 40}
  go "train the judges"
  for s in $FEW; do short mnist/robgan_s$s --method robgan --judge judge_s42 --seed $s $net; done
  short mnist_2000/robgan_s42 --method robgan --judge judge_s42 $small
  for s in $FEW; do
    short mnist/robgan_without_s$s --method at --seed $s $net
    short mnist_2000/robgan_without_s$s --method at --seed $s $small
  done
  go "train the generators"
  for s in $FEW; do  # the generated pictures as additional data, the same number of updates
    for share in 0.3 0.5 0.7; do
      short mnist/generated_${share}_s$s --method at --generator robgan_s42 --generated $share --seed $s $net
      short mnist_2000/generated_${share}_s$s --method at --generator robgan_s42 --generated $share --seed $s $small
    done
  done
  go "train"
  local rows="$(over_seeds "$FEW" robgan_without generated_0.3 generated_0.5 generated_0.7)"
  attack mnist --untargeted --name robgan --eps 0.3 --n $((N / 5)) --steps 50 --queries $((QUERIES / 5)) --sweep 0.3 --models $robgan $rows
  rows="$(over_seeds "$FEW" ../mnist_2000/{robgan_without,generated_0.3,generated_0.5,generated_0.7})"
  attack mnist --untargeted --name robgan_2000 --eps 0.3 --n $((N / 5)) --steps 50 --queries $((QUERIES / 5)) --sweep 0.3 --models $rows
  go "attack"
  report
}

over_seeds() {  # "SEED..." NAME... to NAME_sSEED...
  local name s
  for name in "${@:2}"; do for s in $1; do printf '%s_s%s ' $name $s; done; done
}

report() {  # tables and figures from the results that are there; one script at a time, for they fill the same files
  [ $LIST = 0 ] || return 0
  local script
  for script in make_data.py train.py gradcam.py attack.py; do
    "$PYTHON" $script --dir "$DIR" --report > /dev/null || fail "$script --report failed; the reason is above"
  done
  echo "$STAGE: tables and figures of $DIR are up to date, $((SECONDS / 60)) min $((SECONDS % 60)) s so far"
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
  case $STAGE in test | report) TODO+=(0) ;; *) TODO+=($(LIST=1 && "$STAGE" | wc -l)) ;; esac
  [ "${TODO[${#TODO[@]} - 1]}" = 0 ] || TOTAL=$((TOTAL + $(minutes "$STAGE")))
done
BEGAN=$SECONDS
for STAGE in "$@"; do
  STEPS=${TODO[0]} K=0
  TODO=("${TODO[@]:1}")
  case $STAGE in test) tests ;; report) alone; report ;; *) alone; "$STAGE" ;; esac
  [ "$STEPS" = 0 ] || PAST=$((PAST + $(minutes "$STAGE")))
done
