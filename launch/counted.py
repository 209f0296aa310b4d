"""Numbers with the word for what they count, in the singular or the plural."""


def counted(number: int, what: str) -> str:
    """Return `1 query`, `1,469 training queries`, `0 matches`; what: the word in the singular, adjectives before it."""
    if number == 1:
        return f"1 {what}"
    if what.endswith("y") and what[-2] not in "aeiou":
        return f"{number:,} {what[:-1]}ies"
    return f"{number:,} {what}{'es' if what.endswith(('s', 'x', 'ch', 'sh')) else 's'}"
