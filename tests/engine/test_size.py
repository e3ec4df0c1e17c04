"""The engine stays thin: lines of code, without blank lines, comments and strings that document.

Beside it stand the drop-ins that it is built on (`integrations`), evaluation, the reports of runs and of the machine
(`align env`), and the demo with its data.
"""

import ast
import io
import tokenize
from pathlib import Path

ENGINE = Path(__file__).parents[2] / "align_engine"
BESIDE = ("integrations", "demo", "evals.py", "report.py", "environment.py")
LAYOUT = {tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.COMMENT, tokenize.ENDMARKER}


def code_lines(source: str) -> int:
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in LAYOUT:
            lines |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines -= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(lines)


def test_code_lines():
    text = '"""Doc."""\n# comment\n\nx = (\n    1,\n)\n\ndef f():\n    """Doc\n    string."""\n    return """a\nb"""\n'
    assert code_lines(text) == 6


def test_the_engine_is_under_3000_lines():
    files = [path for path in ENGINE.rglob("*.py") if path.relative_to(ENGINE).parts[0] not in BESIDE]
    total = sum(code_lines(path.read_text()) for path in files)
    assert 1000 < total < 3000, total
