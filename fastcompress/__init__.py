"Make a trained fastai model small and fast and put it on a phone."
from importlib.metadata import version as _version
__version__ = _version('fastcompress')
