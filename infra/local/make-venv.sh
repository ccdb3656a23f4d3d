#!/bin/sh
# Make a virtual environment: make-venv.sh PYTHON DIRECTORY
# Debian's python3 comes without the part that puts pip into one; as root that is installed.
set -eu

python=$1
directory=$2
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "codeyard needs Python 3.11 or later; $python is $("$python" --version). Try: make PYTHON=python3.11" >&2
    exit 1
}
if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
    if [ "$(id -u)" != 0 ]; then
        echo "$python cannot make virtual environments: apt-get install python3-venv (as root), then again" >&2
        exit 1
    fi
    "$(dirname "$0")/install-packages.sh" no-such-program=python3-venv
fi
"$python" -m venv "$directory" || {
    rm -rf "$directory" # half of one would look finished the next time
    exit 1
}
