"""Journals as other versions would have written them."""

from __future__ import annotations

import pathlib

from evolve.journal import Journal, read_journal


def forget_settings(file: pathlib.Path, **names: str) -> None:
    """Writes a journal as if one setting of each of these groups had not been known when it was begun."""
    first, *others = read_journal(file)
    for group, name in names.items():
        del first["settings"][group][name]
    file.unlink()
    journal = Journal(file)
    for record in (first, *others):
        journal.append(record["type"], {key: value for key, value in record.items() if key not in ("sequence", "type", "crc32")})
    journal.close()
