"""The interop room: models of other codebases in, ours out. Hugging Face's folders are what everyone reads."""

from gptjax.interop.families import FAMILIES, Family, Fields, family, family_for

__all__ = ['FAMILIES', 'Family', 'Fields', 'family', 'family_for']
