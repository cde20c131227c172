"""Write README.md from nbs/index.ipynb, or with --check say whether it is in sync.

Markdown cells as they are, code cells as Python blocks with their text output below, hidden cells left out.

    python tools/readme.py [--check]
"""
import json, re, sys
from pathlib import Path

root = Path(__file__).resolve().parent.parent
note = '<!-- Written by tools/readme.py from nbs/index.ipynb. Edit the notebook. -->\n\n'


def outputs(cell):
    "Plain text that a code cell printed or returned"
    for o in cell['outputs']:
        text = o.get('text') or o.get('data', {}).get('text/plain')
        if text: yield f"```\n{''.join(text).rstrip()}\n```"


def blocks(nb):
    "The README's blocks, one after the other"
    for c in nb['cells']:
        lines = ''.join(c['source']).splitlines()
        flags = [l for l in lines if l.startswith('#|')]
        if '#| hide' in flags: continue
        source = '\n'.join(l for l in lines if l not in flags).strip()
        if c['cell_type'] == 'markdown': yield re.sub(r'\]\(images/', '](nbs/images/', source)
        else:
            yield f'```python\n{source}\n```'
            yield from outputs(c)


def main():
    text = note + '\n\n'.join(blocks(json.loads((root/'nbs/index.ipynb').read_text(encoding='utf-8')))) + '\n'
    readme = root/'README.md'
    if '--check' not in sys.argv: readme.write_text(text, encoding='utf-8')
    elif not readme.exists() or readme.read_text(encoding='utf-8') != text: sys.exit('README.md differs from nbs/index.ipynb: run python tools/readme.py')


if __name__ == '__main__': main()
