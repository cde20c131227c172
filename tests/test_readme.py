"The README is the front page notebook, its code runs, its links and commands exist"
import json, re, subprocess, sys
from pathlib import Path

root = Path(__file__).parent.parent
readme = (root/'README.md').read_text(encoding='utf-8')


def test_in_sync():
    r = subprocess.run([sys.executable, root/'tools'/'readme.py', '--check'], capture_output=True, text=True)
    assert r.returncode==0, r.stderr


def test_every_code_block_runs(tmp_path, monkeypatch):
    "All Python blocks, one after the other, in one namespace and an empty folder"
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r'```python\n(.*?)```', readme, re.S)
    assert len(blocks)>=3 and 'SparsifyCallback' in blocks[0]
    space = {}
    for b in blocks: exec(compile(b, 'README.md', 'exec'), space)
    assert space['report'].max_steps<=1 and (tmp_path/'phone'/'model.ptl').exists()


def test_first_block_is_about_ten_lines():
    block = re.search(r'```python\n(.*?)```', readme, re.S)[1]
    assert len([l for l in block.splitlines() if l.strip()])<=11


def test_links_exist():
    for link in re.findall(r'\]\(([^)#]+)\)', readme) + re.findall(r'`((?:nbs|docs)/[^`]+|CONTRIBUTING\.md)`', readme):
        assert link.startswith('http') or (root/link).exists(), link


def test_make_targets_exist():
    makefile = (root/'Makefile').read_text()
    for t in set(re.findall(r'^    make (\w+)', readme, re.M)): assert re.search(rf'^{t}:', makefile, re.M), t
