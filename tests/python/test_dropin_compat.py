"""`as_safetensors`: Tonnage under the reference's name. Each claim in a process of its own."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest


def run(code: str, *, without_reference: bool = False) -> str:
    hide = """
        import sys, importlib.machinery, importlib.metadata
        real = importlib.machinery.PathFinder.find_spec
        def find_spec(name, path=None, target=None):
            return None if name.partition(".")[0] == "safetensors" else real(name, path, target)
        importlib.machinery.PathFinder.find_spec = find_spec
        real_find = importlib.metadata.MetadataPathFinder.find_distributions
        def find_distributions(context=importlib.metadata.DistributionFinder.Context()):
            found = real_find(context)
            return [d for d in found if d.metadata["Name"] != "safetensors"]
        importlib.metadata.MetadataPathFinder.find_distributions = find_distributions
    """
    parts = [textwrap.dedent(hide)] if without_reference else []
    script = "\n".join([*parts, textwrap.dedent(code)])
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("without_reference", [False, True])
def test_every_name_is_ours_and_comes_back(without_reference: bool) -> None:
    code = """
        import sys, tonnage
        import tonnage.numpy
        with tonnage.as_safetensors():
            import safetensors, safetensors.numpy, safetensors._safetensors_rust as rust
            from safetensors.torch import save_file, load_file, _find_shared_tensors
            from safetensors import safe_open, SafetensorError
            assert issubclass(safe_open, tonnage.safe_open)
            assert SafetensorError is rust.SafetensorError is tonnage.SafetensorError
            assert safetensors.__version__ == rust.__version__ == "0.8.0"
            assert safetensors.numpy.save is tonnage.numpy.save
            assert safetensors.numpy.__name__ == "safetensors.numpy"
        assert tonnage.__name__ == "tonnage" and tonnage.__version__ != "0.8.0"
        assert tonnage.numpy.__name__ == "tonnage.numpy"
        assert not [m for m in sys.modules if m.startswith("safetensors")]
        try:
            import safetensors
            print(issubclass(safetensors.safe_open, tonnage.safe_open))
        except ImportError:
            print("gone")
    """
    expected = "gone" if without_reference else "False"
    assert run(code, without_reference=without_reference) == expected


def test_a_reference_imported_before_is_replaced_and_put_back() -> None:
    code = """
        import sys
        import safetensors, safetensors.numpy, safetensors.torch as before
        import tonnage
        theirs = {name: sys.modules[name] for name in sys.modules if name.startswith("safetensors")}
        place = tonnage.as_safetensors()
        import safetensors.torch
        assert sys.modules["safetensors.torch"].load_file is sys.modules["tonnage.torch"].load_file
        assert safetensors.torch is sys.modules["safetensors.torch"]
        place.undo()
        place.undo()
        ours = {name: sys.modules[name] for name in sys.modules if name.startswith("safetensors")}
        assert ours == theirs
        import safetensors.torch
        print(safetensors.torch.load_file is before.load_file)
    """
    assert run(code) == "True"


def test_nested_uses_come_off_like_an_onion() -> None:
    code = """
        import sys, tonnage
        with tonnage.as_safetensors():
            with tonnage.as_safetensors():
                import safetensors.numpy
                assert issubclass(safetensors.safe_open, tonnage.safe_open)
            import safetensors.numpy
            assert issubclass(safetensors.safe_open, tonnage.safe_open)
        import safetensors
        print(issubclass(safetensors.safe_open, tonnage.safe_open))
    """
    assert run(code) == "False"


def test_no_framework_is_imported_before_its_module_is() -> None:
    code = """
        import sys, tonnage
        tonnage.as_safetensors()
        import safetensors
        print(sorted({"numpy", "torch", "jax"} & set(sys.modules)))
        import safetensors.numpy
        print(sorted({"numpy", "torch", "jax"} & set(sys.modules)))
    """
    assert run(code).split("\n") == ["[]", "['numpy']"]


@pytest.mark.parametrize("without_reference", [False, True])
def test_the_distribution_has_a_version(without_reference: bool) -> None:
    code = """
        import importlib.metadata, importlib.util
        import tonnage
        with tonnage.as_safetensors():
            assert importlib.util.find_spec("safetensors") is not None
            assert importlib.metadata.metadata("safetensors")["Name"] == "safetensors"
            print(importlib.metadata.version("safetensors"))
    """
    assert run(code, without_reference=without_reference) == "0.8.0"


def test_torch_load_runs_on_tonnage() -> None:
    code = """
        import os, tempfile, torch, tonnage, tonnage.torch
        tonnage.as_safetensors()
        path = os.path.join(tempfile.mkdtemp(), "x.safetensors")
        tonnage.torch.save_file({"a": torch.arange(3)}, path)
        calls = []
        import safetensors.torch
        real = safetensors.torch.load_file
        safetensors.torch.load_file = lambda *a, **k: calls.append(1) or real(*a, **k)
        print(torch.load(path)["a"].tolist(), calls)
    """
    assert run(code) == "[0, 1, 2] [1]"


@pytest.mark.parametrize("without_reference", [False, True])
def test_libraries_that_check_for_the_package_find_it(without_reference: bool) -> None:
    code = """
        import tonnage
        tonnage.as_safetensors()
        import tempfile
        import transformers, huggingface_hub
        from transformers import BertConfig, BertModel
        config = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                            intermediate_size=16, vocab_size=32)
        model = BertModel(config)
        folder = tempfile.mkdtemp()
        model.save_pretrained(folder)
        again = BertModel.from_pretrained(folder)
        same = all((a == b).all() for a, b in zip(model.state_dict().values(),
                                                  again.state_dict().values()))
        import safetensors
        print(same, issubclass(safetensors.safe_open, tonnage.safe_open))
    """
    assert run(code, without_reference=without_reference).endswith("True True")


def test_errors_pickle_across_the_two_names() -> None:
    code = """
        import pickle, tonnage
        with tonnage.as_safetensors():
            import safetensors
            data = pickle.dumps(safetensors.SafetensorError("x"))
        print(type(pickle.loads(data)) is tonnage.SafetensorError)
    """
    assert run(code) == "True"
