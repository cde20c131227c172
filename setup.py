"Reads settings.ini, the one source of the package's metadata."
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

root = Path(__file__).parent
ini = ConfigParser(delimiters=['='], interpolation=None)
ini.read(root/'settings.ini', encoding='utf-8')
cfg = ini['DEFAULT']
readme = root/'README.md'

setup(
    name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], keywords=cfg['keywords'],
    author=cfg['author'], license=cfg['license'], python_requires='>=' + cfg['min_python'],
    long_description=readme.read_text(encoding='utf-8') if readme.exists() else '', long_description_content_type='text/markdown',
    packages=find_packages(include=['fastcompress', 'fastcompress.*']),
    install_requires=cfg['requirements'].split(), extras_require={'onnx': cfg['onnx_requirements'].split(), 'executorch': cfg['executorch_requirements'].split(),
                    'dev': ' '.join(cfg[f'{k}_requirements'] for k in ('dev','onnx','executorch')).split()},
    entry_points={'console_scripts': cfg['console_scripts'].split()},
)
