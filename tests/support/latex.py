"""A strict little reader of `tabular` environments: what it takes, LaTeX with booktabs sets; else it raises."""

from __future__ import annotations

import re

COMMANDS = {
    "begin", "end", "toprule", "midrule", "bottomrule", "cmidrule", "multicolumn", "mathbf", "pm", "textbackslash",
    "textasciitilde", "textasciicircum", "textless", "textgreater", "textbar", "dots",
}  # fmt: skip
RULES = ("\\toprule", "\\midrule", "\\bottomrule")
TEXTS = {
    r"\textbackslash{}": "\\", r"\textasciitilde{}": "~", r"\textasciicircum{}": "^", r"\textless{}": "<",
    r"\textgreater{}": ">", r"\textbar{}": "|", r"\dots{}": "…", r"\{": "{", r"\}": "}", r"\$": "$", r"\&": "&",
    r"\#": "#", r"\%": "%", r"\_": "_", "''": '"',
}  # fmt: skip


def read_tabulars(page: str) -> list[list[list[str]]]:
    """Cells of each row of each environment; a cell of several columns comes with as many empty ones behind it."""
    lines = [line for line in page.splitlines() if line and not line.startswith("%")]
    tables: list[list[list[str]]] = []
    inside = 0
    for line in lines:
        check_line(line)
        begin = re.fullmatch(r"\\begin\{tabular\}\{([lrc]+)\}", line)
        if begin:
            assert not inside, "an environment within another"
            inside = len(begin[1])
            tables.append([])
        elif line == "\\end{tabular}":
            assert inside
            inside = 0
        elif line in RULES or re.fullmatch(r"(\\cmidrule\(lr\)\{\d+-\d+\})+", line):
            for first, last in re.findall(r"\{(\d+)-(\d+)\}", line):
                assert 1 <= int(first) <= int(last) <= inside
        else:
            assert line.endswith(" \\\\"), line
            assert not re.match(r"\s*[\[*]", line), "an option of the row before"
            row = []
            for cell in re.split(r"(?<!\\)&", line.removesuffix("\\\\")):
                span = re.fullmatch(r"\\multicolumn\{(\d+)\}\{c\}\{(.*)\}", cell.strip())
                row += [span[2], *[""] * (int(span[1]) - 1)] if span else [cell.strip()]
            assert len(row) == inside, row
            tables[-1].append(row)
    assert not inside, "an environment without end"
    return tables


def check_line(line: str) -> None:
    """Braces and dollars in pairs, known commands only, nothing special that isn't escaped."""
    known = re.sub(
        r"\\([A-Za-z]+)", lambda m: "" if m[1] in COMMANDS else f"UNKNOWN#{m[1]}", line.removesuffix(" \\\\")
    )
    plain = re.sub(r"\\[{}$&#%_,]", "", known)
    assert "\\" not in plain, line
    assert not re.search(r"[#%_^~]", plain), line
    assert plain.count("$") % 2 == 0, line
    depth = 0
    for sign in plain:
        depth += {"{": 1, "}": -1}.get(sign, 0)
        assert depth >= 0, line
    assert depth == 0, line
    assert plain.isprintable(), line


def typeset(text: str) -> str:
    """What a reader of the page sees."""
    pattern = "|".join(re.escape(key) for key in sorted(TEXTS, key=len, reverse=True))
    return re.sub(pattern, lambda match: TEXTS[match[0]], text)
