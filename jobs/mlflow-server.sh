#!/usr/bin/env bash
# MLflow's server for a cluster, on its head: bash jobs/mlflow-server.sh ADDRESS FOLDER [PORT]
#
# ADDRESS is the head's address in the private network, the only one that is listened on; FOLDER keeps the database,
# the artifacts and the log. Returns when the server answers, and starts none where one answers already. There is no
# login: whoever reaches the port can read and write, so the network must be closed.
set -euo pipefail
address=${1:?"usage: mlflow-server.sh ADDRESS FOLDER [PORT]"}
folder=${2:?"usage: mlflow-server.sh ADDRESS FOLDER [PORT]"}
port=${3:-5000}

answers() {
    python -c 'import sys, urllib.request; urllib.request.urlopen(sys.argv[1], timeout=5)' \
        "http://$address:$port/health" 2>/dev/null
}

if answers; then exit; fi
mkdir -p "$folder"
export MLFLOW_ALLOW_PICKLE_DESERIALIZATION=false MLFLOW_DISABLE_TELEMETRY=true
# localhost is what a browser asks for at the near end of an SSH tunnel
setsid nohup mlflow server --host "$address" --port "$port" --workers 1 \
    --allowed-hosts "$address:$port,localhost:$port,127.0.0.1:$port" \
    --backend-store-uri "sqlite:///$folder/mlflow.db" --artifacts-destination "$folder/artifacts" \
    >>"$folder/server.log" 2>&1 </dev/null &
server=$!
for _ in $(seq 120); do
    if answers; then exit; fi
    kill -0 "$server" 2>/dev/null || break
    sleep 1
done
echo "MLflow does not answer at http://$address:$port; $folder/server.log says why" >&2
exit 1
