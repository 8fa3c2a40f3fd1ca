#!/usr/bin/env bash
# Regenerates every table and figure on real MNIST: a runner, and below it the commands, stage by stage.
#
#   bash run_all.sh                every stage; a second call continues where the first one stopped
#   bash run_all.sh STAGE...       only these: lazy evidence cures groups biased coloured shortcuts
#                                  environments ablations lntl robust robgan page
#   bash run_all.sh compare NAME   a --method of yours (its name, FILE.py, or flags in quotes) beside three of ours
#   bash run_all.sh report         refill tables and redraw figures from the results that are there
#   bash run_all.sh test           format, lint and the fast tests
#   bash run_all.sh --list STAGE   print the commands; those below a line of dashes need those above it
#   QUICK=1 bash run_all.sh        all of it in small: 6,000 images and one seed, into results/quick
#   FRESH=1 bash run_all.sh        start over, and replace results of other settings
#   JOBS=4 bash run_all.sh         steps side by side (default: one per core), one thread each
#   PYTHON=... bash run_all.sh     this python (default: one that has torch, else a new .venv)
#
# A finished step runs again once its command, its script, train.py, make_data.py or common.py has changed; a comment
# is no change, and a method in a file of your own is none either.
set -euo pipefail
cd "$(dirname "$0")"
export OMP_NUM_THREADS=1 MKL_NUM_THREADS=1  # threads of processes side by side on few cores stall each other
STAGES="lazy evidence cures groups biased coloured shortcuts environments ablations lntl robust robgan page"
QUICK=${QUICK:-0} FRESH=${FRESH:-0} JOBS=${JOBS:-$(getconf _NPROCESSORS_ONLN)} R=results AGAIN=
[ "$QUICK" = 0 ] || R=results/quick
[ "$FRESH" = 0 ] || AGAIN=--overwrite

fail() { echo "run_all.sh: $*" >&2; exit 2; }

setup() {  # $PYTHON if you name one, else the first python with all we need, else a new .venv
  local new="import sys; assert sys.version_info >= (3, 11)" all="import torch, torchvision, matplotlib, pytest, ruff"
  if [ -n "${PYTHON:-}" ]; then
    "$PYTHON" -c "$new" 2> /dev/null || fail "PYTHON is '$PYTHON', which is no Python 3.11 or newer; leave it out to find one"
    return
  fi
  for PYTHON in .venv/bin/python python3 python; do "$PYTHON" -c "$new; $all" 2> /dev/null && return; done
  for PYTHON in python3 python3.1{4,3,2,1} none; do "$PYTHON" -c "$new" 2> /dev/null && break; done
  [ $PYTHON != none ] || fail "there is no Python 3.11 or newer here; install one"
  echo "run_all.sh: making .venv from requirements.txt (a few minutes, about 6 GB)"
  "$PYTHON" -m venv .venv || fail "python -m venv failed; install the venv module (Debian: apt install python3-venv)"
  PYTHON=.venv/bin/python
  "$PYTHON" -m pip install -q -r requirements.txt || fail "pip could not install requirements.txt; its message is above"
}

alone() {  # descriptor 9 holds the lock, and so do the steps that a killed run leaves behind
  mkdir -p $R/.done
  exec 9>> $R/.run_all.lock
  "$PYTHON" -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)' 2> /dev/null ||
    fail "another run_all.sh (process $(cat $R/.run_all.lock)) or a step that it left behind is at work in $R; wait for it"
  echo $$ > $R/.run_all.lock
  rm -f $R/.done/failed
  [ "$FRESH" = 0 ] || rm -f $R/.done/*
}

hash_code() {  # SCRIPT...: of what Python sees of them, so a comment does not count
  "$PYTHON" -c 'import ast, sys; [print(ast.dump(ast.parse(open(f, "rb").read()))) for f in sys.argv[1:]]' "$@" | cksum | cut -d' ' -f1
}

one() {  # MARK LABEL COMMAND: a step; what it printed is shown if it fails
  local mark=$1 log=$R/.done/log.${1##*/} began=$SECONDS child=
  trap '' INT  # Ctrl-C reaches every process at once; the run passes it on as TERM
  trap 'kill $child 2> /dev/null || :; rm -f $log; exit 143' TERM
  "$PYTHON" ${3#python } $AGAIN > $log 2>&1 &
  child=$!
  if wait $child; then
    mv $log $mark
    echo "  $2$(printf '%5ds' $((SECONDS - began)))  $3"
  else
    touch $R/.done/failed
    echo "run_all.sh: FAILED after $((SECONDS - began))s: $3" >&2
    tail -n 20 $log >&2
    rm -f $log
  fi
}

