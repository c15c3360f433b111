#!/bin/sh
# ./run.sh [CONFIG.toml [FOLDER]]: starts a run and shows its log. Without FOLDER it goes to runs/ALGORITHM-SEED.
cd "$(dirname "$0")"
. ./env.sh
exec flwr run app here --stream -c "config=\"${1:-config.toml}\" out=\"${2:-}\""
