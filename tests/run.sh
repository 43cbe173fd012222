#!/bin/sh
# Runs all tests; `make test` calls it.
#
#   run.sh PYTHON
#
# Tests on a real Swarm mostly wait for gossip, the scheduler and time-outs. So they run beside the
# others, and virtual machines, which only compute, after them. Both have a lower priority, so that
# tests of one host's processes and the kernel are hardly slower than alone. Tests marked `long` are
# left out; `make long` runs them.
set -u

python=${1:?usage: run.sh PYTHON}
mkdir -p build
beside=build/swarm.txt

(
        nice -n 3 "$python" -m pytest -m "not long" --durations=15 tests/swarm
        swarm=$?
        nice -n 5 "$python" -m pytest -m "not long" --durations=15 tests/vm && [ "$swarm" = 0 ]
) >"$beside" 2>&1 &
others=$!
trap 'kill "$others" 2>/dev/null' INT TERM
"$python" -m pytest -m "not long" --durations=15 --ignore=tests/swarm --ignore=tests/vm
alone=$?
wait "$others"
others=$?
cat "$beside"
[ "$alone" = 0 ] && [ "$others" = 0 ]
