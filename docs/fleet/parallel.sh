#!/bin/sh
# One machine of the list per job: parallel.sh fleet.yaml MACHINES AT_A_TIME [HOSTS]
# GNU parallel where it is installed (with HOSTS also on other hosts), else xargs.
set -eu
list=${1:?the list of machines}
count=${2:?how many machines it has}
jobs=${3:-2}
hosts=${4:-:}
convert="hyper2kvm convert --progress plain --batch"
if command -v parallel >/dev/null; then
  seq 0 $((count - 1)) | parallel --jobs "$jobs" --sshlogin "$hosts" --joblog hyper2kvm.joblog $convert "$list" --only
else
  seq 0 $((count - 1)) | xargs -P "$jobs" -n 1 $convert "$list" --only
fi
