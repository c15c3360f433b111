#!/bin/sh
# Starts this site's SuperNode, which connects to the server and waits for work. Ctrl-C, or systemd, ends it.
cd "$(dirname "$0")"
set -eu
set -a
. ./environment
set +a
PATH="${WARMFED_BIN:+$WARMFED_BIN:}$PATH"
FLWR_HOME="$PWD/flwr"
export PATH FLWR_HOME
warmfed-supernode --superlink '{{ address }}' --root-certificates ca.crt --auth-supernode-private-key node \
  --host 127.0.0.1 --port "$WARMFED_PORT" --node-config "site-folder=\"$PWD\"" || {
  code=$?
  warmfed deploy check . # why it could not connect, if that is why it has ended
  exit "$code"
}
