"""Output of a model for a terminal, with control characters replaced.

A model may write escape sequences that a terminal executes: they move the cursor, change the
window's title or, in some terminals, type. On a terminal each control character is therefore shown
as a symbol (␛). A pipe or a file gets the text unchanged.
"""

import sys

_SIGNS = {code: 0x2400 + code for code in range(0x20)}
_SIGNS |= {0x7F: 0x2421, **dict.fromkeys(range(0x80, 0xA0), 0xFFFD)}
_KEPT = "\n\t"
_SHOWN = {code: sign for code, sign in _SIGNS.items() if chr(code) not in _KEPT}


def write(text: str) -> None:
    """Show a model's text at once, control characters as signs where a terminal would obey them."""
    print(text.translate(_SHOWN) if sys.stdout.isatty() else text, end="", flush=True)
