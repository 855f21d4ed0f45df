"""`torch.distributed.checkpoint` with safetensors: a writer, a reader, and a planner for them.

```python
import torch.distributed.checkpoint as dcp
from tonnage.torch.dcp import StorageReader, StorageWriter

dcp.save(state, storage_writer=StorageWriter("out/"))
dcp.load(state, storage_reader=StorageReader("out/"))
```

`HuggingFaceStorageWriter` and `HuggingFaceStorageReader` are the same two under PyTorch's names,
with the arguments of PyTorch's classes and the names of their files.

Needs PyTorch 2.6 or newer.
"""

from ._dcp_load import StorageReader
from ._dcp_save import SavePlanner, StorageWriter
from ._dcp_torch import HuggingFaceStorageReader, HuggingFaceStorageWriter

__all__ = [
    "HuggingFaceStorageReader",
    "HuggingFaceStorageWriter",
    "SavePlanner",
    "StorageReader",
    "StorageWriter",
]
