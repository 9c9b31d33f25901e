"""`weft serve --record FILE`: sees that what the gateways serve can be written down there, before anything starts."""

from dataclasses import replace
from pathlib import Path

from orchestrator.cli.cluster_file import UnusableInput
from orchestrator.core.config import ClusterConfig
from orchestrator.core.types import GatewayId
from orchestrator.live.recorder import record_path


def with_record(config: ClusterConfig, file: Path) -> ClusterConfig:
    """Return the configuration with a recording. Raises `UnusableInput` if a gateway's file cannot be made anew."""
    if file.suffix == ".gz":
        raise UnusableInput(f"--record: {file}: recordings are not compressed; name a file without .gz")
    whole = file.absolute()
    for number in range(config.gateway.count):
        path = record_path(whole, GatewayId(number))
        try:
            path.open("xb").close()
            path.unlink()
        except FileExistsError:
            raise UnusableInput(f"--record: {path}: is there already; name a new file") from None
        except OSError as error:
            raise UnusableInput(f"--record: {path}: {error.strerror}") from None
    return replace(config, cluster=replace(config.cluster, record=str(whole)))
