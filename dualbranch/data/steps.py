"""Worked arithmetic, digit by digit, in the one notation that all traces share.

A small model can look facts up (8+6=14, 7*6=42) but can't do much arithmetic in its head, so each step needs one fact
and digits that stand close by. `|` is followed by what has been written of the result so far; the last one is the result.

    478+356:8+6=14|4;7+5+1=13|34;4+3+1=8|834         columns from the right, `+1` is the carry
    502-378:12-8=4|4;10-7-1=2|24;5-3-1=1|124         a leading 1 is borrowed, the next column pays `-1`
    478*6:8*6=48|8;7*6+4=42+4=46|68;4*6+4=24+4=28|2868
    834/6:8-6*1=8-6=2|1;23-6*3=23-18=5|13;54-6*9=54-54=0|139    long division, the last `=` is the remainder
"""


class Trace:
    """Collects steps; each method writes one and returns its value. `str(trace)` is the text."""

    def __init__(self) -> None:
        self.parts: list[str] = []

    def __str__(self) -> str:
        return " ".join(self.parts)

    def note(self, text: str) -> None:
        self.parts.append(text)

    def compare(self, a: int, b: int) -> str:
        """Writes `a<b`, `a=b` or `a>b`; returns the sign."""
        sign = "<" if a < b else "=" if a == b else ">"
        self.note(f"{a}{sign}{b}")
        return sign

    def add(self, a: int, b: int) -> int:
        """a + b for a, b >= 0."""
        if a < 10 and b < 10:
            self.note(f"{a}+{b}={a + b}")
            return a + b
        top, bottom = _align(a, b)
        carry, written, columns = 0, "", []
        for i in reversed(range(len(top))):
            total = int(top[i]) + int(bottom[i]) + carry
            written = str(total if i == 0 else total % 10) + written
            columns.append(f"{top[i]}+{bottom[i]}{'+1' if carry else ''}={total}|{written}")
            carry = total // 10
        self.note(f"{top}+{bottom}:{';'.join(columns)}")
        return a + b

    def sub(self, a: int, b: int) -> int:
        """a - b for a >= b >= 0."""
        assert a >= b >= 0, (a, b)
        if a < 20:
            self.note(f"{a}-{b}={a - b}")
            return a - b
        top, bottom = _align(a, b)
        borrow, written, columns = 0, "", []
        for i in reversed(range(len(top))):
            pay = "-1" if borrow else ""
            rest = int(top[i]) - int(bottom[i]) - borrow
            borrow = int(rest < 0)
            rest += 10 * borrow
            written = f"{rest}{written}"
            if i == 0:
                written = str(a - b)  # drops leading zeros
            columns.append(f"{'1' if borrow else ''}{top[i]}-{bottom[i]}{pay}={rest}|{written}")
        self.note(f"{top}-{bottom}:{';'.join(columns)}")
        return a - b

    def mul(self, a: int, b: int) -> int:
        """a * b where one factor is below 100, the other may be longer; the shorter factor is written last."""
        if len(str(a)) < len(str(b)):
            a, b = b, a
        assert 0 <= b < 100, (a, b)
        if b >= 10:
            low, high = self.mul(a, b % 10), self.mul(a, b // 10)
            return self.add(low, high * 10)
        if a < 10:
            self.note(f"{a}*{b}={a * b}")
            return a * b
        digits = str(a)
        carry, written, columns = 0, "", []
        for i in reversed(range(len(digits))):
            product = int(digits[i]) * b
            total = product + carry
            written = str(total if i == 0 else total % 10) + written
            working = f"+{carry}={product}+{carry}={total}" if carry else f"={product}"
            columns.append(f"{digits[i]}*{b}{working}|{written}")
            carry = total // 10
        self.note(f"{digits}*{b}:{';'.join(columns)}")
        return a * b

    def divide(self, a: int, b: int) -> tuple[int, int]:
        """(quotient, remainder) of a / b for a >= 0 and 1 <= b < 10."""
        assert 1 <= b < 10, b
        digits = str(a)
        rest, written, columns = 0, "", []
        for i, digit in enumerate(digits):
            part = rest * 10 + int(digit)
            q, rest = divmod(part, b)
            if q == 0 and not written and i + 1 < len(digits):
                continue  # the quotient has not begun
            written += str(q)
            columns.append(f"{part}-{b}*{q}={part}-{b * q}={rest}|{written}")
        self.note(f"{digits}/{b}:{';'.join(columns)}")
        return a // b, rest


def _align(a: int, b: int) -> tuple[str, str]:
    """Both numbers with leading zeros, so that equal columns are equally far apart."""
    width = len(str(max(a, b)))
    return str(a).zfill(width), str(b).zfill(width)
