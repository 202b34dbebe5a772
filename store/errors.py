"""What a user or a file can get wrong. The command line prints these as one line and exits with 2."""


class Refused(Exception):
    """Bad input: the message names the place, both values and the next step."""


class Damaged(Refused):
    """A cache whose bytes are not those that were published."""


def damaged(cache: object, place: str, what: str) -> Damaged:
    """An object of a cache that is not what was published."""
    return Damaged(
        f"damaged cache: {cache}/{place}: {what}; `readcache repair` with the options that extracted it mends it, "
        f"or remove {cache} and extract again"
    )
