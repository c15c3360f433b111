# Sourced by the scripts beside it: the environment, and the connection `here` of the command flwr.
set -eu
umask 077
set -a
. ./environment
set +a
PATH="${WARMFED_BIN:+$WARMFED_BIN:}$PATH"
WARMFED_SERVER="$PWD"
FLWR_HOME="$PWD/flwr"
export PATH WARMFED_SERVER FLWR_HOME
mkdir -p flwr
cat > flwr/config.toml <<END
[superlink]
default = "here"

[superlink.here]
address = "127.0.0.1:$WARMFED_PORT"
root-certificates = "$PWD/ca.crt"
END
