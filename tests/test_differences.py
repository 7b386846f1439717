"""That a difference between versions is mended where it is, and nothing else is touched."""

from __future__ import annotations

import copy
import subprocess
import sys
import types

import pytest

from molmo2_nemo import differences


def test_what_was_imported_before_is_mended_with_its_copies(monkeypatch):
    """`from module import name` in another module, before this package was there."""
    origin, user = types.ModuleType("megatron.made_origin"), types.ModuleType("megatron.made_user")
    origin.__spec__ = types.SimpleNamespace(loader=None)
    origin.name = user.taken = old = object()
    monkeypatch.setitem(sys.modules, "megatron.made_origin", origin)
    monkeypatch.setitem(sys.modules, "megatron.made_user", user)
    made = differences.Difference("megatron.made_origin", "0.1", "", lambda module: setattr(module, "name", 5))
    monkeypatch.setattr(differences, "DIFFERENCES", (made,))
    differences.install()
    assert (origin.name, user.taken) == (5, 5) and old != 5


def test_a_second_copy_of_the_package_takes_the_firsts_place():
    import importlib.util

    spec = importlib.util.spec_from_file_location("differences_again", differences.__file__)
    again = importlib.util.module_from_spec(spec)
    sys.modules["differences_again"] = again
    spec.loader.exec_module(again)
    again.install()
    finders = [finder for finder in sys.meta_path if hasattr(finder, "mends_megatron")]
    assert len(finders) == 1 and isinstance(finders[0], again._Finder)
    differences.install()
    assert isinstance(copy.copy(differences._Mending(None, print)), differences._Mending)
    assert importlib.util.find_spec("megatron.core.parallel_state") is not None
    del sys.modules["differences_again"]


SCRIPT = """
import molmo2_nemo, sys
from molmo2_nemo import compat, differences
assert "torch" not in sys.modules
from molmo2_nemo import cpu
cpu.enable(1)
import megatron.core.dist_checkpointing
for difference in differences.DIFFERENCES:
    if difference.module in sys.modules and difference.is_here():
        assert isinstance(sys.modules[difference.module].__spec__.loader, differences._Mending), difference.module
from molmo2_nemo.nemo.start import start_nemo
start_nemo()
from nemo.collections import llm
from nemo.collections.common.tokenizers.null_tokenizer import MegatronTokenizer
from nemo.lightning.io.pl import get_default_save_sharded_strategy
from nemo.utils.callbacks import dist_ckpt_io
from megatron.core import parallel_state
assert dist_ckpt_io.HAVE_MEGATRON_CORE and dist_ckpt_io.AsyncCallsQueue
assert get_default_save_sharded_strategy("torch_dist", 1) is not None
assert callable(parallel_state.get_data_modulo_expert_parallel_group)
assert issubclass(MegatronTokenizer, differences._Gone) == compat.core_at_least("0.17")
loaders = {name: getattr(getattr(m, "__spec__", None), "loader", None) for name, m in sys.modules.items()}
mended = {name for name, loader in loaders.items() if isinstance(loader, differences._Mending)}
assert mended <= {d.module for d in differences.DIFFERENCES if d.is_here()}, mended
print(*sorted(mended))
"""


def test_differences_of_this_megatron_core_are_mended_and_no_others():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    here = {difference.module for difference in differences.DIFFERENCES if difference.is_here()}
    assert set(done.stdout.split()[-len(here) :]) == here


def test_a_class_that_is_gone_can_be_named_but_not_made(monkeypatch):
    module = types.ModuleType("made")
    differences._gone("Something")(module)
    with pytest.raises(RuntimeError, match="Something is not in Megatron-core"):
        module.Something()
    module.Other = int
    differences._gone("Other")(module)
    assert module.Other is int


def test_a_module_keeps_its_own_loader(tmp_path, monkeypatch):
    """Source lines for tracebacks, and a name that is put right once the module is there."""
    (tmp_path / "made_module.py").write_text("x = 1\ndef f():\n    raise ValueError(x)\n")
    made = differences.Difference("made_module", "0.1", "", lambda module: setattr(module, "x", 2))
    monkeypatch.setitem(differences._BY_MODULE, "made_module", made)
    monkeypatch.syspath_prepend(tmp_path)
    import inspect

    import made_module

    assert made_module.x == 2 and "raise ValueError(x)" in inspect.getsource(made_module.f)
    del sys.modules["made_module"]
