"""The s3 backend on a real S3 server on loopback: SeaweedFS, beside obstore's own calls."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import SecretStr

from lmcache_backend_s3 import S3Config
from lmcache_backends.fsspec_store.rig import BUCKET, make_ready, obstore_baseline
from lmcache_backends.fsspec_store.seaweed import seaweed
from lmcache_core.testing.rig import Medium, Rig


class S3Rig(Rig):
    """`s3://` on SeaweedFS."""

    @contextmanager
    def start(self, directory: Path) -> Iterator[Medium]:
        with seaweed(directory) as server:
            make_ready(server)
            config = S3Config(
                url=f"s3://{BUCKET}/s3",
                endpoint=server.endpoint,
                region=server.region,
                access_key_id=SecretStr(server.access_key_id),
                secret_access_key=SecretStr(server.secret_access_key),
                allow_http=True,
            )
            yield Medium(config, obstore_baseline(server))
