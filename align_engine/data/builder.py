"""Files behind the cache of `datasets`.

The builders stand alone, and open no file here: `datasets` replaces `open` and `Path` in their module by ones that read
a chain of URLs into a name with `::`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.builder import Key
from datasets.table import table_cast

from align_engine.data.json_lines import array, columns, parts
from align_engine.errors import BadInput

PART = 1000  # rows held at a time


class Files(datasets.ArrowBasedBuilder):
    """Rows of files of one type."""

    VERSION = datasets.Version("1.0.0")  # of the cached rows: another one where they would come out differently
    BUILDER_CONFIG_CLASS = datasets.BuilderConfig

    def _info(self) -> datasets.DatasetInfo:
        return datasets.DatasetInfo()

    def _split_generators(self, dl_manager: Any) -> list[datasets.SplitGenerator]:
        named: Any = (
            self.config.data_files
        )  # local ones as they are: a download would read variables into a `$` of a name
        found = {
            name: [file if os.path.isfile(file) else dl_manager.download_and_extract(file) for file in files]
            for name, files in named.items()
        }
        self.info.features = self.features([file for files in found.values() for file in files])
        return [datasets.SplitGenerator(name=name, gen_kwargs={"files": files}) for name, files in found.items()]

    def _generate_tables(self, files: list[str]) -> Iterator[tuple[Key, pa.Table]]:
        features = self.info.features or datasets.Features()
        for i, file in enumerate(files):
            for j, table in enumerate(self.tables(file, features.arrow_schema)):
                yield Key(i, j), table

    @staticmethod
    def features(files: list[str]) -> datasets.Features:
        """The columns of all files."""
        raise NotImplementedError

    @staticmethod
    def tables(file: str, schema: pa.Schema) -> Iterator[pa.Table]:
        """The rows of a file, some at a time."""
        raise NotImplementedError

    @staticmethod
    def count(file: str) -> int:
        """How many rows a file has."""
        raise NotImplementedError


class JsonLines(Files):
    """Files with an object per line, or with one list of objects."""

    @staticmethod
    def features(files: list[str]) -> datasets.Features:
        return columns(files)

    @staticmethod
    def tables(file: str, schema: pa.Schema) -> Iterator[pa.Table]:
        for rows in parts(file):
            arrays = [array([row.get(column.name) for row in rows], column.type) for column in schema]
            yield pa.Table.from_arrays(arrays, schema=schema)

    @staticmethod
    def count(file: str) -> int:
        return sum(map(len, parts(file)))


class Parquet(Files):
    """Parquet files, with the columns of the first."""

    @staticmethod
    def features(files: list[str]) -> datasets.Features:
        found, rows = [], 0
        for file in files:
            try:
                opened = pq.ParquetFile(file)
                rows += opened.metadata.num_rows
                found.append(datasets.Features.from_arrow_schema(opened.schema_arrow))
            except pa.ArrowException as error:
                raise BadInput(f"'{file}' cannot be read: it is no whole Parquet file ({error})") from error
            if set(found[-1]) != set(found[0]):
                here, there = sorted(found[-1]), sorted(found[0])
                raise BadInput(f"'{file}' has the columns {here}, but '{files[0]}' has {there}")
        if not rows:
            raise BadInput(f"'{files[0]}' has no rows")
        return found[0]

    @staticmethod
    def tables(file: str, schema: pa.Schema) -> Iterator[pa.Table]:
        for batch in pq.ParquetFile(file).iter_batches(PART):
            yield table_cast(pa.Table.from_batches([batch]).select(schema.names), schema)

    @staticmethod
    def count(file: str) -> int:
        return pq.ParquetFile(file).metadata.num_rows
