#!/bin/sh
# docker run IMAGE [MODEL] [flags of himap serve]
# docker run IMAGE himap key NAME
#
# MODEL and SERVE_FLAGS in the environment do the same; arguments win. Without a model the one that
# ships with the image is served, if it has one. Ends by exec: signals reach the gateway itself.
set -eu

if [ "${1-}" = himap ]; then
    exec "$@"
fi

model=${MODEL-}
case "${1-}" in
"" | -*) ;;
*)
    model=$1
    shift
    ;;
esac

set -f # SERVE_FLAGS is split into words, and not taken for file names
# shellcheck disable=SC2086
set -- ${SERVE_FLAGS-} "$@"

if [ -z "$model" ]; then
    model=${DEMO_MODEL-}
    if [ ! -d "$model" ]; then
        echo "entrypoint.sh: name a model: as the first argument, or in MODEL" >&2
        exit 64
    fi
    # As examples/first_run.py serves it: a decoder of 8 layers, too shallow for the default cuts.
    set -- --served-model-name demo --shallow-layer 2 --deep-layer 4 \
        --dtype float32 --max-model-len 1024 --block-size 32 \
        --kv-cache-memory-bytes 256M --enforce-eager "$@"
fi

exec himap serve "$model" --host 0.0.0.0 --port 8000 "$@"
