"""How large pools' blocks are, by their models' checkpoints: what simulating a `[store]` beside pools without hardware needs."""

from collections.abc import Mapping
from dataclasses import replace

from orchestrator.cli.cluster_file import UnusableInput
from orchestrator.core.config import ClusterConfig, KvFormat
from orchestrator.core.types import PoolName
from orchestrator.fleet.actors import model_folder
from orchestrator.profiles.fields import CheckpointError
from orchestrator.profiles.resolve import BlockBytes
from workers.store.models import stored_form


def block_bytes_of(config: ClusterConfig) -> Mapping[PoolName, BlockBytes]:
    """Return the blocks of all pools without hardware, if there are stores. Raises `UnusableInput` naming the model."""
    if config.store is None:
        return {}
    found: dict[PoolName, BlockBytes] = {}
    for pool in config.serving_pools:
        if pool.hardware.chip:
            continue
        try:
            folder = model_folder(config, pool.model)
            stored = stored_form(pool.engine, folder).block_bytes
            whole = stored_form(replace(pool.engine, kv_format_stored=KvFormat.PLAIN), folder).block_bytes
        except CheckpointError as error:
            raise UnusableInput(f"models.{pool.model}.path: {error}") from None
        found[PoolName(pool.name)] = BlockBytes(whole, stored)
    return found