work() {  # STAGE...: what is not done yet, JOBS steps side by side; a line of dashes waits for all before it
  local -A code
  local command script own mark lines=() running k=0 n all left
  for script in make_data train gradcam attack; do
    code[$script.py]=$(hash_code common.py make_data.py $([ $script = make_data ] || echo train.py) $script.py) || fail "$script.py is no Python"
  done
  while read -r command; do
    script=($command)
    own=
    ! [[ $command =~ --method\ ([^ ]+\.py) ]] || own=$(hash_code "${BASH_REMATCH[1]}")
    mark=$R/.done/$(cksum <<< "$command ${code[${script[1]:-train.py}]}$own" | tr ' ' -)
    [ -e $mark ] || lines+=("$mark $command")
  done < <(list "$@")
  n=$(printf '%s\n' "${lines[@]}" | grep -c python || :) all=$(list "$@" | grep -c python)
  echo "$*: $n steps to do, $((all - n)) done before"
  for command in "${lines[@]}"; do
    case $command in *----) wait; continue ;; esac
    while running=($(jobs -rp)) && [ ${#running[@]} -ge $JOBS ]; do sleep 0.2; done
    [ ! -e $R/.done/failed ] || break
    [ ! -e ${command%% *} ] || continue  # two stages may ask for one world
    left=
    [ $((k / JOBS)) -lt 2 ] || left=", $(((n - k) * SECONDS / k / 60 + 1)) min left at this pace"
    k=$((k + 1))
    one ${command%% *} "$k of $n$left" "${command#* }" &
  done
  wait
  [ ! -e $R/.done/failed ] || { echo "run_all.sh: stopped at the failed step above; run the same command again to continue" >&2; exit 1; }
}

report() {  # tables and figures from the results that are there
  local script
  for script in make_data train gradcam attack; do
    "$PYTHON" $script.py --dir $R --report > /dev/null || fail "$script.py --report failed; the reason is above"
  done
  echo "tables and figures are up to date after $((SECONDS / 60)) min; open $R/$([ $QUICK = 1 ] && echo tables.md || echo report.md)"
}

tests() {  # one process a file
  "$PYTHON" -m ruff format --check . || fail "some files are not formatted; run: $PYTHON -m ruff format ."
  "$PYTHON" -m ruff check . || fail "ruff has found what is above"
  printf '%s\n' tests/test_*.py | xargs -P $JOBS -n 1 bash -c 'said=$("$0" -m pytest -q -m "not slow" "$1" 2>&1); code=$?; printf "%s: %s\n" "$1" "$said"; exit $code' "$PYTHON"
}

# ---- what the stages are written in; NAME is what differs from the defaults, so a name is given where a row needs another

run() { if [ $QUICK = 1 ]; then small "$*"; else echo "python $*"; fi; }  # SCRIPT FLAGS...
each() { for s in $(seeds $1); do run "${@:2}" --seed $s; done; }  # N COMMAND: with N seeds
seeds() { seq 42 $((QUICK ? 42 : 41 + $1)); }
models() { for row in "${@:2}"; do seeds $1 | sed "s|^|${row}_s|"; done | paste -sd' '; }  # N ROW...: their names
some() { echo "${@:QUICK ? $# : 1}"; }  # all of these worlds; the last one if QUICK
small() {  # COMMAND for QUICK: fewer images and queries
  case $1 in
    *--limit\ 30000) echo "python $1 --limit 1500" ;;
    make_data*--limit* | gradcam* | *--src*) echo "python $1" ;;
    make_data*stripes* | make_data*both*) echo "python $1 --limit 20000" ;;  # fewer do not teach the shortcut
    make_data*) echo "python $1 --limit 6000" ;;
    train*resnet50*) echo "python $1 --model resnet18 --epochs 2" ;;
    attack*--untargeted*) echo "python $1 --n 20 --queries 50" ;;
    attack*) echo "python $1 --n 5" ;;
    *) echo "python $1" ;;
  esac
}
level() { echo "----"; }  # what follows reads what came before
list() { for stage in "$@"; do ($stage); level; done; }

