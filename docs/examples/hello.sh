#!/bin/sh
# Shows that pods, Services and names work in a cluster of the default lab: what `make up` ends with.
# usage: hello.sh [CLUSTER]
set -eu
cd "$(dirname "$0")"
[ -x ../../bin/fathom ] && fathom=../../bin/fathom || fathom=fathom # in a source tree, or installed
fathom=${FATHOM:-$fathom}
cluster=${1:-east}
k() { "$fathom" kubectl --cluster "$cluster" -- "$@"; }
show() { echo "\$ $*"; }

k apply -f hello.yaml >/dev/null
k rollout status deployment/hello --timeout=60s >/dev/null
k wait --for=condition=Ready pod/toolbox --timeout=60s >/dev/null

show fathom kubectl --cluster "$cluster" -- get pods -o wide
k get pods -o wide
echo
show fathom kubectl --cluster "$cluster" -- exec toolbox -- dig +short hello.default.svc.cluster.local
k exec toolbox -- dig +short hello.default.svc.cluster.local
echo
show fathom kubectl --cluster "$cluster" -- exec toolbox -- curl -s http://hello/hostname
k exec toolbox -- curl -s --max-time 10 -w "\n" http://hello/hostname
