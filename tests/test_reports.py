"""Reports: a head that says of what, when, where and with what, and tables that say what their columns are."""

from modeling_speculator.measuring.reports import explained_table, head, number, table


COLUMNS = {"method": "a way", "speed": "in tokens/s", "memory": "in GiB"}
ROWS = [{"method": "one|other", "speed": "2.00"}, {"method": "two\nlines"}]


def test_a_head():
    machine = {"processor": "a CPU", "threads": 2, "date": "2026-01-02"}
    models = {"base model": "org/base", "medusa": "runs/medusa"}
    versions = {"python": "3.11", "torch": "2.13"}
    assert head("Speed", models, "torch.bfloat16", machine, versions, "8 prompts").splitlines() == [
        "# Speed",
        "",
        "|  |  |",
        "| --- | --- |",
        "| base model | org/base |",
        "| medusa | runs/medusa |",
        "| date | 2026-01-02 |",
        "| machine | a CPU, 2 threads |",
        "| versions | python 3.11, torch 2.13 |",
        "| dtype | bfloat16 |",
        "| measured | 8 prompts |",
    ]


def test_a_table_and_what_its_columns_are():
    expected = "| method | speed |\n| --- | --- |\n| one\\|other | 2.00 |\n| two lines |  |\n"
    assert table(COLUMNS, ROWS) == expected
    assert explained_table(COLUMNS, ROWS) == f"{expected}\n- **method**: a way\n- **speed**: in tokens/s\n"


def test_numbers():
    assert [number(None), number(0.0), number(1.005, 1)] == ["", "0.00", "1.0"]
