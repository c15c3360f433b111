#!/bin/sh
# Starts the SuperLink and lets the sites of nodes/ in. Ctrl-C, or systemd, ends it.
cd "$(dirname "$0")"
. ./env.sh
(nice warmfed deploy check . &) # what is not as it should be is in the log
(./register.sh &)
exec warmfed-superlink .
