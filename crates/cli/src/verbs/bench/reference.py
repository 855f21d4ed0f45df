# Loads with the reference package, on demand: a line of JSON in, a line of JSON out.
# Started by `tonnage bench`, which says which tensors of which files go where.
import json
import sys
import time

out = sys.stdout
sys.stdout = sys.stderr  # what packages print is no answer


def answer(**fields):
    out.write(json.dumps(fields) + "\n")
    out.flush()


try:
    import numpy
    import safetensors
except ImportError as error:
    answer(failed=str(error))
    sys.exit()
try:
    import torch

    framework, version = "pt", "torch " + torch.__version__
except ImportError:
    torch = None
    framework, version = "numpy", "numpy " + numpy.__version__
python = ".".join(map(str, sys.version_info[:2]))
words = f"safetensors {safetensors.__version__}, {version}, Python {python}"
cuda = torch.cuda.is_available() if torch else False
answer(reference=words, cuda=cuda)


def total(tensor):
    """Reads every byte once."""
    if torch:
        tensor = tensor.reshape(-1).view(torch.uint8).numpy()
    raw = tensor.reshape(-1).view(numpy.uint8)
    skip = -raw.ctypes.data % 8
    words = raw[skip : skip + (raw.size - skip) // 8 * 8] if raw.size >= skip else raw[:0]
    return int(words.view(numpy.uint64).sum(dtype=numpy.uint64))


def load(files, device):
    tensors = {}
    for path, names in files:
        with safetensors.safe_open(path, framework=framework, device=device) as file:
            for name in names:
                tensors[name] = file.get_tensor(name)
    if device == "cpu":
        return tensors, sum(total(tensor) for tensor in tensors.values())
    torch.cuda.synchronize(device)
    return tensors, 0


for line in sys.stdin:
    request = json.loads(line)
    try:
        start = time.perf_counter()
        kept = load(request["files"], request["device"])
        seconds = time.perf_counter() - start
        del kept
        answer(seconds=seconds)
    except Exception as error:
        answer(failed=f"{type(error).__name__}: {error}")
