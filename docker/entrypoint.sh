#!/bin/sh
# docker run IMAGE [MODEL] [flags of himap serve]
# docker run IMAGE himap key NAME
#
# MODEL and SERVE_FLAGS in the environment do the same; arguments win. Without a model the bundled
# one is served. Ends by exec: signals reach the gateway itself.
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
    # 4 million parameters: compiling them takes longer than it saves.
    set -- --kv-cache-memory-bytes 256M --enforce-eager "$@"
fi

exec himap serve ${model:+"$model"} --host 0.0.0.0 --port 8000 "$@"
