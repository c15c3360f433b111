#!/bin/sh
# Lets the sites of nodes/ in whom the SuperLink does not know yet; waits a minute for the SuperLink.
cd "$(dirname "$0")"
. ./env.sh
exec warmfed deploy register .
