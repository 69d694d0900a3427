"""How much a test can see: Student's interval, the smallest difference it finds, and how equal two systems are.

Sources: Card et al., With Little Power Comes Great Responsibility (2020); Schuirmann, A comparison of the two
one-sided tests procedure and the power approach (1987).
"""

from math import floor, inf, log10

from scipy.special import stdtr, stdtrit

LEVEL = 0.05
POWER = 0.8


def student_interval(value: float, error: float, degrees: float, confidence: float) -> tuple[float, float]:
    """Compute Student's interval of a value with this standard error."""
    reach = float(stdtrit(degrees, (1 + confidence) / 2)) * error
    return value - reach, value + reach


def student_p(value: float, error: float, degrees: float) -> float:
    """Compute the two-sided p of Student's test that the value is 0."""
    if error == 0:
        return 1.0 if value == 0 else 0.0
    return 2 * float(stdtr(degrees, -abs(value) / error))


def smallest_difference(error: float, degrees: float = inf) -> float:
    """Compute which difference a two-sided test at 5 % finds with 80 % power."""
    return float(_quantile(degrees, 1 - LEVEL / 2) + _quantile(degrees, POWER)) * error


def equivalence_margin(value: float, error: float, degrees: float = inf) -> float:
    """Compute the smallest margin within which two one-sided tests at 5 % place the difference."""
    return abs(value) + _quantile(degrees, 1 - LEVEL) * error


def _quantile(degrees: float, probability: float) -> float:
    return float(stdtrit(degrees, probability))


def equivalence_text(margin: float, error: float) -> str:
    """Say in a sentence how large the difference can be; an empty text where nothing scatters, as of one example."""
    return f" It is within ±{size_text(margin)} by two one-sided tests (TOST) at 5 %." if error else ""


def size_text(value: float) -> str:
    """Write the size of a difference with two decimals, and a small one with two digits: `0.87`, `0.0031`."""
    return f"{value:.2f}" if value >= 0.1 or value == 0 else f"{value:.2g}"


def decimals(scale: float) -> int:
    """Return how many decimals a figure needs whose standard error, or size, is this: two, more if that is small."""
    return 2 if scale == 0 or scale >= 0.02 else 1 - floor(log10(scale))


def signed_text(value: float, scale: float) -> str:
    """Write a difference with its sign and the `decimals` of a scale: `+0.64`, `-0.00031`; 0 and -0 are `+0.00`."""
    text = f"{value:+.{decimals(scale)}f}"
    return text.replace("-", "+") if float(text) == 0 else text


def p_text(p_value: float) -> str:
    """Write a p-value with three digits: `p = 0.012`; what is smaller than they can say is `p < 0.001`."""
    return f"p {p_cell(p_value)}" if p_value < 0.001 else f"p = {p_value:.3f}"


def p_cell(p_value: float) -> str:
    """Write a p-value for a table: `0.012` or `< 0.001`."""
    return "< 0.001" if p_value < 0.001 else f"{p_value:.3f}"
