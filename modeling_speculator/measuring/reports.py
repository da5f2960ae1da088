"""Pages of Markdown that say what they report: of what, when, where and with what, and what each column is."""

from .benchmarking import machine_name


def head(title: str, models: dict[str, str], dtype: str, machine: dict, versions: dict, measured: str) -> str:
    """A title, and what all figures below it were measured on and with.

    Args:
        models: {what it is: folder or Hub id}.
        machine, versions: of `benchmarking`.
        measured: how much, in words.
    """
    facts = models | {
        "date": machine["date"],
        "machine": machine_name(machine),
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "dtype": dtype.removeprefix("torch."),
        "measured": measured,
    }
    return f"# {title}\n\n" + _lines([["", ""], *([name, fact] for name, fact in facts.items())])


def table(columns: dict[str, str], rows: list[dict[str, str]]) -> str:
    """Rows of cells by column, without the columns that no row fills.

    Args:
        columns: {name: what it is}, all that there may be.
    """
    names = _filled(columns, rows)
    return _lines([names, *([row.get(name, "") for name in names] for row in rows)])


def explained_table(columns: dict[str, str], rows: list[dict[str, str]]) -> str:
    """`table`, and below it what each of its columns is."""
    meanings = "".join(f"- **{name}**: {columns[name]}\n" for name in _filled(columns, rows))
    return f"{table(columns, rows)}\n{meanings}"


def number(value: float | None, digits: int = 2) -> str:
    """Rounded, and empty where there is none."""
    return "" if value is None else f"{value:.{digits}f}"


def _filled(columns: dict[str, str], rows: list[dict[str, str]]) -> list[str]:
    return [name for name in columns if any(row.get(name) for row in rows)]


def _lines(rows: list[list[str]]) -> str:
    first, *others = [[" ".join(cell.split()).replace("|", "\\|") for cell in row] for row in rows]
    return "".join(f"| {' | '.join(row)} |\n" for row in [first, ["---"] * len(first), *others])
