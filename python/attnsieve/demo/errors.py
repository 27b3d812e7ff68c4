"""The one exception that the demo prints as a line."""


class DemoError(Exception):
    """Something the user can put right; the message is one line that says what."""
