#!/bin/sh
# Write down the versions of an environment for pip's --constraint: freeze.sh PIP FILE
# torch is left out: which build of it is right depends on the machine, and its version is in the Makefile.
set -eu

{
    echo "# The versions that the tests passed with. \`make constraints\` writes this file; pyproject.toml has the ranges."
    "$1" freeze --exclude-editable | grep -E '^[A-Za-z0-9_.-]+==[^+]+$' | grep -v -E '^(py-spy|torch|triton)=='
} >"$2.new"
mv "$2.new" "$2"
