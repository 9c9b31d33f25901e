"""Child process: a Ray cluster of two nodes with different resources on this machine, until standard input ends.

Writes one line of JSON: its address, that of its client server, and the raylet process of each resource.
"""

import json
import os
import socket
import sys

# Read by Ray as it is imported: keep to the loopback address.
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

from ray._private import ray_constants
from ray.cluster_utils import Cluster

COMMON = {"num_cpus": 1, "object_store_memory": 200 * 1024 * 1024, "node_ip_address": "127.0.0.1"}


def main() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        client_port = probe.getsockname()[1]
    cluster = Cluster(shutdown_at_exit=True)
    nodes = {
        "left": cluster.add_node(
            resources={"left": 4}, include_dashboard=False, ray_client_server_port=client_port, dashboard_port=None, **COMMON
        ),
        "right": cluster.add_node(resources={"right": 4}, **COMMON),
    }
    raylets = {name: node.all_processes[ray_constants.PROCESS_TYPE_RAYLET][0].process.pid for name, node in nodes.items()}
    said = {"address": cluster.address, "client": f"ray://127.0.0.1:{client_port}", "raylets": raylets}
    sys.stdout.write(json.dumps(said) + "\n")
    sys.stdout.flush()
    sys.stdin.read()
    cluster.shutdown()


if __name__ == "__main__":
    main()
