"""What a model writes, on its way to a terminal.

A model may write what a terminal would obey: an escape sequence moves the cursor, changes the
window's title or, in some, types. So a terminal gets the sign for a control character (␛) in its
place. A pipe or a file gets the text as it is, because what reads there wants what was written.
"""

import sys

_SIGNS = {code: 0x2400 + code for code in range(0x20)}
_SIGNS |= {0x7F: 0x2421, **dict.fromkeys(range(0x80, 0xA0), 0xFFFD)}
_KEPT = "\n\t"
_SHOWN = {code: sign for code, sign in _SIGNS.items() if chr(code) not in _KEPT}


def write(text: str) -> None:
    """Show a model's text at once, control characters as signs where a terminal would obey them."""
    print(text.translate(_SHOWN) if sys.stdout.isatty() else text, end="", flush=True)
