"""PyTorch's names and arguments over the writer and the reader of `tonnage.torch.dcp`."""

from __future__ import annotations

import os
from collections.abc import Mapping

from ._dcp_load import StorageReader
from ._dcp_save import StorageWriter


class HuggingFaceStorageWriter(StorageWriter):
    """Takes the place of `torch.distributed.checkpoint.HuggingFaceStorageWriter`.

    Its arguments and its files' names are PyTorch's; what is in the files is what `StorageWriter`
    writes, in one pass and with nothing left in a folder `sharded`.

    Args:
        path: the folder.
        fqn_to_index_mapping: in which file each tensor is, from 1 on. Default: all are in one,
            `model-00001-of-00001.safetensors`, which has an index as several have. Where each rank
            keeps its own files it decides nothing.
        thread_count: how many threads write on each rank; for 1, as many as there are to use.
        save_distributed: each rank keeps its part in files of its own, unless
            `enable_consolidation` asks for whole tensors. Without it, whole tensors are written, by
            as many ranks as have some of them.
        enable_consolidation: whole tensors. Each rank writes its bytes of the finished files.
        thread_count_consolidation: nothing is left to do for such threads.
    """

    _numbered = True

    def __init__(
        self,
        path: str | os.PathLike[str],
        fqn_to_index_mapping: Mapping[str, int] | None = None,
        thread_count: int = 1,
        save_distributed: bool = False,
        enable_consolidation: bool = False,
        thread_count_consolidation: int = 1,
    ) -> None:
        own = save_distributed and not enable_consolidation
        super().__init__(
            path,
            "per_rank" if own else "hf",
            fqn_to_index_mapping=None if own else fqn_to_index_mapping,
            threads=thread_count if thread_count > 1 else None,
        )
        # PyTorch's has no largest size of a file.
        self.settings = self.settings._replace(most=None)
        self.fqn_to_index_mapping = fqn_to_index_mapping
        self.save_distributed = save_distributed
        self.enable_consolidation = enable_consolidation
        self.thread_count_consolidation = thread_count_consolidation


class HuggingFaceStorageReader(StorageReader):
    """Takes the place of `torch.distributed.checkpoint.HuggingFaceStorageReader`.

    Args:
        path: the folder.
        thread_count: how many threads read on each rank; for 1, as many as there are to use.
    """

    def __init__(self, path: str | os.PathLike[str], thread_count: int = 1) -> None:
        super().__init__(path, threads=thread_count if thread_count > 1 else None)
        self.thread_count = thread_count
