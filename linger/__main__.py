"""``python -m linger``."""

from linger.cli import app

app(prog_name="linger")
