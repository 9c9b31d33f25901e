"""What the blocks of a cluster's models are outside of engines' pools, before any engine is there. No torch."""

from dataclasses import dataclass
from pathlib import Path

from orchestrator.core.config import EngineConfig
from orchestrator.core.types import ModelName
from workers.engines.checkpoint import fingerprint
from workers.engines.profiled import profiled_fingerprint
from workers.engines.profiled import stored_form as profiled_form
from workers.engines.shape import read_architecture
from workers.engines.stored import StoredForm, engine_slab, form_of


@dataclass(frozen=True, slots=True)
class ModelBlocks:
    """What the blocks of one model are."""

    model: ModelName
    fingerprint: str
    layout: str
    block_tokens: int
    block_bytes: int


def model_blocks(model: ModelName, engine: EngineConfig, folder: Path) -> ModelBlocks:
    """Return what an engine of a model will say of its blocks. Raises `CheckpointError` for a folder that it could not open."""
    form = stored_form(engine, folder)
    name = profiled_fingerprint(folder) if engine.name == "profiled" else fingerprint(folder, engine.weights)
    return ModelBlocks(model, name, form.layout, engine.block_tokens, form.block_bytes)


def stored_form(engine: EngineConfig, folder: Path) -> StoredForm:
    """Return what an engine's blocks are in a store. Raises `CheckpointError` for a folder that it could not open."""
    return profiled_form(engine) if engine.name == "profiled" else _eager_form(engine, folder)


def _eager_form(engine: EngineConfig, folder: Path) -> StoredForm:
    return form_of(engine.kv_format_stored, engine_slab(read_architecture(folder), engine))
