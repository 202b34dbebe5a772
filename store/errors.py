"""What a user or a file can get wrong. The command line prints these as one line and exits with 2."""


class Refused(Exception):
    """Bad input: the message names the place, both values and the next step."""


class Damaged(Refused):
    """A cache whose bytes are not those that were published."""
