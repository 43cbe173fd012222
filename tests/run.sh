#!/bin/sh
# Runs all tests; `make test` calls it.
#
#   run.sh PYTHON
#
# Tests on a real Swarm mostly wait for gossip, the scheduler and time-outs. So they run beside the
# others, and virtual machines, which only compute, after them. Both have a lower priority, so that
# tests of one host's processes and the kernel are hardly slower than alone. Tests marked `long` are
# left out; `make long` runs them.
#
# Beside so much else a test can miss a promise that names a time, such as the two seconds that
# Docker gives a task to leave its service. So a few failed tests run once more, when nothing else
# runs. What fails again, fails the run. What passes then is still a defect, of the test or of
# FreeFlow: the last lines name it.
set -u

python=${1:?usage: run.sh PYTHON}
few=5
cache=build/pytest
rm -rf "$cache"
mkdir -p "$cache"
beside=build/swarm.txt

# part NAME NICENESS ARGUMENT…: run a part of the tests, and remember which fail. Its times are in
# build/pytest/NAME.xml.
part() {
        name=$1 niceness=$2
        shift 2
        nice -n "$niceness" "$python" -m pytest -m "not long" -o cache_dir="$cache/$name" \
                --junit-xml="$cache/$name.xml" "$@"
}

# failed NAME: the tests of a part that have failed, one on a line.
failed() {
        "$python" - "$cache/$1/v/cache/lastfailed" <<'END'
import json, sys
from pathlib import Path

path = Path(sys.argv[1])
print("\n".join(json.loads(path.read_text()) if path.exists() else {}))
END
}

# again NAME STATUS: run the failed tests of a part once more, if it ended with 1 (some failed) and
# they are few; the part's status then.
again() {
        [ "$2" = 0 ] && return 0
        names=$(failed "$1")
        [ "$2" = 1 ] && [ "$(printf '%s\n' "$names" | wc -l)" -le "$few" ] || return "$2"
        echo "Once more, alone: $names"
        part "$1" 0 --junit-xml="$cache/$1-again.xml" --last-failed --last-failed-no-failures=none || return
        only_alone="$only_alone$names
"
}

(
        part swarm 3 --durations=15 tests/swarm
        echo $? >"$cache/swarm.status"
        part vm 5 --durations=15 tests/vm
        echo $? >"$cache/vm.status"
) >"$beside" 2>&1 &
others=$!
trap 'kill "$others" 2>/dev/null' INT TERM
part main 0 --durations=15 --ignore=tests/swarm --ignore=tests/vm
main=$?
wait "$others"
cat "$beside"

only_alone=
status=0
again main "$main" || status=1
for name in swarm vm; do
        again "$name" "$(cat "$cache/$name.status")" || status=1
done
[ -z "$only_alone" ] || printf 'Passed only alone, please report:\n%s' "$only_alone"
exit "$status"
