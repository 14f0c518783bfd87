"""Text for error messages and tables."""


def one_line(text: object, limit: int = 160) -> str:
    """Shorten a text to one printable line."""
    line = " ".join(str(text).split())
    line = "".join(c if c.isprintable() else "?" for c in line)
    return line if len(line) <= limit else f"{line[: limit - 1]}…"
