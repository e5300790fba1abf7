"""Tables as text."""

from rich.console import Console
from rich.table import Table


def text_of(table: Table, width: int) -> str:
    """The table as it is printed, names as they are: brackets and colons in them are no markup."""
    console = Console(width=width, no_color=True, markup=False, emoji=False)
    with console.capture() as capture:
        console.print(table)
    return capture.get()
