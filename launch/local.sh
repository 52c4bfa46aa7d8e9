#!/bin/sh
# N ranks on this machine:  launch/local.sh N script.py [arguments]
set -eu
if [ $# -lt 2 ]; then
    echo "usage: $0 N script.py [arguments]" >&2
    exit 2
fi
ranks=$1
shift
exec distprop run -n "$ranks" "$@"
