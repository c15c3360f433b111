#!/bin/sh
# Lets the nodes of nodes/ in whom the SuperLink does not know yet; waits a minute for the SuperLink.
cd "$(dirname "$0")"
. ./env.sh
for key in nodes/*.pub; do
  name=$(basename "$key" .pub)
  tries=0
  until said=$(flwr supernode register "$key" here --name "$name" 2>&1); do
    case "$said" in *"already in use"*) break ;; esac
    tries=$((tries + 1))
    if [ "$tries" -ge 30 ]; then
      echo "site $name cannot be registered: $said" >&2
      exit 1
    fi
    sleep 2
  done
  echo "site $name may connect"
done
