"""Opens the place that outlives a cluster's processes: a folder or an S3 bucket, named by a URL.

`cmx` keeps blocks there (`workers/store/cmx.py`), and a cluster without a secret of its own the one that was drawn for it, since
what blocks are called depends on it. Credentials of a bucket come from the environment (`AWS_ACCESS_KEY_ID`, `AWS_ENDPOINT_URL`
and so on), never from the cluster file.
"""

import os
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from urllib.parse import unquote, urlsplit

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import LocalStore, S3Store

from orchestrator.core.config import ConfigError

Bucket = LocalStore | S3Store
#: Where a cluster's drawn secret lies, and the most bytes that are believed to be one.
SECRET_PATH = "secret"
_SECRET_BYTES_MAX = 4096


@dataclass(frozen=True, slots=True)
class BucketLimits:
    """Bounds of one call to a bucket; a folder answers or fails by itself."""

    #: Seconds until a connection stands, and until a request is answered whole.
    connect_s_max: float = 2.0
    request_s_max: float = 20.0
    #: Times that a request is repeated, and seconds after which it is not any more.
    retries_max: int = 2
    retry_s_max: float = 10.0


def open_bucket(url: str, where: str, limits: BucketLimits | None = None) -> Bucket:
    """Return the folder (made if it is not there) or the bucket at a URL; a bucket is not asked for anything yet.

    Raises:
        ConfigError: for a URL that names neither, or a folder that cannot be made; `where` is the field it stands in.
    """
    bounds = limits or BucketLimits()
    parts = urlsplit(url)
    if parts.query or parts.fragment:
        raise ConfigError(where, f"{url}: has more than a path behind the bucket")
    match parts.scheme:
        case "file":
            folder = Path(unquote(parts.path))
            if parts.netloc or not folder.is_absolute():
                raise ConfigError(where, f"{url}: must be file:// and an absolute path")
            return _open_folder(folder, where)
        case "s3":
            if not parts.netloc:
                raise ConfigError(where, f"{url}: names no bucket")
            try:
                return _open_s3(parts.netloc, parts.path.strip("/"), bounds)
            except BaseError as error:
                raise ConfigError(where, f"{url}: {first_line(error)}") from None
        case _:
            raise ConfigError(where, f"must be file:///path or s3://bucket/prefix, is {url!r}")


def _open_folder(folder: Path, where: str) -> LocalStore:
    try:
        # What stands in there is tenants' context.
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(where, f"{folder}: {error.strerror}") from None
    return LocalStore(folder)


def _open_s3(bucket: str, prefix: str, limits: BucketLimits) -> S3Store:
    return S3Store(
        bucket,
        prefix=prefix or None,
        client_options={
            # What is given here goes before all that the environment says of connections.
            "allow_http": os.environ.get("AWS_ALLOW_HTTP", "").lower() in ("1", "true"),
            "connect_timeout": timedelta(seconds=limits.connect_s_max),
            "timeout": timedelta(seconds=limits.request_s_max),
        },
        retry_config={"max_retries": limits.retries_max, "retry_timeout": timedelta(seconds=limits.retry_s_max)},
    )


def first_line(error: Exception) -> str:
    """Return what a bucket's error says, without the tree of causes below it."""
    return str(error).partition("\n")[0][:500]


def kept_secret(bucket: Bucket, drawn: str, where: str) -> str:
    """Return the secret that lies in a bucket; if there is none yet, keep `drawn` there, unless another cluster is faster.

    Raises:
        ConfigError: the bucket cannot be read or written, or what lies there is no secret; `where` is the field that names it.
    """
    try:
        try:
            obstore.put(bucket, SECRET_PATH, drawn.encode(), mode="create")
            return drawn
        except AlreadyExistsError:
            found = obstore.get(bucket, SECRET_PATH).bytes().to_bytes()
    except (BaseError, OSError) as error:
        raise ConfigError(where, f"the cluster's secret cannot be kept there: {first_line(error)}") from None
    if not found or len(found) > _SECRET_BYTES_MAX or not found.isascii():
        raise ConfigError(where, f"{SECRET_PATH} in there holds no secret; remove it and all the rest, or name cluster.secret")
    return found.decode()
