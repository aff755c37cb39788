"""Modules that programs find loaded: the usual ones, and those with libraries of the system.

The first save time, as every program begins with a fork of what is here. The second could not be
loaded later: the jail has the standard library, and none of the system's libraries behind it.
"""

import builtins
from _sitebuiltins import Quitter
from contextlib import suppress
from importlib import import_module

_USUAL = """
abc array bisect calendar cmath collections.abc contextlib copy csv dataclasses datetime decimal
enum fractions functools heapq inspect io itertools json math numbers operator pprint queue random
re statistics string textwrap threading time traceback types typing unicodedata uuid
"""
_WITH_LIBRARIES = """
_blake2 _bz2 _ctypes _decimal _elementtree _hashlib _lzma _sqlite3 _ssl bz2 ctypes hashlib lzma
pyexpat sqlite3 xml.etree.ElementTree zlib encodings.idna encodings.latin_1
"""


def load() -> None:
    """Import them; a module that this Python was built without is missing for programs too.

    `exit` and `quit` are made by the module `site`, which the jail does without.
    """
    for name in (_USUAL + _WITH_LIBRARIES).split():
        with suppress(ImportError):
            import_module(name)
    for name in ("exit", "quit"):
        setattr(builtins, name, Quitter(name, "end-of-file"))