# ---- the stages; minutes on two slow cores (a recent server needs less than half)

SAME="--width 16 --crop 2 --schedule onecycle --lr 0.005"  # one budget for every world
NOTHING="--method balance --infer-groups --resample 0.2"  # 0.2 was chosen once, on val of worlds painted with another seed

lazy() {  # 25 min
  run make_data.py --dir $R  # samples.png
  run make_data.py --dir $R/unbiased --corr 0.1  # the oracle's world
  level
  for m in combined jitter grl baseline; do each 5 train.py --dir $R --method $m; done  # headline table
  each 5 train.py --dir $R/unbiased --name oracle  # what every row is compared with
  level
  run attack.py --dir $R --name 7to3 --src 7 --tgt 3 --eps 0.05  # a first look at seed 42
  run gradcam.py --dir $R
  run gradcam.py --dir $R --cam hirescam
}

evidence() {  # 30 min: what a sceptic asks for
  local few="$(models 3 baseline jitter) grl_s42 combined_s42 unbiased/oracle_s42"
  each 1 train.py --dir $R --method baseline --shuffle-labels  # a null model for the heat maps
  each 3 train.py --dir $R --name told_nothing_width4 $NOTHING --crop 1
  run attack.py --dir $R --name untargeted_n2000 --untargeted --n 2000 --models $few
  run attack.py --dir $R --name pairs --pairs
  level
  run attack.py --dir $R --name 7to3_n500 --n 500 --models $(models 3 baseline jitter grl combined told_nothing_width4 unbiased/oracle)  # min-eps, paired
  for cam in gradcam hirescam; do  # lift and flips
    run gradcam.py --dir $R --name all --cam $cam --models $(models 5 baseline jitter grl combined unbiased/oracle) baseline_shufflelabels_s42
  done
  run gradcam.py --dir $R --decompose --name all --models $(models 3 baseline) {jitter,unbiased/oracle}_s42  # a minute a model
  run attack.py --dir $R --name check_n200 --check --n 200  # fails if an attack cannot be trusted
}

cures() {  # 20 min: the other rows of the headline table
  each 1 train.py --dir $R --method lntl  # slow: its heads look at every pixel
  for m in lff groupdro jtt biasbal; do each 3 train.py --dir $R --method $m; done
  for told in "" --infer-groups; do each 3 train.py --dir $R --method dfr $told; done  # the last layer anew
}

groups() {  # 75 min: told nothing: a first net names the colours
  for c in $(some 3 6 8); do run make_data.py --dir $R/corr_$c --corr 0.$c; done  # weaker shortcuts
  level
  each 3 train.py --dir $R --method balance  # told the colours
  each 3 train.py --dir $R --method baseline --crop 1  # what shifts alone do
  each 3 train.py --dir $R/unbiased --name oracle_crop1 --crop 1
  each 5 train.py --dir $R --name told_nothing_width4 $NOTHING --crop 1
  each 3 train.py --dir $R --name told_nothing_width4_onecycle $NOTHING --crop 1 --lr 0.01 --schedule onecycle
  alike .
  each 3 train.py --dir $R --name told_nothing_dfr --method dfr --infer-groups $SAME  # only the last layer is told
  each 1 train.py --dir $R --name plain_grayscale --grayscale $SAME
  for c in $(some 3 6 8); do beside 1 1 corr_$c; done
  for m in jtt lff; do each 1 train.py --dir $R --name ${m}_same --method $m $SAME; done
  for lr in 0.0001 0.001 0.01; do  # when does a first net name the colours?
    for m in gce baseline; do each 2 train.py --dir $R --method $m --width 16 --epochs 3 --lr $lr; done
  done
  level
  local same="$(models 3 plain told_nothing told_kind unbiased/oracle_same)"
  run attack.py --dir $R --name 7to3_same --n 250 --models $same
  for c in any flat fine; do  # by what kind of change?
    run attack.py --dir $R --name 7to3_$c --n 50 --change $c --models {plain,told_nothing,baseline,jitter}_s42
  done
  run gradcam.py --dir $R --name same --models $same
  run gradcam.py --dir $R --name same --cam hirescam --models $same
}

