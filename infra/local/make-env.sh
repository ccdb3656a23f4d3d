#!/usr/bin/env bash
# Write .env from .env.example, with a random secret wherever one is left empty. Leaves a .env that is there alone.
# Usage: make-env.sh [FOLDER], by default the root of the repository.
set -euo pipefail
cd "${1:-$(dirname "$0")/../..}"

if [[ -e .env ]]; then
    echo ".env is there already; left as it is"
    exit 0
fi

secret() { # letters and digits only: some become part of a URL
    od -An -N24 -tx1 /dev/urandom | tr -d ' \n'
}

umask 077 # for its owner alone, from the first byte on
while IFS= read -r line || [[ -n $line ]]; do
    if [[ $line =~ ^(RABBITMQ_PASSWORD|REDIS_PASSWORD|GATEWAY_API_KEY)=$ ]]; then
        line+=$(secret)
    fi
    printf '%s\n' "$line"
done < .env.example > .env.new
mv .env.new .env
echo "wrote .env with fresh secrets; GATEWAY_API_KEY in it opens the gateway"
