#!/bin/sh
# Makes a root file system from the Debian archive, as a directory or a tar. Needs root.
#
#   bootstrap.sh SUITE PACKAGES TARGET [MMDEBSTRAP-OPTION...]
#       PACKAGES         names, separated by commas
#       FREEFLOW_CACHE   the directory for downloads (default /var/cache/freeflow)
#
# TARGET appears when it is complete. Packages are downloaded first and kept until then, so an
# interrupted run does not download them again. There is no time-out; a line every ten seconds shows
# the progress.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
suite=${1:?usage: bootstrap.sh SUITE PACKAGES TARGET [MMDEBSTRAP-OPTION...]}
packages=${2:?usage: bootstrap.sh SUITE PACKAGES TARGET [MMDEBSTRAP-OPTION...]}
target=${3:?usage: bootstrap.sh SUITE PACKAGES TARGET [MMDEBSTRAP-OPTION...]}
shift 3
mirror=$("$here/mirror.sh")
downloads=${FREEFLOW_CACHE:-/var/cache/freeflow}/downloads/$(basename "$target")
debs=$downloads/debs
# mmdebstrap chooses the format by the suffix.
temporary=$(dirname "$target")/new-$(basename "$target")

mkdir -p "$debs/partial" "$downloads/lists/partial" "$downloads/none"
echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror $suite main" >"$downloads/sources.list"
: >"$downloads/status"
cat >"$downloads/apt.conf" <<CONF
Dir::Etc::SourceList "$downloads/sources.list";
Dir::Etc::SourceParts "$downloads/none";
Dir::Etc::Preferences "$downloads/none/none";
Dir::Etc::PreferencesParts "$downloads/none";
Dir::State::Status "$downloads/status";
Dir::State::Lists "$downloads/lists";
Dir::Cache "$downloads";
Dir::Cache::Archives "$debs";
APT::Sandbox::User "root";
APT::Install-Recommends "false";
Acquire::Languages "none";
Acquire::Retries "5";
// Suites that aren't released yet have a Release file that expires.
Acquire::Check-Valid-Until "false";
CONF

apt() { APT_CONFIG="$downloads/apt.conf" apt-get -qq -y "$@"; }

# Prints the progress of WHAT every ten seconds, until it is told to stop.
watcher=
isolated=
watch() { # WHAT
    (
        seconds=0
        while sleep 10; do
            seconds=$((seconds + 10))
            echo "            $1: $seconds s, $(du -scm "$temporary" "$downloads" 2>/dev/null | tail -n 1 | cut -f1) MB"
        done
    ) &
    watcher=$!
}
unwatch() {
    [ -z "$watcher" ] || kill "$watcher" 2>/dev/null || true
    watcher=
}
trap unwatch EXIT
trap 'exit 130' INT TERM

watch "downloading packages of $suite"
apt update
# These are the packages of mmdebstrap's minbase, and the given ones.
# shellcheck disable=SC2046
apt install --download-only '?essential' '?priority(required)' $(echo "$packages" | tr , ' ') >/dev/null
unwatch

watch "unpacking $suite"
rm -rf --one-file-system "$temporary"
# In its own mount namespace, so that its mounts (/proc, /sys) disappear even if it is killed.
[ "$(id -u)" != 0 ] || isolated="unshare --mount"
# Documentation and locales are not needed. mmdebstrap expands its hooks itself.
# shellcheck disable=SC2016,SC2086
TMPDIR=$downloads $isolated mmdebstrap --quiet --variant=minbase --include="$packages" \
    --aptopt='Acquire::Check-Valid-Until "false"' \
    --aptopt='APT::Install-Recommends "false"' \
    --dpkgopt='path-exclude=/usr/share/doc/*' \
    --dpkgopt='path-exclude=/usr/share/man/*' \
    --dpkgopt='path-exclude=/usr/share/locale/*' \
    --dpkgopt='path-exclude=/usr/share/info/*' \
    --setup-hook='mkdir -p "$1"/var/cache/apt/archives' \
    --setup-hook="cp $debs/*.deb \"\$1\"/var/cache/apt/archives/" \
    --customize-hook='rm -rf "$1"/var/lib/apt/lists "$1"/var/cache/apt' \
    "$@" "$suite" "$temporary" "$mirror"
unwatch
mv "$temporary" "$target"
rm -rf --one-file-system "$downloads"
