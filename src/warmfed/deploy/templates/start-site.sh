#!/bin/sh
# Starts this site's SuperNode, which connects to the server and waits for work. Ctrl-C, or systemd, ends it.
umask 077
cd "$(dirname "$0")"
set -eu
set -a
. ./environment
set +a
PATH="${WARMFED_BIN:+$WARMFED_BIN:}$PATH"
FLWR_HOME="$PWD/flwr"
export PATH FLWR_HOME
warmfed-supernode . || {
  code=$?
  warmfed deploy check . # why it could not connect, if that is why it has ended
  exit "$code"
}
