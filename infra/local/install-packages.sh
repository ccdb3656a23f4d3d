#!/bin/sh
# Install Debian packages whose programs are missing, without starting a service.
#
#   install-packages.sh PROGRAM=PACKAGE...        e.g. redis-server=redis-server; a path will do too
#
# Without root it says what is missing and succeeds: the tests then skip what needs it, or fail where CI is
# set. A server that already runs is not touched: its package is there, so nothing is installed for it.
set -eu

PATH="$PATH:/usr/sbin:/sbin"
missing=""
for pair in "$@"; do
    command -v "${pair%%=*}" >/dev/null 2>&1 || [ -e "${pair%%=*}" ] || missing="$missing ${pair#*=}"
done
if [ -z "$missing" ]; then
    exit 0
fi
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null 2>&1; then
    echo "missing:$missing (needs root and apt-get to install; going on without)" >&2
    exit 0
fi

# Debian starts a service when its package is installed, unless this policy says no. One that is there
# already was put there by somebody who decides for the machine.
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
    trap 'rm -f "$policy"' EXIT
    trap 'exit 130' INT TERM
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod 755 "$policy"
fi

echo "installing Debian packages:$missing"
export DEBIAN_FRONTEND=noninteractive NEEDRESTART_SUSPEND=1
# shellcheck disable=SC2086  # a list of names
apt-get install -qq -y --no-install-recommends $missing >/dev/null 2>&1 || {
    apt-get update -qq
    apt-get install -qq -y --no-install-recommends $missing >/dev/null
}
