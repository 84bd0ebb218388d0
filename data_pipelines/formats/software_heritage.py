"""Source code by reference: rows name files of the Software Heritage archive, which are downloaded."""

import gzip
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import ClassVar

from data_pipelines.formats.base import Row, register, texts
from doge.common.errors import UserError

DOWNLOADS = 64  # at a time, of a few kilobytes each: latency is all that counts


@register("software-heritage")
@dataclass(frozen=True)
class SoftwareHeritage:
    """Fetches the file that a column names.

    Args:
        blob_column: holds the file's id.
        blob_url: directory with one gzipped file per id.
    """

    blob_column: str = "blob_id"
    blob_url: str = "https://softwareheritage.s3.amazonaws.com/content"
    conversations: ClassVar[bool] = False

    @property
    def columns(self) -> list[str]:
        return [self.blob_column]

    def documents(self, rows: Sequence[Row]) -> list[str]:
        return fetch_blobs(self.blob_url, texts(rows, self.blob_column))


def fetch_blobs(url: str, blob_ids: list[str]) -> list[str]:
    """Download the texts of gzipped files; one that does not exist (404) is empty, as in smollm-corpus' recipe.

    Raises:
        UserError: the server cannot be reached after five attempts.
    """
    import requests
    from urllib3.util.retry import Retry

    retry = Retry(total=5, backoff_factor=0.5, status_forcelist=(429, 500, 502, 503, 504), raise_on_status=False)
    adapter = requests.adapters.HTTPAdapter(pool_maxsize=DOWNLOADS, max_retries=retry)
    with requests.Session() as session, ThreadPoolExecutor(DOWNLOADS) as pool:
        session.mount("http://", adapter)
        session.mount("https://", adapter)

        def fetch(blob_id: str) -> str:
            if not blob_id:
                return ""
            response = session.get(f"{url.rstrip('/')}/{blob_id}", timeout=60)
            if response.status_code == 404:
                return ""
            response.raise_for_status()
            content = response.content
            if content[:2] == b"\x1f\x8b":  # not yet unpacked on the way
                content = gzip.decompress(content)
            return content.decode("utf-8", errors="ignore")

        try:
            return list(pool.map(fetch, blob_ids))
        except (requests.RequestException, OSError, EOFError) as error:
            pool.shutdown(cancel_futures=True)
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"Blobs cannot be fetched from {url} ({reason}): check the connection, or point the source's path at "
                "files that hold the text and set its format to text."
            ) from error
