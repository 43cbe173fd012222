#!/bin/sh
# Runs all tests; `make test` calls it.
#
#   run.sh PYTHON
#
# Tests on a real Swarm mostly wait for gossip, the scheduler and time-outs. Virtual machines only
# compute. So both run at the same time, the virtual machines with a lower priority, and the whole
# takes no longer than without them.
set -u

python=${1:?usage: run.sh PYTHON}
mkdir -p build
beside=build/vm.txt

"$python" -m pytest --ignore=tests/swarm --ignore=tests/vm
alone=$?
nice -n 5 "$python" -m pytest tests/vm >"$beside" 2>&1 &
vm=$!
trap 'kill "$vm" 2>/dev/null' INT TERM
"$python" -m pytest tests/swarm
swarm=$?
wait "$vm"
vm=$?
cat "$beside"
[ "$alone" = 0 ] && [ "$swarm" = 0 ] && [ "$vm" = 0 ]
