#!/bin/sh
# Starts the SuperLink and lets the sites of nodes/ in. Ctrl-C, or systemd, ends it.
cd "$(dirname "$0")"
. ./env.sh
(nice warmfed deploy check . &) # what is not as it should be is in the log
(./register.sh &)
exec flower-superlink --host "$WARMFED_LISTEN" --port "$WARMFED_PORT" \
  --ssl-ca-certfile ca.crt --ssl-certfile server.crt --ssl-keyfile server.key --enable-supernode-auth \
  --disable-runtime-dependency-installation --database superlink.db
