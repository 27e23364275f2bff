#!/bin/sh
# All that waits for a GPU: see gpu_check.py. At most six minutes on an H100; --miniature runs it on a CPU.
set -eu
cd "$(dirname "$0")/.."
exec timeout 360 python benchmarks/gpu_check.py "$@"