beside() {  # N M WORLD: N seeds of told nothing, beside M of our own baseline at the same budget
  each $1 train.py --dir $R/$3 --name told_nothing $NOTHING $SAME
  each $2 train.py --dir $R/$3 --name plain $SAME
}

alike() {  # WORLD: and what knows more
  local unbiased=${1}_unbiased
  [ $1 != . ] || unbiased=unbiased
  beside 3 3 $1
  each 1 train.py --dir $R/$1 --name told_groups --method balance --resample 0.2 $SAME
  each 3 train.py --dir $R/$1 --name told_kind --method jitter ${SAME/--crop 2 /}
  each 3 train.py --dir $R/$unbiased --name oracle_same $SAME
}

biased() {  # 30 min: Biased-MNIST, beside its published table
  for c in $(some 999 997 995 99); do run make_data.py --dir $R/flat_$c --recipe flat --corr 0.$c; done
  level
  for c in $(some 999 997 995 99); do
    beside 3 1 flat_$c
    each 1 train.py --dir $R/flat_$c --name jitter --method jitter --alpha 1 --grain 0 --lr 0.01 --width 16 --schedule onecycle --epochs 4
  done
}

coloured() {  # 55 min: Coloured MNIST, beside its published table
  for c in $(some 995 99 98 95); do run make_data.py --dir $R/cmnist_$c --recipe cmnist --corr 0.$c; done
  level
  for c in $(some 995 99 98 95); do
    beside 3 1 cmnist_$c
    net="--dir $R/cmnist_$c --model mlp --batch 256 --schedule onecycle --epochs 20"
    each 3 train.py $net --name told_nothing_mlp $NOTHING --crop 2
    each 3 train.py $net --name baseline
    each 1 train.py $net --name plain_mlp --crop 2
    each 1 train.py $net --name balance --method balance  # told more
    each 1 train.py $net --name jitter --method jitter --alpha 1 --grain 0
  done
}

shortcuts() {  # 60 min: a shortcut that is not colour, and two at once
  for w in stripes both; do
    run make_data.py --dir $R/$w --recipe $w
    run make_data.py --dir $R/${w}_unbiased --recipe $w --corr 0.1
  done
  run make_data.py --dir $R/stripes_995 --recipe stripes --corr 0.995
  level
  for w in stripes both; do alike $w; done
  each 1 train.py --dir $R/stripes --name told_nothing_dfr --method dfr --infer-groups $SAME
  each 2 train.py --dir $R/both --name told_nothing_twice $NOTHING --rounds 2 $SAME  # the next shortcut; seed 44 fails its check
  each 1 train.py --dir $R --name told_nothing_twice $NOTHING --rounds 2 $SAME  # where there is none
  beside 1 1 stripes_995
}

environments() {  # 20 min: Coloured MNIST of invariant risk minimisation, beside its published table
  run make_data.py --dir $R/irm --recipe irm
  run make_data.py --dir $R/irm_unbiased --recipe irm --corr 0.5
  level
  net="--model mlp390 --batch 5000 --epochs 50 --lr 0.00049"  # theirs: batches of all 50,000, as many steps
  each 6 train.py --dir $R/irm --name irm --method irm $net
  each 3 train.py --dir $R/irm --name vrex --method vrex $net
  each 3 train.py --dir $R/irm --name irm_infergroups --method irm --infer-groups $net
  each 1 train.py --dir $R/irm --name baseline $net
  each 1 train.py --dir $R/irm --name grayscale --grayscale $net
  each 1 train.py --dir $R/irm --name told_nothing $NOTHING $net
  each 1 train.py --dir $R/irm_unbiased --name baseline $net
}

