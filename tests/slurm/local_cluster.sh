#!/usr/bin/env bash
# A real Slurm of one node on this machine, without systemd and without a container; for tests.
#
#   bash tests/slurm/local_cluster.sh start DIRECTORY    then: export SLURM_CONF=DIRECTORY/slurm.conf
#   bash tests/slurm/local_cluster.sh stop DIRECTORY
#
# Everything lies in DIRECTORY (made again by start), on free ports, under the calling user, so it
# disturbs no other Slurm. Two partitions share the node: a job in `high` pre-empts one in `low`,
# which gets SIGTERM, 60 s of grace, and is queued again.
# Needs slurmctld, slurmd, the clients and munge (Debian: slurmctld slurmd slurm-client munge).
set -euo pipefail

fail() { printf 'local_cluster.sh: %s\n' "$@" >&2; exit 1; }

[ $# -eq 2 ] || { sed -n '2,11s/^# \{0,1\}//p' "$0" >&2; exit 2; }
command="$1"
mkdir -p "$2"
dir="$(cd "$2" && pwd)"
PATH="$PATH:/usr/sbin:/sbin"

# Ends the process of a pid file, if that pid still is the named program.
end() {
  local pid
  pid="$(cat "$dir/$1.pid" 2>/dev/null)" || return 0
  case "$(cat "/proc/$pid/comm" 2>/dev/null)" in "$1"*) kill "$pid" ;; *) return 0 ;; esac
  for _ in $(seq 50); do
    kill -0 "$pid" 2>/dev/null || return 0
    sleep 0.1
  done
  kill -9 "$pid"
}

stop() {
  end slurmctld
  end slurmd
  end munged
}

# Two ports that nothing listens on now.
free_ports() {
  python3 -c '
import socket
sockets = [socket.socket() for _ in range(2)]
for s in sockets:
    s.bind(("127.0.0.1", 0))
print(*(s.getsockname()[1] for s in sockets))'
}

start() {
  local program control_port node_port host user cpus
  for program in slurmctld slurmd munged sbatch scontrol sinfo python3; do
    command -v "$program" >/dev/null || fail "$program is missing; docs/guides/slurm.md says what to install"
  done
  [ ! -e "$dir/slurm.conf" ] || fail "$dir holds a cluster already: stop it and remove the folder"
  read -r control_port node_port < <(free_ports)
  host="$(hostname -s)"
  user="$(id -un)"
  cpus="$(env -u OMP_NUM_THREADS nproc)"  # nproc would print that variable
  mkdir -p "$dir/state" "$dir/spool"
  # munged insists on folders that others cannot write to, and on a secret key.
  mkdir -m 755 "$dir/munge"
  mkdir -m 700 "$dir/munge/secret"
  (umask 077 && head -c 1024 /dev/urandom >"$dir/munge/secret/key")
  cat >"$dir/slurm.conf" <<CONF
ClusterName=local
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$control_port
SlurmdPort=$node_port
SlurmUser=$user
SlurmdUser=$user
AuthType=auth/munge
# A job that is queued again waits until its credential has expired; 120 s unless told.
AuthInfo=socket=$dir/munge/socket,cred_expire=5
CredType=cred/munge
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=5,bf_interval=5
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
ReturnToService=2
KillWait=20
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
NodeName=$host NodeAddr=127.0.0.1 CPUs=$cpus State=UNKNOWN
PartitionName=low Nodes=$host Default=YES MaxTime=60 State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=high Nodes=$host MaxTime=60 State=UP PriorityTier=2 PreemptMode=OFF
CONF
  export SLURM_CONF="$dir/slurm.conf"
  munged --key-file="$dir/munge/secret/key" --socket="$dir/munge/socket" \
    --pid-file="$dir/munged.pid" --log-file="$dir/munged.log" --seed-file="$dir/munge/seed" --force
  slurmctld -f "$SLURM_CONF"
  slurmd -f "$SLURM_CONF"
  for _ in $(seq 150); do
    [ "$(sinfo --noheader --partition=low --format=%T 2>/dev/null)" != idle ] || return 0
    sleep 0.2
  done
  tail -n 20 "$dir"/*.log >&2
  stop
  fail "the node did not come up within 30 s; logs above"
}

case "$command" in
  start) start ;;
  stop) stop ;;
  *) fail "$command: say start or stop" ;;
esac
