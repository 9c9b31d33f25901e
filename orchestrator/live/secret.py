"""Where secrets of a cluster file really are: in the file itself, in the environment (`env:NAME`) or in a file (`file:PATH`).

Each process of the cluster looks on its own host, so that a secret that is only named in the cluster file is never sent anywhere:
not to a ConfigMap, a command line, a log, or Ray's tables.
"""

import os
import secrets
from dataclasses import replace
from pathlib import Path

from orchestrator.core.config import ClusterConfig, ConfigError
from orchestrator.wire.buckets import kept_secret, open_bucket

ENVIRONMENT = "env:"
FILE = "file:"
#: A file that is longer holds no secret.
_BYTES_MAX = 1 << 16


def is_named(text: str) -> bool:
    """Return whether a text of the cluster file says where a secret is, instead of being it."""
    return text.startswith((ENVIRONMENT, FILE))


def reveal(text: str, where: str) -> str:
    """Return the secret that a text of the cluster file is or names; line ends around that of a file are none of it.

    Args:
        text: the value of the field.
        where: the field, such as `cluster.secret`.

    Raises:
        ConfigError: it is not to be found, or empty; the message does not contain it.
    """
    if text.startswith(ENVIRONMENT):
        found = os.environ.get(text.removeprefix(ENVIRONMENT), "")
    elif text.startswith(FILE):
        found = _content(Path(text.removeprefix(FILE)), where).strip("\r\n")
    else:
        return text
    if not found:
        raise ConfigError(where, f"{text} is {'not set' if text.startswith(ENVIRONMENT) else 'empty'} on this host")
    return found


def with_secrets(config: ClusterConfig) -> ClusterConfig:
    """Return a configuration with what its secrets name in their places. Raises `ConfigError`."""
    secret = reveal(config.cluster.secret, "cluster.secret")
    tenants = tuple(
        replace(tenant, keys=tuple(reveal(key, f"tenants[{number}].keys[{index}]") for index, key in enumerate(tenant.keys)))
        for number, tenant in enumerate(config.tenants)
    )
    metrics_key = reveal(config.gateway.metrics_key, "gateway.metrics_key")
    gateway = replace(config.gateway, metrics_key=metrics_key)
    return replace(config, cluster=replace(config.cluster, secret=secret), gateway=gateway, tenants=tenants)


def drawn_secret(config: ClusterConfig) -> str:
    """Return the secret of a cluster whose file says none: a random one, or that which was drawn once and lies beside its blocks.

    Blocks are called otherwise with another secret, so one that is forgotten makes all that is kept in `cmx` useless. May take
    as long as a bucket does not answer. Raises `ConfigError` if `store.cmx` cannot be used.
    """
    drawn = secrets.token_hex(32)
    url = config.store.cmx if config.store is not None else ""
    return kept_secret(open_bucket(url, "store.cmx"), drawn, "store.cmx") if url else drawn


def _content(path: Path, where: str) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(_BYTES_MAX + 1)
    except OSError as error:
        raise ConfigError(where, f"{FILE}{path}: {error.strerror}") from None
    if len(content) > _BYTES_MAX:
        raise ConfigError(where, f"{FILE}{path}: more than {_BYTES_MAX} bytes are no secret")
    try:
        return content.decode()
    except UnicodeDecodeError:
        raise ConfigError(where, f"{FILE}{path}: is not UTF-8 text") from None
