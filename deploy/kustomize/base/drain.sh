#!/usr/bin/env bash
# The preStop hook of both Envoys. On SIGTERM Envoy ends at once, with every stream that it carries;
# so before that it tells its clients to go elsewhere (GOAWAY), and its streams may end by themselves.
#
#   drain.sh ADMIN_PORT FORGET_S DRAIN_MAX_S
#
# FORGET_S: for so long clients may still find this pod through DNS. DRAIN_MAX_S: when it gives up.
set -euo pipefail
admin_port=$1 forget_s=$2 drain_max_s=$3

ask() {  # METHOD PATH
  exec 3<>"/dev/tcp/127.0.0.1/$admin_port"
  printf '%s %s HTTP/1.1\r\nHost: admin\r\nContent-Length: 0\r\nConnection: close\r\n\r\n' "$1" "$2" >&3
  cat <&3
  exec 3>&-
}

open_requests() {
  ask GET '/stats?filter=^http\.(edge|mesh)\.downstream_rq_active$' | { grep -o 'active: [1-9][0-9]*' || true; }
}

ask POST '/drain_listeners?graceful&skip_exit' >/dev/null
sleep "$forget_s"
while ((SECONDS < drain_max_s)) && [[ -n $(open_requests) ]]; do
  sleep 1
done
