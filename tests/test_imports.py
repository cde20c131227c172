"The mathematics is usable without fastai, and a star import brings nothing over fastai's own names"
import importlib.util, pkgutil, subprocess, sys
import pytest
import fastcompress

ROOMS = 'prune', 'quantize', 'deploy', 'measure'


def modules(room):
    spec = importlib.util.find_spec(f'fastcompress.{room}')
    return [f'fastcompress.{room}'] + [f'fastcompress.{room}.{m.name}' for m in pkgutil.iter_modules(spec.submodule_search_locations)]


def run(code): return subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True)


@pytest.mark.parametrize('room', ROOMS)
def test_room_does_not_import_fastai(room):
    names = modules(room)
    assert len(names) > 3
    r = run(f"import sys, {', '.join(names)}\nprint(sorted(m for m in sys.modules if m.split('.')[0] in ('fastai', 'fastcompress.callback', 'torchao', 'torch_pruning')))")
    assert r.returncode == 0, r.stderr
    assert r.stdout.strip() == '[]'


def test_nothing_rests_on_torch_ao():
    "torch itself loads parts of torch.ao; none of our own files may name it"
    from pathlib import Path
    root = Path(fastcompress.__file__).parent
    found = [p.name for p in root.rglob('*.py') if 'torch.ao' in p.read_text(encoding='utf-8')]
    assert found == []


def test_star_import_leaves_fastai_names_alone():
    r = run("from fastai.vision.all import *\nbefore = dict(globals())\nexec('from fastcompress.all import *')\n"
            "print([k for k,v in before.items() if globals()[k] is not v], 'SparsifyCallback' in globals(), 'export_mobile' in globals())")
    assert r.stdout.strip() == '[] True True', r.stdout + r.stderr


def test_version_has_one_source():
    from configparser import ConfigParser
    from pathlib import Path
    ini = ConfigParser(delimiters=['='])
    ini.read(Path(__file__).parent.parent/'settings.ini')
    assert fastcompress.__version__ == ini['DEFAULT']['version']