ablations() {  # 75 min: which part of the cure does the work, and how much is budget or size
  for m in jitter baseline; do each 3 train.py --dir $R --method $m --width 16; done
  each 3 train.py --dir $R/unbiased --name oracle_width16 --width 16
  each 3 train.py --dir $R --method baseline --epochs 30
  for part in "--alpha 0" "--alpha 1" "--grain 0" --no-fade "--classify image" "--jitter hsv"; do  # alpha 0: plain augmentation
    each 3 train.py --dir $R --method jitter $part
  done
  each 3 train.py --dir $R --method jitter --jitter hsv --classify image --no-fade  # as published
  each 3 train.py --dir $R --method combined --gamma 0  # jitter with colour labels, nothing reversed
  for gamma in 0.03 0.1 0.3 0.6 1; do  # when does the colour head go blind, and what does that do?
    for told in "" --no-conditional; do each 3 train.py --dir $R --method grl --gamma $gamma $told; done
  done
  for m in combined jitter biasbal baseline; do each 3 train.py --dir $R --method $m --lr 0.01 --schedule onecycle; done
  each 3 train.py --dir $R/unbiased --name oracle_lr0.01_onecycle --lr 0.01 --schedule onecycle
}

lntl() {  # about 30 min: Learning Not to Learn, beside its published table
  for v in $(some 050 045 040 035 030 025 020); do run make_data.py --dir $R/lntl_$v --recipe digit --sigma2 0.$v; done
  level
  net="--width 16 --lr 0.01 --schedule onecycle --epochs 5" hiding="--method lntl --entropy 20 --model saturatedcnn"
  for v in $(some 050 045 040 035 030 025 020); do
    case $v in 020) n=3 ;; *) n=1 ;; esac  # how much a seed matters
    each $n train.py --dir $R/lntl_$v --name lntl $hiding $net
    each $n train.py --dir $R/lntl_$v --name baseline $net
    each 1 train.py --dir $R/lntl_$v --name jitter --method jitter --alpha 1 --grain 0 $net
  done
  for v in $(some 050 020); do each 1 train.py --dir $R/lntl_$v --name grayscale --grayscale $net; done
  each 1 train.py --dir $R/lntl_020 --name lntl_paper $hiding --entropy 0.01 $net  # the paper's weight
  each 1 train.py --dir $R/lntl_020 --name lntl_simplecnn $hiding --model simplecnn $net  # what the net is worth
  each 1 train.py --dir $R/lntl_020 --name baseline_saturatedcnn --model saturatedcnn $net
}

