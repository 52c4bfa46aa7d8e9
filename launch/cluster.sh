#!/bin/sh
# All slots of the hosts in HOSTFILE, over ssh:  launch/cluster.sh HOSTFILE script.py [arguments]
set -eu
if [ $# -lt 2 ]; then
    echo "usage: $0 HOSTFILE script.py [arguments]" >&2
    exit 2
fi
hostfile=$1
shift
exec distprop run --hostfile "$hostfile" "$@"
