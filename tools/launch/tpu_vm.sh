#!/usr/bin/env bash
# A slice of Cloud TPU VMs without Kubernetes, with one process per host.
#
#   export ZONE=us-west4-a ACCELERATOR=v5litepod-16 RUNTIME=v2-alpha-tpuv5-lite
#   tools/launch/tpu_vm.sh create NAME [--spot]     requests the slice as a queued resource
#   tools/launch/tpu_vm.sh setup NAME               copies HEAD to every host and installs it; repeat after each commit
#   tools/launch/tpu_vm.sh run NAME COMMAND ...     starts a command on every host, in the background
#   tools/launch/tpu_vm.sh logs NAME                follows the output of host 0
#   tools/launch/tpu_vm.sh stop NAME                ends the command
#   tools/launch/tpu_vm.sh delete NAME
set -euo pipefail

if [ $# -lt 2 ]; then
  sed -n '/^#   /s/^#   //p' "$0" >&2
  exit 2
fi
action=$1 name=$2
shift 2
zone=--zone=${ZONE:?the zone of the slice, such as us-west4-a}

everywhere() {
  gcloud compute tpus tpu-vm ssh "$name" "$zone" --worker=all --batch-size=all --quiet --command="$1"
}

case $action in
  create)
    gcloud compute tpus queued-resources create "$name" --node-id="$name" "$zone" \
      --accelerator-type="${ACCELERATOR:?a slice, such as v5litepod-16}" --runtime-version="${RUNTIME:?its software version, such as v2-alpha-tpuv5-lite}" "$@"
    ;;
  setup)
    archive=$(mktemp --suffix=.tar.gz)
    trap 'rm -f "$archive"' EXIT
    git -C "$(dirname "$0")/../.." archive --output="$archive" HEAD
    gcloud compute tpus tpu-vm scp "$archive" "$name:gptjax.tar.gz" "$zone" --worker=all --batch-size=all --quiet
    # The Python of the images is too old; uv installs another.
    everywhere 'set -e; mkdir -p gptjax; tar --extract --gzip --file=gptjax.tar.gz --directory=gptjax
      python3 -m pip install --quiet --user uv; cd gptjax
      [ -d .venv ] || python3 -m uv venv --quiet --python=3.12
      python3 -m uv pip install --quiet --python=.venv/bin/python -r requirements-tpu.txt -r requirements-data.txt'
    ;;
  run)
    # setsid: a process group that outlives the connection and that stop can end.
    everywhere "cd gptjax; PATH=\$PWD/.venv/bin:\$PATH setsid nohup $(printf '%q ' "$@")> gptjax.log 2>&1 < /dev/null & echo \$! > gptjax.pid"
    ;;
  logs)
    gcloud compute tpus tpu-vm ssh "$name" "$zone" --worker=0 --quiet --command='tail --lines=+1 --follow gptjax/gptjax.log'
    ;;
  stop)
    everywhere 'kill -- -"$(cat gptjax/gptjax.pid)"'
    ;;
  delete)
    gcloud compute tpus queued-resources delete "$name" "$zone" --force --quiet
    ;;
  *)
    echo "error: $action: not one of create, setup, run, logs, stop, delete" >&2
    exit 2
    ;;
esac