robust() {  # about 160 min: adversarial training: the published problem, a ResNet, and what it does to a shortcut
  run make_data.py --dir $R/mnist --recipe gray
  run make_data.py --dir $R/mnist_27000 --recipe gray --limit 30000  # a ResNet-50 takes its time
  level
  at="--method at --clean-epochs 1 --schedule onecycle" net="--eps-ramp 0.3 --width 24 --eps 0.3 --lr 0.005"
  resnet="--model resnet50 --steps 2 --step-size 0.06 --eps 0.1 --lr 0.0015 --batch 64 --epochs 4"
  each 1 train.py --dir $R/mnist_27000 --name resnet50 $at --eps-ramp 0.3 $resnet
  each 1 train.py --dir $R/mnist_27000 --name resnet50_student --method at --clean-epochs 1 --schedule cosine $resnet --augment student --crop 2
  each 1 train.py --dir $R/mnist --name at $at $net --epochs 8
  each 1 train.py --dir $R/mnist --name trades $at $net --beta 6 --epochs 6
  each 1 train.py --dir $R/mnist --name fgsm $at $net --attack fgsm --epochs 4
  safe="--method at --schedule onecycle --eps-ramp 0.5 --width 16 --steps 3 --lr 0.01"  # unbiased and robust
  each 3 train.py --dir $R --name at_balanced $safe --clean-epochs 1 --crop 2 --balance
  each 3 train.py --dir $R --name at_balanced_infergroups $safe --clean-epochs 1 --crop 2 --balance --infer-groups  # told nothing
  each 1 train.py --dir $R --name at_balanced_nocrop $safe --clean-epochs 1 --balance
  each 1 train.py --dir $R --name at_balanced_noclean $safe --crop 2 --balance
  each 1 train.py --dir $R --name at_balanced_nobalance $safe --clean-epochs 1 --crop 2
  each 1 train.py --dir $R/unbiased --name oracle_at --method at
  each 1 train.py --dir $R --method at  # headline table
  wide="--width 16 --lr 0.01 --schedule onecycle --epochs 5" at_wide="--method at --steps 3 --eps-ramp 0.5"
  each 3 train.py --dir $R --name baseline_wide $wide  # does adversarial training deepen the shortcut?
  each 3 train.py --dir $R --name at_wide $at_wide $wide
  each 3 train.py --dir $R/unbiased --name oracle_wide $wide
  each 3 train.py --dir $R/unbiased --name oracle_at_wide $at_wide $wide
  level
  run attack.py --dir $R/mnist --untargeted --name at --eps 0.3 --n 1000 --sweep 0.3 --models {at,at_clean,trades,fgsm}_s42
  run attack.py --dir $R/mnist --untargeted --name resnet --eps 0.1 --n 200 --steps 20 --queries 200 --sweep 0.1 --models ../mnist_27000/resnet50{,_clean,_student}_s42
  how="--untargeted --restarts 2 --n 500 --sweep 0.05"
  run attack.py --dir $R $how --name wide --models $(models 3 baseline_wide at_wide unbiased/oracle_wide unbiased/oracle_at_wide)
  run attack.py --dir $R $how --name at --models {baseline,jitter,balance,at_balanced,unbiased/oracle}_s42
  run attack.py --dir $R ${how/500/200} --name safe --models $(models 3 at_balanced at_balanced_infergroups) at_balanced_{nocrop,noclean,nobalance}_s42
  reader="--reader unbiased/oracle_s45"
  [ $QUICK = 0 ] || reader=  # it would read its own pictures
  run gradcam.py --dir $R --maximise --name all $reader --models \
    $(models 3 baseline told_nothing_width4 jitter combined unbiased/oracle) at_balanced_s42 baseline_shufflelabels_s42  # what each answer wants to see
  [ $QUICK = 1 ] || run attack.py --dir $R/mnist --check --eps 0.3 --n 100 --models at_s42  # two epochs say nothing about attacks
  [ $QUICK = 1 ] || run attack.py --dir $R --check --name at_check --n 100 --models at_balanced_s42
}

robgan() {  # about 75 min: a generator beside adversarial training, the same net and number of steps in all rows
  run make_data.py --dir $R/mnist --recipe gray
  run make_data.py --dir $R/mnist_2000 --recipe gray --limit 2222  # here additional data should matter most
  level
  each 1 train.py --dir $R/mnist --name judge --width 16 --lr 0.01 --schedule onecycle --epochs 5  # sees no generated image
  each 1 train.py --dir $R/mnist_2000 --name judge --width 16 --lr 0.01 --schedule onecycle --epochs 40
  level
  net="--width 16 --eps 0.3 --eps-ramp 0.3 --batch 64 --schedule cosine --lr 0.002"
  each 3 train.py --dir $R/mnist --name robgan --method robgan --judge judge_s42 $net --epochs 3
  each 1 train.py --dir $R/mnist_2000 --name robgan --method robgan --judge judge_s42 $net --epochs 40
  each 3 train.py --dir $R/mnist --name robgan_without --method at $net --epochs 3
  each 3 train.py --dir $R/mnist_2000 --name robgan_without --method at $net --epochs 40
  level
  for share in 0.3 0.5 0.7; do  # generated pictures as additional data, the same number of updates
    case $share in 0.5) n=3 ;; *) n=1 ;; esac
    mix="--name generated_$share --method at --generator robgan_s42 --generated $share"
    each $n train.py --dir $R/mnist $mix $net --epochs 3
    each 3 train.py --dir $R/mnist_2000 $mix $net --epochs 40
  done
  level
  how="--untargeted --eps 0.3 --n 500 --steps 50 --queries 1000 --sweep 0.3"
  run attack.py --dir $R/mnist $how --name robgan --models $(models 3 robgan robgan_without generated_0.5) generated_0.{3,7}_s42
  run attack.py --dir $R/mnist $how --name robgan_2000 --models $(models 3 ../mnist_2000/{robgan_without,generated_0.{3,5,7}})
}

