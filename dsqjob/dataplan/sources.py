"""Reads regions of a release's shards, with few open files and no more memory than asked for."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dsqjob.dataplan.plan import Region
from dsqjob.errors import DataError
from dsqjob.formats import FormatError

_OPEN_FILES = 32
_SCATTER_WIDTH = 1024
"""Rows at least this wide are read one by one where they are apart; narrower ones together with what lies between."""


class Sources:
    """The files of one folder, opened when first read. A few threads may read at once."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._open: OrderedDict[str, int] = OrderedDict()
        self._opening = threading.Lock()

    def __enter__(self) -> Sources:
        return self

    def __exit__(self, *_: object) -> None:
        while self._open:
            os.close(self._open.popitem()[1])

    def descriptor(self, file: str) -> int:
        """An open file descriptor, valid until 32 other files were asked for."""
        with self._opening:
            if file in self._open:
                self._open.move_to_end(file)
            else:
                self._open[file] = os.open(self._root / file, os.O_RDONLY | os.O_CLOEXEC)
                if len(self._open) > _OPEN_FILES:
                    os.close(self._open.popitem(last=False)[1])
            return self._open[file]

    def read(self, region: Region) -> NDArray[np.uint8]:
        """All bytes of a region, [rows, width]. DataError ``shard-truncated``."""
        out = np.empty((region.rows, region.width), np.uint8)
        self.read_into(region, out)
        return out

    def read_into(self, region: Region, out: NDArray[np.uint8]) -> None:
        """Fill ``out`` [rows, width] (C-contiguous)."""
        fd = self.descriptor(region.file)
        if region.contiguous:
            self._fill(fd, out.data.cast("B") if out.size else memoryview(b""), region.offset, region)
        elif region.width >= _SCATTER_WIDTH:
            for row in range(region.rows):
                self._fill(fd, out[row].data, region.offset + row * region.pitch, region)
        else:
            wide = np.empty((region.rows - 1) * region.pitch + region.width, np.uint8)
            self._fill(fd, wide.data, region.offset, region)
            for row in range(region.rows):
                out[row] = wide[row * region.pitch : row * region.pitch + region.width]

    def chunks(self, region: Region, chunk_bytes: int, *, multiple: int = 1) -> Iterator[tuple[int, Region]]:
        """(first row, region) pieces of whole rows of at most ``chunk_bytes`` read, but at least ``multiple`` rows;
        every piece but the last has a multiple of ``multiple`` rows."""
        step = max(chunk_bytes // max(1, region.pitch) // multiple, 1) * multiple
        for start in range(0, region.rows, step):
            stop = min(start + step, region.rows)
            yield start, region._replace(offset=region.offset + start * region.pitch, rows=stop - start)

    def place(self, region: Region) -> str:
        """File and tensor of a region, for errors."""
        return f"{self._root / region.file}: {region.tensor}"

    @contextmanager
    def blaming(self, region: Region) -> Iterator[None]:
        """Turns a FormatError into a DataError that names file and tensor."""
        try:
            yield
        except FormatError as error:
            raise DataError(
                error.id,
                str(error),
                where=self.place(region),
                way_out="download this shard again; if it stays so, the release is damaged at its source",
            ) from None

    def _fill(self, fd: int, view: memoryview, offset: int, region: Region) -> None:
        while view:
            count = os.preadv(fd, [view], offset)
            if count == 0:
                raise DataError(
                    "shard-truncated",
                    f"the file ends at byte {offset}",
                    where=self.place(region),
                    way_out="the shard changed since it was planned: download it again",
                )
            view, offset = view[count:], offset + count