page() {  # 3 min: what demo.html shows beside networks of lazy and robust
  run make_data.py --dir $R
  run make_data.py --dir $R/unbiased --corr 0.1
  level
  each 1 train.py --dir $R --name baseline_epochs1 --method baseline --epochs 1
  each 1 train.py --dir $R --name told_nothing_width4_onecycle $NOTHING --crop 1 --lr 0.01 --schedule onecycle
  each 1 train.py --dir $R/unbiased --name fair
  level
  [ $QUICK = 1 ] || run gradcam.py --dir $R --page
  [ $QUICK = 1 ] || run gradcam.py --dir $R --maximise --name two --reader unbiased/fair_s42 --models {baseline,at_balanced}_s42
  run gradcam.py --dir $R --image results/drawn_4.png --models {baseline_epochs1,baseline,told_nothing_width4_onecycle}_s42  # README's first picture
}

compare() {  # 20 min: your own beside what knows nothing, the kind of bias, and nothing again; five seeds
  run make_data.py --dir $R
  level
  for own in "${OWN[@]}" "--method baseline" "--method jitter" "--name told_nothing_width4 $NOTHING --crop 1"; do
    each 5 train.py --dir $R $own
  done
}

differences() {  # the question that train.py --report answers
  cat << END
<!-- table
rows $ROWS
knows = knows
val = final.val.acc
test_hard = final.test_hard.acc
difference to baseline = final.test_hard.acc - baseline
to jitter = final.test_hard.acc - jitter
to told nothing = final.test_hard.acc - told_nothing_width4
processor seconds = cpu
-->
<!-- end -->
END
}

case ${1:-} in
  --help | -h) sed -n '2,/^set/s/^# \{0,1\}//p' run_all.sh; exit ;;
  --list) LIST=1; shift ;;
esac
[ $# -gt 0 ] || set -- $STAGES
case $JOBS in *[!0-9]* | 0* | ????*) fail "JOBS is '$JOBS'; give a number from 1 to 999" ;; esac
case $QUICK$FRESH in [01][01]) ;; *) fail "QUICK is '$QUICK' and FRESH is '$FRESH'; both are 0 or 1" ;; esac
OWN=() ROWS="baseline jitter told_nothing_width4"
case $1 in
  compare)
    [ $# -gt 1 ] || fail "compare what? give a --method of train.py, or its flags in quotes"
    for own in "${@:2}"; do
      name=$(sed -E 's/--method //; s/[^ ]*\///g; s/\.py\b//; s/[^A-Za-z0-9.]+/_/g; s/^_//' <<< "$own")
      case " $ROWS " in *" $name "*) continue ;; esac  # yours may be one of ours
      case $own in -*) OWN+=("--name $name $own") ;; *) OWN+=("--method $own") ;; esac
      ROWS+=" $name"
    done
    set -- compare
    ;;
  report | test) [ "${LIST:-}$#" = 1 ] || fail "'$1' goes alone" ;;
  *)
    for word in "$@"; do
      case " $STAGES " in *" ${word// /_} "*) ;; *) fail "there is no stage '$word'; choose from: $STAGES" ;; esac
    done
    ;;
esac
[ -z "${LIST:-}" ] || { list "$@" | sed '$d'; exit; }
trap 'kill $(jobs -p) 2> /dev/null || :; wait; echo "run_all.sh: interrupted; run the same command again to continue" >&2; exit 130' INT TERM
setup
[ $1 != test ] || { tests; exit; }
alone
[ $1 = report ] || work "$@"
[ $1 != compare ] || differences > $R/compare.md
report
[ $1 != compare ] || grep '^|' $R/compare.md
